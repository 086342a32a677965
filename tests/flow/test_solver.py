import math

import pytest
import torch

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import FIXED_GRID_SOLVERS, SOLVERS
from pi0fm.flow.solver import CountedVelocity, integrate, num_evaluations, uniform_grid
from pi0fm_client.errors import ConfigError


def decay(x, t):
    return -x * (1 + t.reshape(-1, 1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_flow_reaches_its_closed_form(solver):
    """dx/dt = -(1 + t) x has x(1) = x(0) exp(-3/2)."""
    steps = 1000 if solver == "euler" else 100
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    found = integrate(decay, x, uniform_grid(steps), solver, tolerance=1e-9)
    torch.testing.assert_close(found, x * math.exp(-1.5), rtol=2e-3 if solver == "euler" else 1e-4, atol=0)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4", "dopri5"])
def test_a_decreasing_grid_returns_to_the_start(solver):
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    grid = [0.0, 0.03, 0.1, *[0.1 + 0.9 * k / 200 for k in range(1, 201)]]
    there = integrate(decay, x, grid, solver, tolerance=1e-10)
    back = integrate(decay, there, grid[::-1], solver, tolerance=1e-10)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_field_never_sees_a_time_outside_the_grid_and_the_count_is_right(solver):
    seen = []

    def field(x, t):
        assert t.shape == (3,)
        assert t.dtype == x.dtype
        seen.append(float(t[0]))
        return -x

    counted = CountedVelocity(field)
    integrate(counted, torch.ones(3, 2), uniform_grid(7, 0.1, 0.9), solver)
    assert min(seen) >= 0.1 - 1e-6
    assert max(seen) <= 0.9 + 1e-6
    assert counted.num_evaluations == len(seen)
    if solver in FIXED_GRID_SOLVERS:
        assert counted.num_evaluations == num_evaluations(solver, 7)
    else:
        with pytest.raises(ConfigError, match="CountedVelocity"):
            num_evaluations(solver, 7)


def test_a_step_of_each_solver_is_its_textbook_tableau():
    """One step of dx/dt = x from 1 over dt = 1 gives the truncated exponential series."""
    x = torch.ones(1, 1, dtype=torch.float64)
    found = {solver: float(integrate(lambda x, t: x, x, [0.0, 1.0], solver)) for solver in FIXED_GRID_SOLVERS}
    assert found == pytest.approx({"euler": 2, "midpoint": 2.5, "heun": 2.5, "rk4": 65 / 24})
    # A field of time alone tells midpoint, Heun and RK4 apart: they are the rectangle, trapezium and Simpson rules.
    found = {solver: float(integrate(lambda x, t: (t**4)[:, None], 0 * x, [0.0, 1.0], solver)) for solver in FIXED_GRID_SOLVERS}
    assert found == pytest.approx({"euler": 0, "midpoint": 1 / 16, "heun": 1 / 2, "rk4": (4 / 16 + 1) / 6})


def test_bfloat16_states_are_integrated_in_float32():
    found = integrate(lambda x, t: torch.ones_like(x), torch.zeros(1, 1, dtype=torch.bfloat16), uniform_grid(1000))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1, abs=1e-4)


def test_the_grid_ends_exactly():
    assert uniform_grid(3)[0] == 0
    assert uniform_grid(3)[-1] == 1
    assert len(uniform_grid(49)) == 50


@pytest.mark.parametrize(
    ("times", "rule"),
    [
        ([0.0], "at least two times"),
        ([0.0, 0.5, 0.5, 1.0], "strictly increase"),
        ([0.0, 0.7, 0.5], "strictly increase"),
        ([0.0, 1.2], r"\[0, 1\].*1.2"),
        ([0.0, math.nan], r"\[0, 1\]"),
    ],
)
def test_bad_grids_are_refused(times, rule):
    with pytest.raises(FlowError, match=rule):
        integrate(decay, torch.ones(1, 1), times)


def test_unknown_solvers_and_fields_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match=r"unknown solver 'rk5': did you mean.*dopri5, euler, heun, midpoint, rk4"):
        integrate(decay, torch.ones(1, 1), [0.0, 1.0], "rk5")
    with pytest.raises(FlowError, match=r"velocity must have the state's shape \[2, 1\], found \[1\]"):
        integrate(lambda x, t: x[0], torch.ones(2, 1), [0.0, 1.0])
    with pytest.raises(ConfigError, match="at least 1 step"):
        uniform_grid(0)
