"""Test 5 of the mathematics: the marginal field minimises the conditional flow-matching loss (arXiv 2210.02747, Theorem 2)."""

import pytest
import torch
from gaussian_mixture import GaussianMixture

from pi0fm.flow.config import PATHS, FlowConfig
from pi0fm.flow.matching import FlowMatching

MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.4
)


@pytest.mark.parametrize("path", PATHS)
def test_the_oracle_field_has_the_least_loss_and_a_vanishing_gradient(path):
    """The excess loss of a perturbation d is E||d||^2: no cross term is left, within its standard error."""
    flow = FlowMatching.from_config(FlowConfig(path=path, time_density="pi0"))
    generator = torch.Generator().manual_seed(0)
    num = 40_000
    x_1 = MIXTURE.sample(num, generator)
    x_0 = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    t = flow.times(torch.rand(num, generator=generator, dtype=torch.float64))
    pair = flow.training_pair(x_1, t, x_0)
    oracle = MIXTURE.velocity(flow.path, pair.x_t, t)
    mask = torch.ones_like(x_1, dtype=torch.bool)
    least = float(flow.mean_loss(oracle, pair.target, mask))
    assert least > 0
    size = float(oracle.square().mean().sqrt())
    position = torch.tanh(pair.x_t)
    shapes = [
        torch.ones_like(position),
        position,
        position.flip(1),
        torch.sin(6 * t)[:, None] * position,
        torch.cos(3 * position),
        t[:, None] * oracle / size,
    ]
    for shape in shapes:
        for amount in (0.3 * size, -0.3 * size):
            perturbed = float(flow.mean_loss(oracle + amount * shape, pair.target, mask))
            assert perturbed > least
        cross = ((oracle - pair.target) * shape).sum(1)
        assert abs(float(cross.mean())) < 4.5 * float(cross.std()) / num**0.5
