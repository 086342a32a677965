"""Tests of the end of a run on Ray: Ctrl-C saves as SIGTERM does, a user's fault is reported once, a failure of Ray is one line."""

import os
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
import yaml

from pi0fm.train.checkpoint.storage import whole
from pi0fm.train.watch.metrics import read_last

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(600)]

SECONDS = 240  # until a run has begun, on a machine that is busy


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of minutes on one worker of Ray."""
    folder = tmp_path_factory.mktemp("ends")
    tree = record.options_of(tiny_dataset.written(tmp_path_factory), folder) | {"steps": 100_000, "checkpoint_every": 1000}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"num_workers": 1, "cpus_per_worker": 1}))
    return folder / "config.yaml"


@pytest.fixture
def started(config: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`started(run, "--option", "value")`: the command in a separate process group, as a terminal starts it."""
    processes: list[subprocess.Popen[str]] = []

    def start(run: Path, *words: str) -> subprocess.Popen[str]:
        log = run.with_suffix(".log").open("w")
        command = [sys.executable, "-m", "pi0fm.cli.main", "train", str(config), "--output_dir", str(run), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while int((read_last(run) or {}).get("step", 0)) < 5:
        assert process.poll() is None, log(run)
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.1)


def log(run: Path) -> str:
    return run.with_suffix(".log").read_text()


def last_line(run: Path) -> str:
    assert "Traceback" not in log(run), log(run)
    return log(run).splitlines()[-1]


def test_ctrl_c_saves_and_then_ray_itself_is_killed(tmp_path, started):
    run = tmp_path / "run"
    process = started(run)
    wait_for_steps(run, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, log(run)
    assert last_line(run) == f"pi0fm: stopped by Ctrl-C, with a checkpoint in {run}/checkpoints; add --resume true to go on"
    assert len(whole(run / "checkpoints")) == 1

    process = started(run, "--resume", "true")
    before = int((read_last(run) or {})["step"])
    deadline = time.monotonic() + SECONDS
    while int((read_last(run) or {}).get("step", 0)) < before + 5:
        assert process.poll() is None, log(run)
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.1)
    [raylet] = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "raylet"]
    raylet.kill()
    assert process.wait(timeout=60) == 1, log(run)
    assert last_line(run).startswith("pi0fm: Ray must live as long as the run, found ")
    assert last_line(run).endswith("; type the same command with --resume true")


def test_a_fault_that_no_restart_can_mend_is_said_once_and_leaves_nothing(tmp_path, started):
    run = tmp_path / "run"
    process = started(run, "--pretrained", str(tmp_path / "nowhere"))
    assert process.wait(timeout=SECONDS) == 1, log(run)
    assert last_line(run).startswith(f"pi0fm: no bundle at {tmp_path}/nowhere")
    assert log(run).count("starting 1 Ray training worker") == 1
    assert not run.exists()


def test_what_a_worker_says_is_said_by_the_driver(tmp_path, started):
    """Ray shows nothing of its workers: a checkpoint that found no room would be missed only at the resume."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk")
    try:
        run = tmp_path / "run"
        process = started(run, "--checkpoint_every", "3", "--keep_checkpoints", "9", "--checkpoint_dir", str(disk / "checkpoints"))
        deadline = time.monotonic() + SECONDS
        while "could not be written" not in log(run):
            assert process.poll() is None, log(run)
            assert time.monotonic() < deadline, log(run)
            time.sleep(0.5)
    finally:
        process.kill()
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
