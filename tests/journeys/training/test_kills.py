"""Tests that a run killed at random steps, or asked to stop, ends in the same weights as an undisturbed one.

process    SIGKILL at three random steps, SIGTERM at a fourth
driver     of Ray, SIGKILL; its worker dies with it
worker     of Ray, SIGKILL; Ray starts another, which goes on
two, four  workers under torchrun; one of two is killed, which ends the other; the same command is typed again, or torchrun starts both anew
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import recorded_curve as record
import tiny_dataset
import torch
import yaml
from safetensors.torch import load_file

from pi0fm.cli.main import main

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(900)]  # some fifteen starts of Python with torch

STEPS = 240
SECONDS = 240  # until a process has begun and got somewhere, on a machine that is busy
TORCHRUN = ("torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `config.yaml`, for a run of a few seconds with many checkpoints."""
    place = tmp_path_factory.mktemp("kills")
    root = tiny_dataset.written(tmp_path_factory)
    tree = record.options_of(root, place) | {"steps": STEPS, "checkpoint_every": 7, "keep_checkpoints": 2, "num_workers": 0}
    (place / "config.yaml").write_text(yaml.safe_dump({name: value for name, value in tree.items() if name != "output_dir"}))
    return place


@pytest.fixture(scope="module")
def quiet(folder: Path) -> Path:
    """The run that nobody disturbs."""
    assert main(["train", str(folder / "config.yaml"), "--output_dir", str(folder / "quiet")]) == 0
    return folder / "quiet"


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`started(RUN, "--option", "value")`: `pi0fm train` in a separate process, ended with all its children."""
    processes: list[subprocess.Popen[str]] = []

    def start(name: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        module = (*launcher, "-m", "pi0fm.cli.main") if launcher else ("pi0fm.cli.main",)
        command = [sys.executable, "-m", *module, "train", str(folder / "config.yaml")]
        command += ["--output_dir", str(folder / name), "--resume", "auto", *words]
        log = (folder / f"{name}.log").open("a")
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def last_step(run: Path) -> int:
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while last_step(run) < step:
        assert process.poll() is None, f"ended with {process.returncode} at step {last_step(run)}:\n{log(run)}"
        assert time.monotonic() < deadline, f"step {last_step(run)} of {step}:\n{log(run)}"
        time.sleep(0.005)


def ray_worker(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that trains, as soon as it is there."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    return child
        time.sleep(0.02)
    raise AssertionError("no worker began")


def log(run: Path) -> str:
    return run.with_suffix(".log").read_text()[-2000:]


def finish(run: Path, process: subprocess.Popen[str]) -> None:
    assert process.wait(timeout=SECONDS) == 0, log(run)


def assert_same(run: Path, expected: Path) -> None:
    """Every weight, bit by bit, and the curve."""
    ours, theirs = (load_file(place / "bundle/model.safetensors") for place in (run, expected))
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
    assert record.curve(run) == record.curve(expected)


def test_a_process_that_is_killed_at_random_steps(folder, quiet, started):
    chance = random.Random(5)
    for stretch in range(3):
        process = started("killed")
        wait_for(folder / "killed", chance.randrange(50 * stretch + 5, 50 * stretch + 45), process)
        process.kill()
        process.wait()
    process = started("killed")
    wait_for(folder / "killed", chance.randrange(155, 200), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=SECONDS) == 128 + signal.SIGTERM, log(folder / "killed")
    assert "pi0fm: stopped by SIGTERM" in log(folder / "killed")
    assert 155 <= last_step(folder / "killed") < STEPS
    finish(folder / "killed", started("killed"))
    assert (folder / "killed.log").read_text().count("resumed from step") == 4
    assert_same(folder / "killed", quiet)


def test_a_driver_of_ray_and_then_its_worker_are_killed(folder, quiet, started):
    run, ray = folder / "on-ray", ("--num_workers", "1", "--cpus_per_worker", "1")
    process = started("on-ray", *ray)
    wait_for(run, 10, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)
    reached = last_step(run)  # the worker went on until it noticed
    process = started("on-ray", *ray)
    worker = ray_worker(process)
    wait_for(run, reached + 5, process)
    worker.kill()
    finish(run, process)
    assert_same(run, quiet)


def test_one_of_two_workers_is_killed(folder, started):
    """The same topology, so bit by bit; against a run of two that nobody disturbs. `--max-restarts 1`: torchrun types no command again."""
    two = (*TORCHRUN, "--nproc-per-node", "2")
    finish(folder / "two-quiet", started("two-quiet", launcher=two))
    for name, launcher in {"two": two, "two-restarted": (*two, "--max-restarts", "1")}.items():
        process = started(name, launcher=launcher)
        wait_for(folder / name, 60, process)
        workers = [child for child in psutil.Process(process.pid).children() if "pi0fm.cli.main" in child.cmdline()]
        assert len(workers) == 2
        workers[1].kill()
        if launcher == two:
            assert process.wait(timeout=SECONDS) != 0
            process = started(name, launcher=two)
        finish(folder / name, process)
        assert (folder / f"{name}.log").read_text().count("resumed from step") == 1
        assert_same(folder / name, folder / "two-quiet")


def test_four_workers_give_the_recorded_curve(folder, started):
    four = (*TORCHRUN, "--nproc-per-node", "4")
    words = ("--steps", str(record.OPTIONS["steps"]), "--micro_batch_size", "1")
    finish(folder / "four", started("four", *words, launcher=four))
    record.assert_same(record.curve(folder / "four"), record.recorded())
