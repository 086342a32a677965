"""Tests that the Triton kernels compile for a Hopper GPU at released sizes, on any machine; tests/gpu checks their results."""

import json

import programs
import pytest

WHOLE = {
    "add_norm",
    "add_layer_norm",
    "rotated_qkv",
    "rotated_heads",
    "attend",
    "join",
    "sliced_product",
    "gated_product",
    "gated",
    "head",
}


@pytest.mark.timeout(240)
def test_every_kernel_compiles_for_a_hopper_gpu():
    """Each launch of few rows and of many is compiled with the arguments that it is given, and fits into shared memory."""
    assert set(json.loads(programs.last_line("compiled_kernels"))) == WHOLE
