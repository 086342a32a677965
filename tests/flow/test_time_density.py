import pytest
import scipy.stats
import torch

from pi0fm.flow.config import DENSITIES, PATHS
from pi0fm.flow.path import path_named
from pi0fm.flow.time_density import Likelihood, LogitNormal, Pi0Density, density_named
from pi0fm_client.errors import ConfigError

U = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
EVERY = [density_named(name) for name in DENSITIES] + [Likelihood(1e-3, path_named(name)) for name in PATHS] + [LogitNormal(0.7, 0.5)]


@pytest.mark.parametrize("density", EVERY, ids=str)
def test_density_is_the_slope_of_the_distribution(density):
    """p(t(u)) dt/du = 1 wherever u -> t is the inverse distribution function; central differences of the quantile."""
    step = 1e-5
    slope = (density.quantile(U + step) - density.quantile(U - step)) / (2 * step)
    torch.testing.assert_close(slope * torch.exp(density.log_density(density.quantile(U))), torch.ones_like(U), rtol=2e-4, atol=0)
    assert (slope > 0).all()


@pytest.mark.parametrize("density", EVERY, ids=str)
def test_float32_stays_inside_the_support_at_the_ends_of_u(density):
    u = torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24], dtype=torch.float32)
    t = density.quantile(u)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert torch.equal(t, t.sort().values)
    double = density.quantile(u.double())
    torch.testing.assert_close(t.double(), double, rtol=1e-3, atol=1e-4)


def test_pi0_is_its_beta_on_the_opposite_clock():
    noise_clock = 1 - Pi0Density().quantile(U)
    expected = scipy.stats.beta(1.5, 1, loc=0.001, scale=0.999)
    # t = 1 - t', so the probability that T <= t is the probability that T' >= t'.
    torch.testing.assert_close(torch.from_numpy(expected.sf(noise_clock.numpy())), U)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(Pi0Density().log_density(t), torch.from_numpy(expected.logpdf((1 - t).numpy())))
    mean = float(Pi0Density().quantile((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).mean())
    assert mean == pytest.approx(1 - (0.6 * 0.999 + 0.001), abs=1e-5)


def test_logit_normal_is_scipy_s():
    t = LogitNormal(0.7, 0.5).quantile(U)
    torch.testing.assert_close(torch.from_numpy(scipy.stats.norm(0.7, 0.5).cdf(torch.logit(t).numpy())), U)


def test_likelihood_of_cond_ot_is_t_over_one_minus_t_cut_at_eps():
    density = Likelihood(1e-2)
    t = torch.tensor([0.2, 0.8, 0.99, 0.995], dtype=torch.float64)
    p = density.log_density(t).exp()
    assert float(p[1] / p[0]) == pytest.approx((0.8 / 0.2) / (0.2 / 0.8))
    assert float(p[3]) == 0
    grid = torch.linspace(0, 0.99, 200_001, dtype=torch.float64)
    assert float(torch.trapezoid(density.log_density(grid).exp(), grid)) == pytest.approx(1, abs=1e-6)
    assert float(density.quantile(torch.ones((), dtype=torch.float64))) == pytest.approx(0.99)


def test_outside_the_support_the_density_is_zero():
    t = torch.tensor([-0.1, 1.1])
    for density in EVERY:
        assert density.log_density(t).tolist() == [-torch.inf, -torch.inf]
    assert float(Pi0Density().log_density(torch.tensor(0.9995))) == -torch.inf
    assert LogitNormal().log_density(torch.tensor([0.0, 1.0])).tolist() == [-torch.inf, -torch.inf]


def test_unknown_names_and_constants_are_refused():
    with pytest.raises(ConfigError, match=r"unknown time density 'beta'.*likelihood, logit_normal, pi0, uniform"):
        density_named("beta")
    with pytest.raises(ConfigError, match="s > 0"):
        LogitNormal(0, 0)
    with pytest.raises(ConfigError, match="0 < eps < 1"):
        Likelihood(0)
