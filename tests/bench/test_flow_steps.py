"""The table of errors against fields whose flow is known: orders, counts, masks, and what counts as cheapest."""

import math
from dataclasses import replace

import pytest
import torch

from pi0fm.bench import flow_steps
from pi0fm.bench.flow_steps import Row, Setting, cheapest, errors, find_reference, measure, observed_order, settings
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.flow.oracle import GaussianMixture

FLOW = FlowMatching.from_config(FlowConfig())
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@pytest.fixture(autouse=True)
def fast(shapes_unchecked):
    """Thousands of evaluations."""


def chunks(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIXTURE = GaussianMixture(chunks(3, 4, 2, seed=1), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 1.0)
NOISE = chunks(5, 4, 2)
EVERYTHING = torch.ones_like(NOISE, dtype=torch.bool)


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return MIXTURE.velocity(FLOW.path, x, t)


def row(solver: str, evaluations: int, rms: float, tolerance: float | None = None) -> Row:
    return Row(Setting(solver, evaluations, tolerance), evaluations, rms, 2 * rms, (rms, 3 * rms))


def test_the_slopes_of_the_table_are_the_orders_of_the_solvers():
    reference = find_reference(FLOW, velocity, NOISE, EVERYTHING, 96)
    assert 0 < reference.rms < 1e-7
    rows = measure(FLOW, velocity, NOISE, EVERYTHING, reference, settings((16, 32, 64), (1e-3, 1e-6), 10), lambda x: x)
    for solver, order in ORDERS.items():
        assert observed_order(rows, solver, reference.rms) == pytest.approx(order, abs=0.2)
    assert observed_order(rows, "dopri5", reference.rms) is None
    coarse, fine = (found for found in rows if found.setting.solver == "dopri5")
    assert fine.rms < 1e-5 < coarse.rms < 5e-2
    assert coarse.evaluations < fine.evaluations


def test_the_reference_is_the_flow_of_a_gaussian():
    """x_1 = m + s x_0: for one component the flow is known in closed form."""
    mean, scale = chunks(1, 4, 2, seed=2), 0.6
    gaussian = GaussianMixture(mean, torch.ones(1, dtype=torch.float64), scale)
    found = find_reference(FLOW, lambda x, t: gaussian.velocity(FLOW.path, x, t), NOISE, EVERYTHING, 64)
    torch.testing.assert_close(found.actions, mean + scale * NOISE, rtol=0, atol=1e-6)


def test_every_budget_is_spent_exactly_and_counted():
    compared = settings((4, 6, 3, 4), (1e-2,), 7)
    assert [(one.solver, one.num_flow_steps) for one in compared] == [
        *(("euler", 3), ("euler", 4), ("euler", 6)),
        *(("midpoint", 2), ("midpoint", 3), ("heun", 2), ("heun", 3), ("rk4", 1), ("dopri5", 7)),
    ]
    reference = find_reference(FLOW, velocity, NOISE, EVERYTHING, 32)
    told: list[int] = []
    rows = measure(FLOW, velocity, NOISE, EVERYTHING, reference, compared, lambda x: x, told.append)
    assert [found.evaluations for found in rows[:-1]] == [one.expected_evaluations for one in compared[:-1]] == [3, 4, 6, 4, 6, 4, 6, 4]
    assert rows[-1].evaluations > 6
    assert sum(told) == sum(one.expected_evaluations for one in compared)


def test_errors_in_both_units_and_only_over_real_entries():
    """A field of 1 in every entry, and a reference that is off by a known amount."""
    mask = EVERYTHING.clone()
    mask[:, :, 1] = False
    exact = find_reference(FLOW, lambda x, t: torch.ones_like(x), NOISE, mask, 2)
    off = torch.zeros_like(NOISE)
    off[0, 0, 0], off[:, :, 1] = 0.3, 99.0
    (found,) = measure(
        FLOW,
        lambda x, t: torch.ones_like(x),
        NOISE,
        mask,
        replace(exact, actions=exact.actions + off),
        [Setting("euler", 1)],
        lambda x: 10 * x[..., :1],
    )
    assert found.largest == pytest.approx(0.3)
    assert found.rms == pytest.approx(0.3 / math.sqrt(20))
    assert found.robot_rms == pytest.approx((1.5, 0, 0, 0, 0), abs=1e-9)
    assert found.mean_robot_rms == pytest.approx(0.3)


def test_the_cheapest_reaches_the_tolerance_and_stays_there():
    rows = [
        *(row("euler", 2, 0.01), row("euler", 4, 0.5), row("euler", 8, 0.04), row("euler", 16, 0.02)),
        *(row("heun", 4, 0.2), row("heun", 8, 0.03)),
        *(row("rk4", 4, 0.9), row("rk4", 8, 0.9)),
        *(row("dopri5", 3, 0.001, tolerance=0.1), row("dopri5", 30, 1e-6, tolerance=1e-5)),
    ]
    found = cheapest(rows, 0.05, own_tolerance=1e-5)
    assert list(found) == ["heun", "euler", "dopri5"], "fewest evaluations first, then the smallest error; rk4 never gets there"
    assert (found["euler"].evaluations, found["heun"].evaluations, found["dopri5"].evaluations) == (8, 8, 30)
    assert cheapest(rows, 1e-9, own_tolerance=1e-5) == {}
    assert cheapest([row("euler", 4, math.nan)], 0.05, 1e-5) == {}


def test_the_order_is_not_read_off_rounding():
    rows = [row("heun", 2**k, max(4.0**-k, 1e-3)) for k in range(1, 12)]
    assert observed_order(rows, "heun", floor=1e-3) == pytest.approx(2)
    assert observed_order(rows, "heun", floor=0.1) is None


def test_errors_for_json():
    rows = [row("euler", 10, 0.5), row("euler", 20, 0.25), row("dopri5", 33, 0.1, tolerance=0.1)]
    assert errors(rows) == {"euler": {"10": 0.5, "20": 0.25}, "dopri5": {"33": 0.1}}


def test_a_guess_stands_for_what_an_adaptive_solver_will_need():
    assert Setting("dopri5", 10, 1e-3).expected_evaluations == flow_steps.GUESSED_EVALUATIONS
