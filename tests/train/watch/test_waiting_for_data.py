"""Tests of a run that waits for data: reported in a line and in its metrics, with the test's clock."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.watch import log as train_log
from pi0fm.train.watch.metrics import MetricsWriter, read_last
from pi0fm.train.watch.stragglers import ForwardTimer


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(train_log, "time", clock)
    return clock


def take_steps(clock, config, loading: float, steps: int = 6, training: float = 3.0) -> None:
    """Each batch takes `loading` seconds to come, each step `training` more."""
    config.output_dir.mkdir()
    metrics = MetricsWriter(config.output_dir, 0)

    def batches():
        for _ in range(steps):
            clock.now += loading
            yield SimpleNamespace()

    own = ForwardTimer(nn.Identity(), torch.device("cpu"), whole=True)
    log = train_log.TrainLog(config.log(), Parallel(Context(shown=False)), metrics, own, ["here"], 0)
    given = log.timed(batches())
    for step in range(1, steps + 1):
        next(given)
        clock.now += training
        log.after_step(step, torch.tensor(1.0), torch.tensor(1.0), 1e-3)
    assert next(given, None) is None
    metrics.close()


@pytest.mark.parametrize(("loading", "share"), [(1.0, 25), (3.0, 50)])
def test_a_fifth_of_the_time_is_too_much(run, clock, capsys, loading, share):
    config = run("slow", log_every=2, steps=6)
    take_steps(clock, config, loading)
    said = capsys.readouterr().err.splitlines()
    # not of the first line's steps: filling a loader always takes a while
    assert said == [f"step {step}: {share} % of the time went on waiting for data" for step in (4, 6)]
    assert read_last(config.output_dir)["waiting_for_data"] == pytest.approx(share / 100)


def test_a_loader_that_keeps_up_is_not_mentioned(run, clock, capsys):
    config = run("quick", log_every=2, steps=6)
    take_steps(clock, config, 0.5)
    assert capsys.readouterr().err == ""
    assert read_last(config.output_dir)["waiting_for_data"] == pytest.approx(0.5 / 3.5)


def test_a_line_says_speed_time_left_memory_and_share_of_the_peak(run, clock, monkeypatch):
    config = run("shared", log_every=2, steps=6)
    monkeypatch.setattr(
        type(config), "log", lambda config: train_log.LogConfig(config.log_every, config.steps, config.global_batch_size, 8.0)
    )
    take_steps(clock, config, loading=1.0, steps=4)
    line = read_last(config.output_dir)
    assert (line["step"], line["samples_per_second"], line["share_of_peak"], line["seconds_left"]) == (4, 2.0, 0.25, 8.0)
    assert line["memory_gib"] > 0.1
    told = train_log.format_progress(line | {"loss": 0.5, "memory_gib": 1.0})
    assert told == "loss 0.5000, 2.0 samples/s, 25% of the peak, 1.0 GiB"
    assert train_log.format_progress({"loss": 0.5}) == "loss 0.5000"
    assert train_log.format_progress({"loss": float("nan")}) == train_log.format_progress({}) == "", "nothing before the first line"
