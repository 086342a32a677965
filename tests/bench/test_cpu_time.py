"""The processor time of a process tree, counted in a fresh interpreter, so that nothing else of the test run is in its tree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, subprocess, sys, time
from pi0fm.bench.cpu_time import cpu_seconds_of_tree

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


@pytest.fixture(scope="module")
def spent(repository: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=repository, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_sleep_costs_nothing_and_work_costs_its_time(spent):
    assert spent["asleep"] < 0.1
    assert 0.2 <= spent["working"] < 0.3


def test_a_live_child_counts(spent):
    assert spent["child_alive"] > 0.25


def test_an_ended_child_is_counted_once(spent):
    assert -0.05 < spent["child_ended"] < 0.15
