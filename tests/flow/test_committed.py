"""Tests of committed rows: they are kept, the rest is sampled given them, and a robot's actions continue without a jump."""

import numpy as np
import pytest
import torch
from line_policy import SCALE, H, Lines, largest_step

from pi0fm.flow.checks import FlowError
from pi0fm.flow.committed import CommittedVelocity, held_rows, hold, row_times
from pi0fm.flow.config import SOLVERS, STOCHASTIC_SOLVERS, FlowConfig
from pi0fm.flow.guidance import GuidedVelocity, hold_weights
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import num_increments, sample
from pi0fm.flow.solver import integrate, uniform_grid

BOTH_WAYS, ONE_WAY = Lines((1.0, -1.0), 0.05), Lines((0.0,), 1.0)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampler(lines, way):
    def one(state, noise, remainder, delay):
        field = lines
        if len(remainder):
            target = (torch.from_numpy(remainder[np.minimum(np.arange(H), len(remainder) - 1)])[None, :, None] - state) / SCALE
            weights = hold_weights(H, delay, H - len(remainder))[None, :, None].double()
            field = {
                "free": lines,
                "guided": GuidedVelocity(lines, target, weights),
                "hard_prefix": CommittedVelocity(lines, target, held_rows(torch.tensor([delay]), H)),
            }[way]
        chunk = integrate(field, noise, uniform_grid(10))
        chunk = field.placed(chunk) if isinstance(field, CommittedVelocity) else chunk
        return chunk[0, :, 0].numpy() * SCALE + state

    return one


@pytest.mark.parametrize("delay", range(9))
@pytest.mark.parametrize("lines", [BOTH_WAYS, ONE_WAY], ids=["up or down", "any slope"])
def test_a_policy_of_lines_makes_no_jump_above_its_own_step_at_any_delay(lines, delay):
    """Without real-time chunking the lines of two seeds stand apart by the delay; guidance brings them nearer, held rows together."""
    own = largest_step(sampler(lines, "free"), 0)
    free, held = (largest_step(sampler(lines, way), delay) for way in ("free", "hard_prefix"))
    assert held <= own
    assert delay == 0 or free > 1.5 * own
    if lines is ONE_WAY and delay:
        assert largest_step(sampler(lines, "guided"), delay) < 0.85 * free


@pytest.mark.parametrize("solver", [*SOLVERS, *STOCHASTIC_SOLVERS])
def test_held_rows_come_back_exactly_by_every_solver_and_nothing_held_changes_nothing(shapes_unchecked, solver):
    change = {"path": "vp"} if solver == "ancestral" else {}
    flow = FlowMatching.from_config(FlowConfig(solver=solver, **change))
    noise, actions, increments = normal(0, 3, H, 1), normal(1, 3, H, 1), normal(2, max(1, num_increments(flow)), 3, H, 1)
    field = CommittedVelocity(BOTH_WAYS, actions, held_rows(torch.tensor([0, 2, 5]), H))
    found = field.placed(sample(flow, field, noise, increments=increments))
    assert torch.equal(found[1, :2], actions[1, :2]) and torch.equal(found[2, :5], actions[2, :5])
    # a row that is alone: an adaptive solver would choose steps for all three together
    none = CommittedVelocity(BOTH_WAYS, actions[:1], held_rows(torch.tensor([0]), H))
    alone, free = (sample(flow, each, noise[:1], increments=increments[:, :1]) for each in (none, BOTH_WAYS))
    assert torch.equal(none.placed(alone), free)


def test_free_rows_follow_the_distribution_given_the_held_ones():
    """One row says the slope's sign; two rows say the slope, whatever the noise."""
    noise = normal(3, 64, H, 1)
    steps = torch.arange(1, H + 1, dtype=torch.float64)
    for slope in (0.9, -1.05):
        actions = (slope * steps / SCALE)[None, :, None].expand(64, -1, -1)
        field = CommittedVelocity(BOTH_WAYS, actions, held_rows(torch.full((64,), 3), H))
        chunk = field.placed(integrate(field, noise, uniform_grid(50)))[..., 0] * SCALE
        torch.testing.assert_close(chunk, (slope * steps).expand(64, -1), rtol=0, atol=0.25)
        assert chunk[:, 3:].std(0).max() < 0.1


def test_a_training_pair_shows_held_rows_clean_and_counts_the_others():
    actions, x_t, t = normal(4, 2, 5, 3), normal(5, 2, 5, 3), torch.tensor([0.25, 0.5])
    held = held_rows(torch.tensor([0, 2]), 5)
    shown, mask = hold(held, actions, x_t, torch.ones(2, 5, 3, dtype=torch.bool))
    assert torch.equal(shown[0], x_t[0]) and torch.equal(shown[1, :2], actions[1, :2]) and torch.equal(shown[1, 2:], x_t[1, 2:])
    assert row_times(held, t).tolist() == [[0.25] * 5, [1.0, 1.0, 0.5, 0.5, 0.5]]
    assert mask.flatten(1).sum(1).tolist() == [15, 9]


def test_actions_of_another_shape_are_refused(shapes_unchecked):
    field = CommittedVelocity(BOTH_WAYS, normal(0, 1, H, 1), held_rows(torch.tensor([1]), H))
    with pytest.raises(FlowError, match="committed chunk"):
        field(normal(1, 2, H, 1), torch.zeros(2))
