"""Write your own training loop on a LeRobot data set: python examples/02_own_loop.py DATASET BUNDLE [STEPS].

Change the loss, optimiser and schedule; data, network and the bundle at the end are pi0fm's.
"""

import sys
from pathlib import Path

import torch

from pi0fm.data.config import DatasetConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import open_data

root, target, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1000
data = open_data(TrainConfig(dataset=DatasetConfig(root=root), flow_draws_per_observation=2))
policy, batch_size = data.policy, 16  # embodiment, normalisation and network, as saved in the bundle


def loss(predicted, target, mask, t):
    """Mean square over the real entries, with more weight on the early rows of a chunk, which are executed."""
    weight = torch.linspace(2.0, 0.0, predicted.shape[1], device=predicted.device)[:, None]
    squares = (weight * (predicted - target).square()).masked_fill(~mask, 0.0)
    return squares.sum() / mask.sum().clamp(min=1)


torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model, flow = Pi0(policy.model).to(device), FlowMatching.from_config(policy.flow)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
for step in range(steps):
    batch = data.training(step * batch_size, batch_size).to(device)  # a function of the position: no shuffling or resuming
    draws = batch.uniform.shape[1]  # draws of noise and flow time for each observation, which is encoded once
    t = flow.times(batch.uniform.flatten())
    actions, mask = batch.actions.repeat_interleave(draws, dim=0), batch.action_mask.repeat_interleave(draws, dim=0)
    pair = flow.training_pair(actions, t, batch.noise.flatten(0, 1))
    value = loss(model(batch.observation, pair.x_t, t), pair.target, mask, t)
    optimizer.zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step + 1}: loss {value.item():.4f}")

bundle.save(target, model.state_dict(), policy, data.parts[0].stats, recorded=data.recorded())
print(f"pi0fm serve {target}")
