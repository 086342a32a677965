"""torch.compile of a sampler: the same chunks, and hardly a further compilation once a server is warm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(900)]  # a compiler runs for minutes
SUPPORT = Path(__file__).resolve().parent.parent / "support"


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_compiled_chunks_are_the_plain_ones(name):
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SUPPORT / "compiled_chunks.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert max(row["difference"] for row in rows) < 1e-5
    warm = rows[1]["graphs"]
    assert warm > 0
    # of four more shapes at most one for a single row and one for several: sizes that were equal at first turn out to differ
    assert rows[-1]["graphs"] <= warm + 2
