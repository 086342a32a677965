"""Train on your own arrays, without a LeRobot data set: python examples/04_own_data.py BUNDLE [STEPS].

A chain normalises, pads and tokenises; the bundle saves it, so a served policy takes and returns robot units. Data here: an arm of two
joints that moves to a target given by the prompt.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import pi0fm
from pi0fm.data.chain import Sample
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import preset
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.bundle import PolicyConfig

target, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 300
network, random, count, batch_size = preset("tiny"), np.random.default_rng(0), 512, 16

# your arrays: pictures, states, action chunks in robot units, prompts
goals = {"reach left": np.array([-40.0, 10.0]), "reach right": np.array([40.0, -10.0])}
prompts = [str(random.choice(list(goals))) for _ in range(count)]
state = random.normal(0, 15, (count, 2)).astype(np.float32)
step_to_goal = (np.stack([goals[prompt] for prompt in prompts]) - state) / network.action_horizon
actions = (state[:, None] + step_to_goal[:, None] * np.arange(1, network.action_horizon + 1)[:, None]).astype(np.float32)
size = network.vision.image_size
images = np.zeros((count, 1, size, size, 3), np.uint8)  # [sample, camera, height, width, colour]

embodiment = Embodiment(name="two_joints", cameras={"base": "observation.images.base"}, state_dim=2, robot_action_dim=2)
stats = NormStats(column_stats(state, "state"), column_stats(actions.reshape(-1, 2), "action"), count)
policy = PolicyConfig(model=network, flow=FlowConfig(), embodiment=embodiment, execution_horizon=8, fps=10.0)
chain = policy.chain(stats)

torch.manual_seed(0)
model, flow = Pi0(network), FlowMatching.from_config(policy.flow)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(steps):
    rows = random.integers(count, size=batch_size)
    sample = chain.forward(Sample(state[rows], actions[rows]))  # normalised and padded
    has_camera = np.ones((batch_size, 1), bool)
    observation = chain.to_model(images[rows], has_camera, sample.state, [prompts[row] for row in rows])
    x_1 = torch.from_numpy(sample.actions)
    real = (torch.arange(network.action_dim) < 2).expand_as(x_1)  # padded dimensions do not count in the loss
    t = flow.times(torch.rand(batch_size))
    pair = flow.training_pair(x_1, t, torch.randn_like(x_1), real)
    value = flow.mean_loss(model(observation, pair.x_t, t), pair.target, real, t)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step + 1}: loss {value.item():.4f}")

bundle.save(target, model.state_dict(), policy, stats)
loaded = pi0fm.load(target)
for prompt, goal in goals.items():
    asked = {"observation.images.base": images[0, 0], "observation.state": np.zeros(2, np.float32), "prompt": prompt}
    print(prompt, "ends at", np.round(loaded.infer(asked, noise_seed=0).actions[-1], 1), "of", goal)
