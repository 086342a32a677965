"""Tests of fault injection: kinds, times and costs of kills, comparison of weights; real kills: journeys/training/test_survival.py."""

import json
import os
import random
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import save_file

from pi0fm import options
from pi0fm.cluster import chaos
from pi0fm.cluster.chaos import HERE, ChaosConfig, Kill, end_worker, weight_difference
from pi0fm.cluster.training import worker_file
from pi0fm.cluster.training_run import TrainingRun
from pi0fm_client.errors import ClusterError, ConfigError


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"every": 0.0}, "chaos.every must be above 0, found 0"),
        ({"minutes": -1.0}, "chaos.minutes must be above 0, found -1"),
        ({"kinds": "worker, nodes"}, "did you mean 'node'"),
    ],
)
def test_what_cannot_be_is_refused(change, line):
    with pytest.raises(ConfigError) as caught:
        ChaosConfig(**change)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({"num_workers": 0}, "pi0fm chaos needs Ray workers"),
        ({"num_workers": 2, "checkpoint_dir": "/elsewhere"}, "leave it out"),
        ({"num_workers": 2, "ray_address": "auto"}, "on a joined cluster chaos.kinds must be worker and driver, found node"),
    ],
)
def test_a_run_that_it_cannot_disturb_is_refused_before_anything_starts(tmp_path, monkeypatch, run, line):
    monkeypatch.setattr(chaos, "LocalNodes", lambda *_: pytest.fail("started"))
    with pytest.raises(ConfigError, match=line):
        chaos.chaos(TrainingRun(output_dir=tmp_path / "new", **run), ChaosConfig(kinds="node"))
    assert not (tmp_path / "new").exists()


def test_the_commands_are_given_the_run_as_it_was_asked_for(tmp_path):
    run = TrainingRun(output_dir=tmp_path, num_workers="1..2", steps=70, model={"preset": "tiny"}, max_failures=9)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(chaos._for_command(run)))
    assert options.parse(TrainingRun, [str(file), "--output_dir", str(tmp_path)]) == run


def bundle(folder: Path, **tensors: torch.Tensor) -> Path:
    (folder / "bundle").mkdir(parents=True)
    save_file(tensors, folder / "bundle/model.safetensors")
    return folder


def test_the_difference_is_by_the_norm_of_all_weights(tmp_path):
    weights = {"a": torch.tensor([3.0, -4.0]), "b": torch.zeros(2)}
    one = bundle(tmp_path / "one", **weights)
    assert weight_difference(one, bundle(tmp_path / "same", **weights)) == 0
    near = bundle(tmp_path / "near", **weights | {"b": torch.tensor([0.0, 0.005])})
    assert weight_difference(near, one) == pytest.approx(1e-3)
    assert weight_difference(bundle(tmp_path / "nan", **weights | {"a": torch.tensor([3.0, torch.nan])}), one) == float("inf")


def test_the_figures_are_by_kind_and_those_of_kills_whose_cost_is_known():
    kills = [[Kill("worker", 5, 10.0, 3), Kill("node", 9, 20.0, 7)], [Kill("worker", 2, 14.04), Kill("driver", 8)]]
    found = chaos._figures(kills, 0.0)
    assert found["kills"] == {"worker": 2, "driver": 1, "node": 1, "drain": 0}
    assert (found["median_seconds"], found["most_seconds"]) == ({"worker": 12.0, "node": 20.0}, {"worker": 14.0, "node": 20.0})
    assert (found["most_steps_again"], found["rounds"], found["equal"]) == (7, 2, True)


class Command(chaos._Command):
    """A run whose metrics the test writes, and whose process ends when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.at, self.starts, self.ended = folder, (0, 1), 0, None

    def start(self) -> None:
        self.starts, self.ended = self.starts + 1, None

    def kill(self) -> None:
        self.ended = -9 if self.ended is None else self.ended

    def code(self) -> int | None:
        return self.ended

    def reached(self) -> tuple[int, int]:
        return self.at

    def last_line(self) -> str:
        return "pi0fm: some fault"


def disturbed(command: Command, kinds: tuple[str, ...], **change) -> chaos._DisturbedRun:
    return chaos._DisturbedRun(command, None, ChaosConfig(every=0.1, **change), kinds, random.Random(0), float("inf"))


def test_a_kill_is_measured_to_the_first_step_behind_the_checkpoint(tmp_path, monkeypatch):
    """Metrics stand at step 57 when the driver dies; the next one goes on from 50, in another file."""
    command = Command(tmp_path)
    course = iter([(57, 1)] * 6 + [(57, 1), (57, 1), (50, 2), (50, 2), (51, 2), (51, 2)])

    def look(_: float) -> None:
        command.at = next(course, (60, 2))
        if command.at[0] == 60:
            command.ended = 0

    monkeypatch.setattr(chaos.time, "sleep", look)
    monkeypatch.setattr(chaos.time, "monotonic", iter(range(1000)).__next__)
    kills = disturbed(command, ("driver",), kills=1).run()
    assert [(kill.kind, kill.step, kill.repeated_steps) for kill in kills] == [("driver", 57, 7)]
    assert kills[0].seconds > 0 and command.starts == 2


def test_a_run_that_ends_by_itself_with_a_fault_does_not_survive(tmp_path, monkeypatch):
    command = Command(tmp_path)
    monkeypatch.setattr(chaos.time, "sleep", lambda _: setattr(command, "ended", 1))
    with pytest.raises(ClusterError, match=r"must survive, found it ended after no kill: pi0fm: some fault"):
        disturbed(command, HERE).run()


def test_a_worker_is_told_from_a_process_that_was_given_its_number(tmp_path):
    with pytest.raises(ValueError, match="no worker of Ray has the process"):
        end_worker(os.getpid())
    with pytest.raises(ValueError, match="no worker of Ray"):
        end_worker(max(psutil.pids()) + 100_000)
    command = Command(tmp_path)
    path = worker_file(tmp_path, 0)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"process": os.getpid(), "node": "n"}))
    with pytest.raises(ValueError):
        disturbed(command, ("node",))._inject("node")  # no nodes of its own


def test_metrics_tell_how_far_and_which_start(tmp_path):
    command = chaos._Command(tmp_path / "config.yaml", tmp_path / "run", "127.0.0.1:1")
    assert command.reached() == (0, -1)
    path = tmp_path / "run/metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 3}\n{"step": 4}\n{"st')
    assert command.reached() == (4, path.stat().st_ino)
