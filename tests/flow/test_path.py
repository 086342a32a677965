import math

import pytest
import torch

from pi0fm.flow.config import PATHS
from pi0fm.flow.path import VE, CondOT, VPDiffusion, path_named
from pi0fm_client.errors import ConfigError

INTERIOR = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)


def derivative(function, t):
    t = t.clone().requires_grad_(True)
    return torch.autograd.grad(function(t).sum() + 0 * t.sum(), t)[0]


@pytest.mark.parametrize("name", PATHS)
def test_alpha_and_sigma_primes_equal_autograd(name):
    path = path_named(name)
    torch.testing.assert_close(path.alpha_prime(INTERIOR), derivative(path.alpha, INTERIOR), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(path.sigma_prime(INTERIOR), derivative(path.sigma, INTERIOR), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_lam_equals_its_general_formula_and_its_integral(name):
    path = path_named(name)
    alpha, sigma = path.alpha(INTERIOR), path.sigma(INTERIOR)
    general = sigma**2 * path.alpha_prime(INTERIOR) / alpha - sigma * path.sigma_prime(INTERIOR)
    torch.testing.assert_close(path.lam(INTERIOR), general, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.diffusion(INTERIOR) ** 2 / 2, general, rtol=1e-9, atol=0)
    torch.testing.assert_close(derivative(path.likelihood_integral, INTERIOR), 1 / general, rtol=1e-9, atol=0)
    assert float(path.likelihood_integral(torch.zeros((), dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_the_conditional_velocity_is_the_time_derivative_of_the_interpolation(name):
    path = path_named(name)
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(2, 37, 3, 2, generator=generator, dtype=torch.float64)
    velocity = path.conditional_velocity(x_0, x_1, INTERIOR)
    for h in range(3):
        for a in range(2):
            moving = derivative(lambda t, h=h, a=a: path.sample(x_0, x_1, t)[:, h, a], INTERIOR)
            torch.testing.assert_close(velocity[:, h, a], moving, rtol=1e-9, atol=1e-10)
    # The form of the papers: (sigma'/sigma)(x - alpha x_1) + alpha' x_1.
    alpha, sigma, alpha_prime, sigma_prime = (
        f(INTERIOR)[:, None, None] for f in (path.alpha, path.sigma, path.alpha_prime, path.sigma_prime)
    )
    x_t = path.sample(x_0, x_1, INTERIOR)
    torch.testing.assert_close(velocity, sigma_prime / sigma * (x_t - alpha * x_1) + alpha_prime * x_1, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "alphas", "sigmas"), [("cond_ot", (0, 1), (1, 0)), ("cosine", (0, 1), (1, 0)), ("ve", (1, 1), (10, 0.01))]
)
def test_the_ends_are_exact(name, alphas, sigmas):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    path = path_named(name)
    torch.testing.assert_close(path.alpha(ends), torch.tensor(alphas, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(path.sigma(ends), torch.tensor(sigmas, dtype=torch.float64), rtol=1e-14, atol=0)


def test_vp_begins_at_ddpm_s_small_alpha_and_preserves_variance():
    path = VPDiffusion()
    assert float(path.alpha(torch.tensor(0.0))) == pytest.approx(0.0066, abs=5e-5)
    assert float(path.sigma(torch.tensor(1.0))) == 0
    torch.testing.assert_close(path.alpha(INTERIOR) ** 2 + path.sigma(INTERIOR) ** 2, torch.ones_like(INTERIOR))


def test_cond_ot_in_float32_and_float64_keeps_the_type():
    for dtype in (torch.float32, torch.float64):
        x_0, x_1, t = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.tensor([0.25, 0.5], dtype=dtype)
        x_t = CondOT().sample(x_0, x_1, t)
        assert x_t.dtype == dtype
        assert x_t[:, 0].tolist() == [0.25, 0.5]
        assert torch.equal(CondOT().conditional_velocity(x_0, x_1, t), x_1 - x_0)


def test_an_unknown_path_and_impossible_constants_are_refused():
    with pytest.raises(ConfigError, match=r"did you mean 'cosine'.*cond_ot, cosine, ve, vp"):
        path_named("cosin")
    with pytest.raises(ConfigError, match="0 < b_min < b_max"):
        VPDiffusion(20, 0.1)
    with pytest.raises(ConfigError, match="0 < s_min < s_max"):
        VE(0.0, math.inf)
