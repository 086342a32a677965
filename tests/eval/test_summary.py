"""Tests of counts, and of crashes, which no rate includes."""

import pytest

from pi0fm.eval.rollouts.episode import EpisodeResult
from pi0fm.eval.statistics import mean_over_tasks, wilson
from pi0fm.eval.summary import summarize


def results(task, word):
    names = {"s": "success", "f": "failure", "c": "crash"}
    return [EpisodeResult(task, seed, names[letter], 10 + seed, 0.1) for seed, letter in enumerate(word)]


def test_crashes_are_not_in_the_denominator_and_are_said_aloud():
    summary = summarize(results("a", "ssfc") + results("b", "ssss"), ("a", "b"))
    first, second = summary.tasks
    assert (first.successes, first.trials, first.crashes, first.interval) == (2, 3, 1, wilson(2, 3))
    assert first.mean_steps == 10.5
    assert summary.mean == mean_over_tasks([(2, 3), (4, 4)])
    assert summary.warnings() == ["a: 1 of 4 episodes crashed and are not in its success rate"]
    assert second.interval is not None
    json = summary.json()
    assert json["success"] == {"a": pytest.approx(2 / 3, abs=1e-6), "b": 1.0}
    assert (json["crashes"], json["episodes"], json["interval"]["b"]) == (1, 8, [pytest.approx(second.interval.low, abs=1e-6), 1.0])


def test_a_task_that_only_crashed_makes_the_mean_unknown():
    summary = summarize(results("a", "cc") + results("b", "ss"), ("a", "b"))
    assert summary.mean is None and summary.json()["mean_success"] is None
    assert summary.json()["success"] == {"a": None, "b": 1.0}
    assert "not known" in summary.warnings()[0]


def test_without_crashes_nothing_is_said_and_without_results_it_is_an_error():
    assert summarize(results("a", "sf"), ("a",)).warnings() == []
    with pytest.raises(ValueError, match="no result for the task b"):
        summarize(results("a", "sf"), ("a", "b"))
