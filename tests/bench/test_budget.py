"""The budget: at most one step over, calibration not charged, whoever trains."""

import dataclasses
import itertools
import math

import pytest

from pi0fm.bench import budget
from pi0fm.bench.budget import TrainingPlan, spend, steps_in_budget
from pi0fm_client.errors import ConfigError


@pytest.fixture
def clock(monkeypatch):
    """`clock(0.5)`: every reading of the processor's time is half a second after the one before."""

    def tick(seconds: float) -> None:
        readings = itertools.count(7.0, seconds)
        monkeypatch.setattr(budget, "cpu_seconds_of_tree", lambda: next(readings))

    return tick


def test_budget_ends_the_run_with_the_step_that_passes_it(clock):
    clock(0.5)
    result = spend("side", lambda step: (float(step), 4), TrainingPlan(cpu_seconds=3.2), 13)
    assert (result.steps, result.samples, result.scheduled_steps) == (7, 28, 13)
    assert result.cpu_seconds == 3.5
    assert result.losses == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert result.spent == (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)


def test_a_budget_of_less_than_a_step_pays_for_one(clock):
    clock(0.5)
    assert spend("side", lambda _: (0.0, 1), TrainingPlan(cpu_seconds=0.1), 1).steps == 1


def test_steps_end_a_run_before_its_budget(clock):
    clock(0.5)
    assert spend("side", lambda _: (0.0, 1), TrainingPlan(cpu_seconds=600, max_steps=3), 3).spent == (0.5, 1.0, 1.5)


def test_steps_alone_end_a_run_and_are_what_its_progress_counts(clock, capsys):
    clock(1000.0)
    plan = TrainingPlan(cpu_seconds=math.inf, max_steps=3)
    assert spend("side", lambda _: (0.0, 1), plan, 3).spent == (1000.0, 2000.0, 3000.0)
    assert "side, steps 3/3" in capsys.readouterr().err


def test_calibration_leaves_out_the_first_step(monkeypatch):
    """The first step costs 9 s, the others a quarter of one: 3.2 s hold 12.8 of those."""
    now = [0.0]
    monkeypatch.setattr(budget, "cpu_seconds_of_tree", lambda: now[0])
    steps = []

    def update(step: int) -> tuple[float, int]:
        steps.append(step)
        now[0] += 0.25 if step else 9.0
        return 0.0, 1

    assert steps_in_budget(update, TrainingPlan(cpu_seconds=3.2, calibration_steps=2)) == 13
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("wrong", [{"cpu_seconds": 0.0}, {"cpu_seconds": math.inf}, {"calibration_steps": 0}, {"max_steps": 0}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be"):
        dataclasses.replace(TrainingPlan(cpu_seconds=1.0), **wrong)
