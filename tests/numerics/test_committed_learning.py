"""Test that a network trained with held rows learns to continue them, more often than without."""

import pytest
import torch
from small_pi0 import BOTH, network, observation, resized

from pi0fm.data.loading.batch import Batch
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.sampling.sampler import Sampler
from pi0fm.train.parallel.accelerate import make_accelerator
from pi0fm.train.step import train_step

H, COUNT, STEPS = 4, 64, 120
FLOW = FlowMatching.from_config(FlowConfig())


def lines(count, random):
    """Up or down by half a unit a row, from nothing in the observation."""
    sign = torch.randint(0, 2, (count, 1, 1), generator=random) * 2.0 - 1
    actions = torch.zeros(count, H, 5)
    actions[..., :1] = sign * torch.arange(1, H + 1)[:, None] / 2 + 0.05 * torch.randn(count, H, 1, generator=random)
    return actions


def trained(config, max_delay):
    torch.manual_seed(0)
    model, random = network(config), torch.Generator().manual_seed(0)
    accelerator = make_accelerator("float32", 1, allow_cuda=False)
    model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), lr=3e-3))
    seen = observation(COUNT, 1, (1,) * COUNT, config)
    mask = (torch.arange(5) < 1).expand(COUNT, H, 5)
    for _ in range(STEPS):
        noise = torch.randn(COUNT, 1, H, 5, generator=random) * mask[:, None]
        delays = torch.randint(0, max_delay + 1, (COUNT, 1), generator=random) if max_delay else None
        batch = Batch(seen, lines(COUNT, random), mask, noise, torch.rand(COUNT, 1, generator=random), delays=delays)
        valid = COUNT * H if delays is None else int((H - delays).sum())
        train_step(model, FLOW, optimizer, accelerator, iter([batch]), valid, 1.0)
    return model.eval()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("name", list(BOTH))
def test_a_trained_network_goes_on_from_its_held_rows(name):
    config = resized(BOTH[name], decoder={"depth": 2})
    random, seen = torch.Generator().manual_seed(9), observation(COUNT, 1, (1,) * COUNT, config)
    actions, noise = lines(COUNT, random), torch.randn(COUNT, H, 5, generator=random)
    mask, held = (torch.arange(5) < 1).expand(COUNT, H, 5), (torch.arange(H) < 2).expand(COUNT, H)
    shares = []
    for max_delay in (0, 3):
        sampler = Sampler(trained(config, max_delay), FLOW, torch.device("cpu"), torch.float32)
        chunk = sampler(seen, noise, mask, committed=(actions, held))
        shares.append((chunk * actions)[:, 2:, 0].gt(0).float().mean().item())
    assert shares[0] < 0.85 and shares[1] > 0.98
