"""Test 3 of the mathematics: log p of mixture data against its closed form."""

import math

import pytest
import torch
from gaussian_mixture import GaussianMixture, rademacher_probes

from pi0fm.flow.config import PATHS, FlowConfig
from pi0fm.flow.density import DensityOptions, log_prob, push_backward, push_forward
from pi0fm.flow.matching import FlowMatching

MIXTURE = GaussianMixture(torch.tensor([[1.2, 0.0], [-1.0, 0.8]], dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64), 0.5)


def case(path, solver="rk4", steps=40):
    """The flow, its exact field, options, and the closed form of p_1. p_0 is the path's own, which VP and VE only approximate."""
    flow = FlowMatching.from_config(FlowConfig(path=path, solver=solver, num_flow_steps=steps))

    def field(x, t):
        return MIXTURE.velocity(flow.path, x, t)

    def at(time):
        return lambda x: MIXTURE.log_prob(flow.path, x, torch.full((len(x),), time, dtype=torch.float64))

    return flow, field, at(0.0), at(1.0)


def points(num, seed=0):
    return MIXTURE.sample(num, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", PATHS)
def test_exact_divergence_gives_the_closed_form_within_1e_5(path):
    # VE spends its last tenth of t on the smallest noise: a fixed grid in t needs more steps there.
    flow, field, prior, truth = case(path, steps={"cond_ot": 40, "cosine": 40, "vp": 100, "ve": 100}[path])
    x = points(24)
    found = log_prob(flow, field, x, options=DensityOptions(log_prior=prior))
    torch.testing.assert_close(found, truth(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["cond_ot", "cosine"])
def test_the_gaussian_prior_is_exact_where_alpha_starts_at_zero(path):
    flow, field, _, truth = case(path)
    torch.testing.assert_close(log_prob(flow, field, points(24)), truth(points(24)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_the_integral_of_the_divergence_of_one_gaussian_is_its_closed_form(path):
    """int div = (D / 2) ln(Var_1 / Var_0), whatever the point."""
    flow = FlowMatching.from_config(FlowConfig(path=path, solver="rk4", num_flow_steps=80))
    data = GaussianMixture(torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.3)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = DensityOptions(log_prior=lambda state: torch.zeros(len(state), dtype=torch.float64))
    found = log_prob(flow, lambda x, t: data.velocity(flow.path, x, t), x, options=options)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    variance = flow.path.sigma(ends) ** 2 + flow.path.alpha(ends) ** 2 * 0.3**2
    expected = -1.5 * math.log(float(variance[1] / variance[0]))
    torch.testing.assert_close(found, torch.full((5,), expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_hutchinson_is_unbiased_within_its_standard_error():
    flow, field, _, truth = case("cond_ot", steps=10)
    x = points(1).expand(800, 2).contiguous()
    options = DensityOptions(probes=rademacher_probes(1, x, 3))
    estimates = log_prob(flow, field, x, options=options)
    error = float(estimates.std()) / math.sqrt(800)
    assert error > 1e-6
    assert abs(float(estimates.mean() - truth(x[:1])[0])) < 4 * error


def test_the_density_integrates_to_one_on_a_grid():
    flow, field, _, _ = case("cond_ot", steps=12)
    axis = torch.linspace(-4.5, 4.5, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    assert float(log_prob(flow, field, grid).exp().sum()) * cell == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_forward_then_backward_returns_the_start_with_the_same_density(path):
    flow, field, prior, truth = case(path, "dopri5")
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = DensityOptions(log_prior=prior)
    forward = push_forward(flow, field, noise, options=options)
    backward = push_backward(flow, field, forward.actions, options=options)
    torch.testing.assert_close(backward.noise, noise, rtol=0, atol=2e-3)
    torch.testing.assert_close(forward.log_prob, truth(forward.actions), rtol=0, atol=2e-3)
    torch.testing.assert_close(backward.log_prob, forward.log_prob, rtol=0, atol=2e-3)


@pytest.mark.parametrize("path", PATHS)
def test_the_continuity_equation_holds(path):
    """d p_t / dt + div(p_t v_t) = 0, so d log p / dt + v . score + div v = 0; by autograd at scattered points."""
    flow, field, _, _ = case(path)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64).requires_grad_(True)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64).requires_grad_(True)
    density = MIXTURE.log_prob(flow.path, x, t)
    in_time, in_space = torch.autograd.grad(density.sum(), (t, x))
    velocity = field(x, t)
    divergence = sum(torch.autograd.grad(velocity[:, k].sum(), x, retain_graph=True)[0][:, k] for k in range(2))
    residual = in_time + (velocity * in_space).sum(1) + divergence
    assert float((residual / (1 + divergence.abs())).detach().abs().max()) < 1e-9
