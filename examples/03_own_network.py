"""Use flow matching with your own network, on tensors of any shape: python examples/03_own_network.py [STEPS].

`FlowMatching` owns path, times, loss and solver, independent of robots and of pi0. Data here: two moons in the plane.
"""

import sys

import torch
from torch import nn

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
torch.manual_seed(0)


def moons(count):
    """Draw points [count, 2] on two half circles."""
    angle, second = torch.rand(count) * torch.pi, torch.rand(count) < 0.5
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.where(second[:, None], torch.tensor([1.0, 0.5]) - points, points) + 0.05 * torch.randn(count, 2)


class Velocity(nn.Module):
    """Network (x [B, 2], t [B]) -> velocity [B, 2]; any module of this form works."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], dim=1))


flow, network = FlowMatching.from_config(FlowConfig(time_density="uniform", solver="midpoint")), Velocity()
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for _ in range(steps):
    data = moons(256)
    t = flow.times(torch.rand(len(data)))
    pair = flow.training_pair(data, t, noise_BHA=torch.randn_like(data))
    value = flow.mean_loss(network(pair.x_t, t), pair.target, torch.ones_like(data, dtype=torch.bool), t)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

with torch.no_grad():
    samples = flow.sample(network, torch.randn(1000, 2), num_flow_steps=20)
distance = torch.cdist(samples, moons(4000)).min(dim=1).values
print(f"loss {value.item():.3f}; of 1000 samples {(distance < 0.15).float().mean():.0%} are within 0.15 of the moons")
