"""Tests of two runs in one folder: the second is refused while the first lives, on any machine, but not after it died."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pi0fm.train.start import lease
from pi0fm.train.start.lease import NAME, hold_lease
from pi0fm_client.errors import OutputError

HOLD = """
import sys, time
from pathlib import Path
from pi0fm.train.start.lease import hold_lease
with hold_lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.2)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that knows none."""
    monkeypatch.setattr(lease.files, "try_lock", lambda descriptor: None)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("locks", [True, False])
def test_a_living_run_of_this_machine_is_named_and_a_killed_one_is_not_in_the_way(tmp_path, locks, request):
    if not locks:
        request.getfixturevalue("no_locks")
    first = holder(tmp_path / "run")
    words = rf"one run at a time may use {tmp_path}/run, found process {first.pid} on .* at work in it; end it, or choose another"
    with pytest.raises(OutputError, match=words), hold_lease(tmp_path / "run"):
        raise AssertionError("held twice")
    assert first.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / NAME).exists()
    began = time.monotonic()
    with hold_lease(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 2
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.usefixtures("fast")
def test_a_run_of_another_machine_is_told_by_its_beat(tmp_path, capsys):
    """Where locks do not reach: a lease that beats is refused, one that stopped is taken."""
    path, stop = tmp_path / NAME, threading.Event()

    def write(beat: int) -> None:
        path.write_text(json.dumps({"host": "elsewhere", "process": 4, "created": 1.0, "beat": beat}))

    def beating() -> None:
        for beat in range(1, 100):
            write(beat)
            if stop.wait(0.1):
                return

    write(0)
    thread = threading.Thread(target=beating)
    thread.start()
    try:
        with pytest.raises(OutputError, match="found process 4 on elsewhere"), hold_lease(tmp_path):
            raise AssertionError("held twice")
    finally:
        stop.set()
        thread.join()
    with hold_lease(tmp_path):
        assert json.loads(path.read_text())["host"] != "elsewhere"
    assert "waiting to see whether the run of elsewhere" in capsys.readouterr().err
    write(0)
    os.utime(path, (1.0, 1.0))
    with hold_lease(tmp_path):
        assert capsys.readouterr().err == "", "long dead: nobody waits"


@pytest.mark.usefixtures("fast")
def test_a_lease_beats(tmp_path):
    with hold_lease(tmp_path):
        deadline = time.monotonic() + 5
        while json.loads((tmp_path / NAME).read_text())["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_lease_that_is_no_json_is_a_dead_ones(tmp_path):
    (tmp_path / NAME).write_text("{")
    with hold_lease(tmp_path):
        pass
