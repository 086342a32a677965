"""Run programs of this folder in a separate process, without the tests' shape checks, which a compiler cannot trace."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
PLACES = (SUPPORT, SUPPORT / "device", SUPPORT / "fakes", SUPPORT.parents[1], SUPPORT.parents[1] / "client")


def command(name: str, *words: str) -> list[str]:
    """The words that start NAME.py of tests/support."""
    return [sys.executable, str(next(SUPPORT.rglob(f"{name}.py"))), *words]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with pi0fm and this folder on the path."""
    path = os.pathsep.join([*map(str, PLACES), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path} | variables


def last_line(name: str, *words: str, **variables: str) -> str:
    """Run NAME to its end; the last line that it printed."""
    done = subprocess.run(command(name, *words), capture_output=True, text=True, env=environment(**variables), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]
