"""Tests of the start of a run: a stop leaves one line and does not block the next start; two runs, and torchrun's agent."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pi0fm import options
from pi0fm.cli.main import main
from pi0fm.cluster import training
from pi0fm.train import loop
from pi0fm.train.start.lease import hold_lease


@pytest.fixture
def file(run, tmp_path):
    """A configuration of three steps."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options.encode(run("run", steps=3)) | {"num_workers": 0}))
    return path


def test_sigterm_before_the_first_step_is_a_line_and_leaves_nothing(file, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["train", str(file)]) == 143
    said = capsys.readouterr().err
    assert "pi0fm: stopped by SIGTERM before the first step: nothing was trained; type the same command again" in said
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["train", str(file)]) == 0


def test_sigterm_while_ray_starts_is_the_same_line(file, tmp_path, monkeypatch, capsys):
    """Ray replaces the handler in its own start."""

    @contextmanager
    def session(address, ship_code):
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGTERM, before)

    monkeypatch.setattr(training, "ray_session", session)
    monkeypatch.setattr(training, "_on_ray", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", str(file), "--num_workers", "1"]) == 143
    assert "pi0fm: stopped by SIGTERM before the first step" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_start_that_was_killed_is_not_in_the_way_of_a_corrected_one(file, tmp_path):
    """SIGKILL while the data set is opened: run.json stays."""
    program = """
import os, signal, sys
from pi0fm.cli.main import main
from pi0fm.train import loop
loop.open_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["train", sys.argv[1]])
"""
    assert subprocess.run([sys.executable, "-c", program, str(file)], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "run/run.json").exists()
    assert main(["train", str(file), "--seed", "4"]) == 0


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(file, tmp_path, capsys):
    with hold_lease(tmp_path / "run"):
        assert main(["train", str(file)]) == 1
        assert "one run at a time may use" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".running"]
    assert main(["train", str(file)]) == 0


def test_a_worker_ends_with_torchruns_agent(tmp_path):
    """An agent that is killed cannot end its workers."""
    worker = """
import pathlib, sys, time
from pi0fm.cluster import training
training.train = lambda context, run: (pathlib.Path(sys.argv[1], "pid").write_text(str(__import__("os").getpid())), time.sleep(60))
training._in_this_process(training.TrainingRun(num_workers=0))
"""
    agent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "2"}
    process = subprocess.Popen([sys.executable, "-c", agent, worker, str(tmp_path)], env=environment)
    pid = _written(tmp_path / "pid", seconds=60)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while _lives(pid):
        assert time.monotonic() < deadline, "the worker trains on without its agent"
        time.sleep(0.05)


def _written(path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_line_after_sigterm_outside_a_step_names_the_checkpoints(run, tmp_path):
    config = training.TrainingRun(output_dir=tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert f"the newest checkpoint in {tmp_path}/checkpoints stays: add --resume true" in training._unfinished(config)
