"""Tests of the figures of `pi0fm bench scaling` from simulated runs; the bytes are measured."""

import json
import subprocess

import pytest

from pi0fm.bench import scaling
from pi0fm.bench.config import ScalingOptions
from pi0fm.bench.scaling import held_bytes
from pi0fm_client.errors import ConfigError, Pi0fmError


def test_the_figures_come_from_pairs_of_runs(monkeypatch):
    speeds = {"ray-0": 88.0, "torchrun-0": 100.0, "ray-1": 97.0, "torchrun-1": 98.0, "ray-2": 99.0, "torchrun-2": 100.0}
    monkeypatch.setattr(scaling, "write_dataset", lambda *_: None)
    monkeypatch.setattr(scaling, "_start_and_speed", lambda folder, name, words, launcher=(): (20.0 + len(launcher), speeds.get(name, 1.0)))
    told = {"worker": {"median_seconds": {"worker": 17.0}, "most_steps_again": 30}, "node": {"median_seconds": {"node": 25.0}}}
    told["node"]["most_steps_again"] = 41
    monkeypatch.setattr(scaling, "_chaos_figures", lambda folder, kind, workers, options: told[kind])
    monkeypatch.setattr(scaling, "held_bytes", lambda workers: [100] if workers == 1 else [25, 26, 25, 25])
    figures = scaling.measure(ScalingOptions()).figures
    asked = ("ray_of_torchrun", "kill_seconds", "shrink_seconds", "first_step_seconds", "shard_bytes_ratio")
    assert [figures[name] for name in asked] == [97 / 98, 17.0, 25.0, 20.0, 0.26]
    assert figures["steps_per_second"] == {"ray": 97 / 16, "torchrun": 100 / 16}
    assert figures["steps_again"] == {"worker": 30, "node": 41}


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: none\n")
    with pytest.raises(Pi0fmError, match=r"must end by itself, found: pi0fm: option steps must be a whole number"):
        scaling._start_and_speed(tmp_path, "run", ())


def test_a_disturbed_run_that_ended_before_is_told(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 0, json.dumps({"median_seconds": {}, "most_steps_again": 0}).encode())
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(Pi0fmError, match="type --disturbed_steps 1200"):
        scaling._chaos_figures(tmp_path, "worker", "2", ScalingOptions())


@pytest.mark.parametrize("change", [{"rounds": 0}, {"steps": 5}, {"disturbed_steps": 10}, {"batch_size": 1}])
def test_too_little_is_refused(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
        ScalingOptions(**change)


@pytest.mark.long
def test_four_workers_hold_a_quarter_each():
    assert max(held_bytes(4)) / max(held_bytes(1)) <= 0.30
