"""Tests of functions in a separate process, of children that end with their parent, and of the use of a process tree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pi0fm import processes
from pi0fm.processes import PeakMemory, in_fresh_process, memory_of_tree, peak_resident
from pi0fm_client.errors import ConfigError, Pi0fmError

LARGE = 300 * 2**20


def refuse(text: str) -> None:
    raise ConfigError(text)


def peaks() -> tuple[int, int, int]:
    """Process, peak at the start, peak after something large was there and went."""
    before = peak_resident()
    large = bytearray(b"x") * LARGE
    del large
    return os.getpid(), before, peak_resident()


def write_pid_and_work(path: str) -> None:
    """A computation that never waits, as a training does."""
    Path(path).write_text(str(os.getpid()))
    while True:
        sum(range(1000))


def test_the_peak_is_that_of_the_new_process_and_remembers_what_was_freed():
    held = bytearray(b"x") * LARGE  # what this process holds is not the new one's
    process, before, after = in_fresh_process(peaks)
    assert process != os.getpid()
    assert before < LARGE
    assert 0.99 * LARGE < after - before < 1.1 * LARGE  # the kernel counts pages in lots
    assert len(held) == LARGE


def test_an_error_keeps_its_class_and_line():
    with pytest.raises(ConfigError, match="found 7"):
        in_fresh_process(refuse, "found 7")


def test_a_process_that_dies_is_one_line():
    with pytest.raises(Pi0fmError, match="must end by itself"):
        in_fresh_process(os._exit, 9)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_at_work_ends_with_its_parent(tmp_path, how):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_processes import in_fresh_process, write_pid_and_work
if __name__ == "__main__":
    in_fresh_process(write_pid_and_work, {str(tmp_path / "pid")!r})
"""
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stderr=subprocess.DEVNULL)
    child = None
    try:
        child = psutil.Process(int(_content(tmp_path / "pid", 40)))
        parent.send_signal(how)
        parent.wait(10)
        child.wait(5)  # raises TimeoutExpired
    finally:
        for process in (parent, child):
            if process is not None and (process is parent or process.is_running()):
                process.kill()


def _content(path: Path, seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"nothing in {path} after {seconds} s")


def test_the_peak_of_a_tree_holds_what_a_child_held(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS_BETWEEN_LOOKS", 0.05)
    child = f"import time; large = bytearray(b'x') * {LARGE}; time.sleep(0.5)"
    before = memory_of_tree()
    with PeakMemory() as memory:
        subprocess.run([sys.executable, "-c", child], check=True)
    assert memory.peak - before > 0.99 * LARGE
    assert memory_of_tree() - before < 0.5 * LARGE


SPENDING = """
import json, subprocess, sys, time
from pi0fm.processes import cpu_seconds_of_tree

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

readings = [cpu_seconds_of_tree()]
def read():
    readings.append(cpu_seconds_of_tree())

time.sleep(0.3)
read()
burn(0.2)
read()
child = "import time; end = time.process_time() + 0.3\\nwhile time.process_time() < end: pass\\nprint(flush=True); input()"
with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    process.stdout.readline()
    read()
    process.communicate("\\n")
read()
names = ("asleep", "working", "child_alive", "child_ended")
print(json.dumps({name: after - before for name, before, after in zip(names, readings, readings[1:])}))
"""


def test_processor_time_counts_work_and_children_once_and_not_sleep(repository: Path):
    """In a fresh interpreter, so that nothing else of the test run is in its tree."""
    done = subprocess.run([sys.executable, "-c", SPENDING], cwd=repository, capture_output=True, text=True, check=True)
    spent = json.loads(done.stdout)
    assert spent["asleep"] < 0.1
    assert 0.2 <= spent["working"] < 0.3
    assert spent["child_alive"] > 0.25
    assert -0.05 < spent["child_ended"] < 0.15
