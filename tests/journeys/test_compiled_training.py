"""Training with --compile: the same numbers, and no compilation for a batch of another prompt length."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(1200)]  # a compiler runs for minutes
SUPPORT = Path(__file__).resolve().parent.parent / "support"


@pytest.mark.parametrize(("name", "how"), [("pi0", "kept"), ("pi05", "checkpointed")])
def test_compiled_layers_train_as_the_plain_ones(name, how):
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SUPPORT / "compiled_training.py"), name, how]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert max(row["velocity"] for row in rows) < 1e-5
    assert max(row["gradient"] for row in rows) < 1e-4
    assert rows[0]["graphs"] == rows[-1]["graphs"] > 0
