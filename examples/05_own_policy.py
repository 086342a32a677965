"""Train and serve your own network with pi0fm's flow, sampler and server: python examples/05_own_policy.py [STEPS].

The server takes any object with `metadata`, `observation` and `infer_batch`. Here: an arm of two joints that moves to the prompt's target.
"""

import asyncio
import sys
import threading

import numpy as np
import torch
from torch import nn

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.serve.app import create_app
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.server import bind, make_server, serve, url_of
from pi0fm_client import PolicyClient
from pi0fm_client.types import ActionChunk

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
HORIZON, JOINTS, GOALS = 8, 2, {"left": [-1.0, 0.5], "right": [1.0, -0.5]}
ROBOT = Embodiment(name="two_joints", state_dim=JOINTS, robot_action_dim=JOINTS)
torch.manual_seed(0)


def chunks(state, goal):
    """Make commands [B, HORIZON, JOINTS] from the state to the goal in equal steps."""
    return state[:, None] + (goal - state)[:, None] * (torch.arange(1, HORIZON + 1) / HORIZON)[:, None]


class Network(nn.Module):
    """Network (state [B, J], goal [B, J], x_t [B, H, J], t [B]) -> velocity [B, H, J]."""

    def __init__(self):
        super().__init__()
        width = HORIZON * JOINTS
        hidden = [nn.Linear(width + 2 * JOINTS + 1, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(128, width))

    def forward(self, state, goal, x_t, t):
        return self.layers(torch.cat([x_t.flatten(1), state, goal, t[:, None]], dim=1)).view_as(x_t)


class OwnPolicy:
    """Policy for serving and evaluation; put your normalisation and tokenizer into `infer_batch`."""

    def __init__(self, network, flow):
        self.network, self.flow = network.eval(), flow
        self.metadata = {"embodiment": ROBOT.name, "cameras": {}, "state_key": ROBOT.state, "state_dim": JOINTS, "image_size": [8, 8]}
        self.metadata |= {"robot_action_dim": JOINTS, "action_horizon": HORIZON}

    def observation(self, flat):
        """Read a client's map and refuse faults in it, in one line."""
        return ROBOT.observation(flat)

    @torch.no_grad()
    def infer_batch(self, observations, noise_seeds=None):
        """Infer a chunk for each observation, a function of observation and seed."""
        state = torch.from_numpy(np.stack([each.state for each in observations]))
        goal = torch.tensor([GOALS.get(each.prompt, [0.0, 0.0]) for each in observations])
        seeds = noise_seeds or np.random.default_rng().integers(2**62, size=len(observations)).tolist()
        noise = torch.stack([torch.randn(HORIZON, JOINTS, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        sampled = self.flow.sample(lambda x, t: self.network(state, goal, x, t), noise)
        return [ActionChunk(chunk.numpy()) for chunk in sampled]


network, flow = Network(), FlowMatching.from_config(FlowConfig())
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for _ in range(steps):
    state, goal = torch.randn(128, JOINTS), torch.tensor(list(GOALS.values()))[torch.randint(len(GOALS), (128,))]
    actions, t = chunks(state, goal), flow.times(torch.rand(128))
    pair = flow.training_pair(actions, t, noise_BHA=torch.randn_like(actions))
    value = flow.mean_loss(network(state, goal, pair.x_t, t), pair.target, torch.ones_like(actions, dtype=torch.bool), t)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

limits = ServingLimits()
app, bound, ready = create_app(OwnPolicy(network, flow), limits), bind("127.0.0.1", 0), threading.Event()
server = make_server(app, limits)
thread = threading.Thread(target=lambda: asyncio.run(serve(server, app, bound, lambda seconds: ready.set())))
thread.start()
ready.wait()
with PolicyClient(url_of(bound)) as client:
    for prompt, goal in GOALS.items():
        chunk = client.infer({"observation.state": np.zeros(JOINTS, np.float32), "prompt": prompt}, noise_seed=0)
        print(prompt, "ends at", np.round(chunk.actions[-1], 2), "of", goal)
server.should_exit = True
thread.join()
