"""Tests of guided flows: the weights by definition, the velocity by closed forms, the end of a guided sample."""

import math

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from scipy.integrate import solve_ivp

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.guidance import GuidedVelocity, hold_weights, refuse_guidance
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import CondOT
from pi0fm.flow.solver import integrate, uniform_grid

PATH = CondOT()
SHAPE = (3, 6, 2)


def oracle(scale=0.5):
    """Chunks around two means."""
    means = torch.stack([torch.full(SHAPE[1:], 1.0), torch.linspace(-1, 1, 12).reshape(SHAPE[1:])]).double()
    mixture = GaussianMixture(means, torch.tensor([0.3, 0.7], dtype=torch.float64), scale)
    return lambda x, t: mixture.velocity(PATH, x, t)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_are_the_definition_row_by_row():
    horizon, delay, executed = 10, 2, 3
    expected = []
    for i in range(horizon):
        c = (horizon - executed - i) / (horizon - executed - delay + 1)
        expected.append(1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1) if i < horizon - executed else 0.0)
    torch.testing.assert_close(hold_weights(horizon, delay, executed), torch.tensor(expected))
    assert hold_weights(horizon, delay, executed).diff().max() <= 0
    assert hold_weights(horizon, delay, executed, rows=4).count_nonzero() == 4


@pytest.mark.parametrize(("delay", "executed"), [(-1, 3), (8, 3), (1, 10)])
def test_a_delay_that_leaves_no_row_is_refused(delay, executed):
    with pytest.raises(FlowError, match="a delay must lie in"):
        hold_weights(10, delay, executed)


@pytest.mark.parametrize("jacobian", [True, False])
def test_without_a_remainder_nothing_changes_in_any_bit(jacobian):
    guided = GuidedVelocity(oracle(), normal(1), torch.zeros(SHAPE, dtype=torch.float64), jacobian=jacobian)
    x = normal(2)
    assert torch.equal(integrate(guided, x, uniform_grid(10)), integrate(oracle(), x, uniform_grid(10)))


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_velocity_is_the_equation_with_a_jacobian_by_columns(t):
    velocity, target, weights = oracle(), normal(3), torch.rand(SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x, times = normal(5), torch.full((3,), t, dtype=torch.float64)

    def ends(flat):
        return (flat + (1 - t) * velocity(flat.reshape(SHAPE), times).flatten()).flatten()

    jacobian = torch.autograd.functional.jacobian(ends, x.flatten())
    error = (weights * (target - ends(x.flatten()).reshape(SHAPE))).flatten()
    r2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
    coefficient = 5.0 if t in (0.0, 1.0) else min(5.0, (1 - t) / (t * r2))
    expected = velocity(x, times) + coefficient * (jacobian.T @ error).reshape(SHAPE)
    guided = GuidedVelocity(velocity, target, weights)
    torch.testing.assert_close(guided(x, times), expected)
    torch.testing.assert_close(guided.at(x, t), expected)
    plain = velocity(x, times) + coefficient * error.reshape(SHAPE)
    torch.testing.assert_close(GuidedVelocity(velocity, target, weights, jacobian=False)(x, times), plain)


def test_rows_of_a_batch_have_their_own_times():
    guided = GuidedVelocity(oracle(), normal(3), torch.ones(SHAPE, dtype=torch.float64))
    x, times = normal(5), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(guided(x, times), torch.cat([guided.at(x, t)[k : k + 1] for k, t in enumerate(times.tolist())]))


def test_held_everywhere_a_sample_ends_on_its_target(shapes_unchecked):
    """Exactly as the bound on the coefficient grows; with the usual one nearer than without."""
    target, x = normal(6), normal(7)
    free = integrate(oracle(), x, uniform_grid(50), "heun")
    missed = []
    for beta in (5.0, 50.0, 200.0):
        held = integrate(GuidedVelocity(oracle(), target, torch.ones_like(target), beta), x, uniform_grid(max(100, int(3 * beta))), "heun")
        missed.append((held - target).abs().mean().item())
    assert missed[0] < 0.35 * (free - target).abs().mean()
    assert missed[1] < missed[0] / 5 and missed[2] < missed[1] / 2


def test_one_gaussian_follows_the_scalar_equation(shapes_unchecked):
    """Standard normal data: v = (2t - 1) / (t^2 + (1-t)^2) x, and x1_hat = k x with k = t / (t^2 + (1-t)^2)."""
    mixture = GaussianMixture(torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1.0)

    def slope(t, x):
        square = t**2 + (1 - t) ** 2
        k = t / square
        c = 5.0 if t * (1 - t) == 0 else min(5.0, square / (t * (1 - t)))
        return (2 * t - 1) / square * x + c * k * (2.0 - k * x)

    expected = solve_ivp(slope, (0, 1), [-0.7], rtol=1e-10, atol=1e-12, max_step=0.01).y[0, -1]
    target, x = torch.full((1, 1, 1), 2.0, dtype=torch.float64), torch.full((1, 1, 1), -0.7, dtype=torch.float64)
    guided = GuidedVelocity(lambda x, t: mixture.velocity(PATH, x, t), target, torch.ones_like(target))
    assert integrate(guided, x, uniform_grid(200), "rk4").item() == pytest.approx(expected, abs=1e-5)


def test_an_entry_without_weight_is_moved_by_the_others_through_the_jacobian_only():
    """Of independent entries not at all: a padded dimension stays where the flow leaves it."""
    weights = torch.ones(SHAPE, dtype=torch.float64)
    weights[..., 1] = 0
    mean = torch.zeros(1, *SHAPE[1:], dtype=torch.float64)
    mixture = GaussianMixture(mean, torch.ones(1, dtype=torch.float64), 0.5)
    velocity = lambda x, t: mixture.velocity(PATH, x, t)  # noqa: E731
    x = normal(8)
    guided = integrate(GuidedVelocity(velocity, normal(9), weights), x, uniform_grid(10))
    free = integrate(velocity, x, uniform_grid(10))
    np.testing.assert_allclose(guided[..., 1], free[..., 1], atol=1e-12)
    assert (guided[..., 0] - free[..., 0]).abs().min() > 0


def test_shapes_bounds_and_flows_that_do_not_fit_are_refused(shapes_unchecked):
    with pytest.raises(FlowError, match="weights of a guided flow"):
        GuidedVelocity(oracle(), normal(1), torch.ones(3))
    with pytest.raises(FlowError, match="beta must be above 0"):
        GuidedVelocity(oracle(), normal(1), torch.ones(SHAPE), beta=0)
    with pytest.raises(FlowError, match="cond_ot"):
        refuse_guidance(FlowMatching.from_config(FlowConfig(path="vp")))
    refuse_guidance(FlowMatching.from_config(FlowConfig()))
