"""The kernels of models/kernels.py against the plain layers: here by Triton's interpreter, on a GPU by the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_fused_layers_give_the_plain_velocity(device, name):
    """Padded prompts, missing cameras, one flow time for all rows and one each; in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client"), str(ROOT / "tests/support")])}
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    program = [sys.executable, str(ROOT / "tests/support/fused_layers.py"), name, device.type]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["rows"] for row in rows} == ({5} if device.type == "cpu" else {5, 72})
    assert [row for row in rows if not row["difference"] < row["bound"]] == []
