"""Tests of a worker that all others wait for: judged by its time, reported with its node, and not at each line."""

import time
from dataclasses import replace

import pytest
import torch
from forked_workers import workers
from torch import nn

from pi0fm import progress
from pi0fm.models.pi0 import Pi0
from pi0fm.train.loop import train
from pi0fm.train.parallel.context import Context
from pi0fm.train.start.output import claim
from pi0fm.train.watch import stragglers
from pi0fm.train.watch.stragglers import SECONDS_COMPARED, TIMES_BETWEEN, ForwardTimer, Stragglers


class Slow(nn.Module):
    def forward(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_own_time_is_that_of_forward_passes_in_training():
    network = Slow()
    own = ForwardTimer(network, torch.device("cpu"), whole=True)
    network(0.02)
    network(0.02)
    network.eval()
    network(0.05)
    assert 0.04 <= own.take() < 0.085
    assert own.take() == 0
    cut = ForwardTimer(other := Slow(), torch.device("cpu"), whole=False)
    other(0.01)
    assert cut.take() == 0


def judged(lines: list[list[float]], elapsed: float = SECONDS_COMPARED) -> list[str]:
    said: list[str] = []
    judge = Stragglers(["a", "b", "c"], said.append)
    for step, own in enumerate(lines):
        judge.after_line(step, own, elapsed)
    return said


def test_a_worker_that_is_slow_twice_in_a_row_is_named_with_its_node_once():
    slow = [2.0, 6.0, 2.2]
    assert judged([slow]) == []
    [line] = judged([slow] * TIMES_BETWEEN)
    assert line == (
        "step 1: worker 1 on b is slow: data and forward passes take it 2.9 times the median of the others, who wait for it 39 % of the "
        "time; look at that node"
    )
    assert len(judged([slow] * (TIMES_BETWEEN + 2))) == 2
    assert judged([slow, [6.0, 2.0, 2.0], slow, [2.0, 2.0, 2.0], slow]) == []  # by turns


def test_what_costs_nobody_time_is_not_said():
    assert judged([[2.0, 2.9, 2.0]] * 9) == []  # less than half as much again
    assert judged([[0.1, 0.9, 0.1]] * 9) == []  # of ten seconds
    assert judged([[0.2, 0.6, 0.2]] * 9, elapsed=1.0) == []  # nine lines are one stretch of ten seconds


def test_the_figure_of_each_line_is_the_slowest_by_the_median_of_the_others():
    judge = Stragglers(["a", "b", "c"], print)
    assert judge.after_line(1, [1.0, 3.0, 2.0], 1.0) == pytest.approx(2.0)
    assert judge.after_line(1, [0.0, 0.0, 0.0], 1.0) == 1.0


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_run_names_its_slow_worker_with_its_node(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stragglers, "SECONDS_COMPARED", 0.0)
    config = run("run", steps=6, checkpoint_every=100)
    claim(config)

    def body(context: Context) -> list[str]:
        real = Pi0.forward

        def forward(*arguments):
            time.sleep(0.2 if context.rank == 1 else 0.0)  # as on a machine that is busy with something else
            return real(*arguments)

        monkeypatch.setattr(Pi0, "forward", forward)
        said: list[str] = []
        with progress.passed_to(said.append):
            train(replace(context, node=f"node-{context.rank}"), config)
        return said

    first, second = workers(2, tmp_path, body)
    [line] = [line for line in first if " is slow: " in line]
    assert "worker 1 on node-1 is slow: data and forward passes take it " in line
    assert not any(" is slow: " in line for line in second)
