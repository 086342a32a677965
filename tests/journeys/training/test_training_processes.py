"""Tests that two gloo processes under torchrun train as one process does, and continue each other's checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_dataset
import yaml

from pi0fm.cli.main import main

pytestmark = pytest.mark.journey


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_two_processes(*arguments: str) -> None:
    """`pi0fm train` under torchrun."""
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    command = [sys.executable, "-m", *launcher, "-m", "pi0fm.cli.main", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = done.stdout.splitlines()  # one result, however many processes
    assert json.loads(line)["steps"] == 8


def assert_same_curve(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_two_processes_train_as_one(tmp_path, tmp_path_factory):
    tree = {
        "steps": 8,
        "global_batch_size": 8,
        "dataset": {"root": str(tiny_dataset.written(tmp_path_factory)), "cache_dir": str(tmp_path / "cache"), "video_decoder": "pyav"},
        "embodiment": {"cameras": {"base": "observation.images.base"}},
        "model": tiny_dataset.NETWORK,
        "precision": "float32",
        "execution_horizon": 2,
        "num_workers": 0,
        "threads": 1,
        "log_every": 1,
        "checkpoint_every": 4,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    alone, both = ([str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / name)] for name in ("alone", "both"))
    assert main(["train", *alone]) == 0
    expected = curve(tmp_path / "alone")
    in_two_processes(*both)
    assert_same_curve(curve(tmp_path / "both"), expected)
    # What two processes left at step 4 is finished by one, with two micro batches.
    (tmp_path / "both/checkpoints/step-000000008/COMMIT").unlink()
    assert main(["train", *both, "--resume", "true", "--micro_batch_size", "4"]) == 0
    assert_same_curve(curve(tmp_path / "both"), expected)
