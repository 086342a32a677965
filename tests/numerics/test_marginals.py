"""Test 4 of the mathematics: the ODE and every SDE of the family sample the same marginals, those of the data."""

import pytest
import scipy.stats
import torch
from gaussian_mixture import GaussianMixture

from pi0fm.flow.config import PATHS, FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.stochastic import sample_ancestral, sample_sde

MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64), torch.tensor([0.65, 0.35], dtype=torch.float64), 0.4
)
NUM = 1500
DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7071, 0.7071]], dtype=torch.float64)


def p_values(first, second):
    """Kolmogorov-Smirnov on three projections."""
    return [float(scipy.stats.ks_2samp((first @ d).numpy(), (second @ d).numpy()).pvalue) for d in DIRECTIONS]


@pytest.mark.parametrize("path", PATHS)
def test_ode_and_sde_samples_have_the_same_marginals(path):
    flow = FlowMatching.from_config(FlowConfig(path=path))
    generator = torch.Generator().manual_seed(11)

    def field(x, t):
        return MIXTURE.velocity(flow.path, x, t)

    def noise():
        return torch.randn(NUM, 2, generator=generator, dtype=torch.float64)

    data = MIXTURE.sample(NUM, generator)
    ode = flow.sample(field, noise(), 60, "heun")
    samples = {"ode": ode} | {f"h = {h} g": sample_sde(flow, field, noise(), h, 120, generator=generator) for h in (0.5, 1.0, 1.5)}
    samples["ancestral"] = sample_ancestral(flow, field, noise(), 250, generator=generator)
    for name, found in samples.items():
        assert min(p_values(found, data)) > 0.01 / 3, name
        assert min(p_values(found, ode)) > 0.01 / 3, name


def test_the_two_sample_test_can_fail():
    """A shift of a quarter of the components' width is seen with this many samples."""
    generator = torch.Generator().manual_seed(12)
    first, second = MIXTURE.sample(NUM, generator), MIXTURE.sample(NUM, generator)
    assert min(p_values(first, second)) > 0.01 / 3
    assert min(p_values(first, second + 0.1)) < 1e-3
