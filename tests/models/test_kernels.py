"""The Triton kernels compile for a Hopper GPU at released sizes, on a machine without one; tests/gpu holds their numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {
    "_add_norm",
    "_add_layer_norm",
    "_rotated_qkv",
    "_rotated_heads",
    "_attend",
    "_join",
    "_sliced_product",
    "_gated_product",
    "_gate",
    "_head",
}


@pytest.mark.timeout(240)
def test_every_kernel_compiles_for_a_hopper_gpu():
    """Each launch of few rows and of many is compiled with the arguments that it is given, and fits into shared memory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    program = [sys.executable, str(ROOT / "tests/support/compiled_kernels.py")]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == WHOLE
