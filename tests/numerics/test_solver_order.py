"""Test 2 of the mathematics: the slope of the global error is the order of the solver, on a non-linear field."""

import math

import pytest
import torch

from pi0fm.flow.solver import integrate, uniform_grid

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def logistic(x, t):
    """dx/dt = a(t) x (1 - x), a = 4 + 2 sin 5t: separable, so logit x(1) = logit x(0) + int a."""
    rate = 4 + 2 * torch.sin(5 * t)
    return rate.reshape(-1, 1) * x * (1 - x)


START = torch.tensor([[0.1, 0.5], [0.03, 0.9]], dtype=torch.float64)
TRUTH = torch.sigmoid(torch.logit(START) + 4 + 2 * (1 - math.cos(5)) / 5)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("graded", [False, True], ids=["uniform", "graded"])
def test_the_global_error_falls_with_the_order_of_the_solver(solver, graded):
    counts = [16, 32, 64, 128]
    errors = []
    for steps in counts:
        grid = [t**1.5 if graded else t for t in uniform_grid(steps)]
        errors.append(float((integrate(logistic, START, grid, solver) - TRUTH).abs().max()))
    logs = torch.log(torch.tensor(errors, dtype=torch.float64)), torch.log(torch.tensor(counts, dtype=torch.float64))
    centred = [each - each.mean() for each in logs]
    slope = -float((centred[0] * centred[1]).sum() / (centred[1] ** 2).sum())
    assert slope == pytest.approx(ORDERS[solver], abs=0.2), errors


def test_dopri5_keeps_its_tolerance():
    for tolerance in (1e-4, 1e-7, 1e-10):
        error = (integrate(logistic, START, [0.0, 1.0], "dopri5", tolerance) - TRUTH).abs().max()
        assert float(error) < 10 * tolerance
