"""Tests of compiled and recorded chunks against plain ones; the first file of the GPU's tests, since compilation takes minutes."""

import json

import programs
import pytest


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [("pi0", "small", "float32"), ("pi05", "small", "bfloat16"), ("pi0", "wide", "bfloat16"), ("pi05", "wide", "bfloat16")],
)
def test_compiled_and_recorded_chunks_are_the_plain_ones(device, name, size, dtype):
    """Batches of 1, 3 and 8, missing cameras, short and long prompts; apart, since compilers cannot look through shape checks.

    small: widths that the kernels of models/fused.py do not take, which torch.compile then makes; wide: those of released weights.
    """
    if size == "wide" and device.type == "cpu":
        pytest.skip("the widths of released weights take a minute on a CPU")
    words = ("kernels", "graph") if device.type == "cuda" else ("off",)
    rows = json.loads(programs.last_line("device_chunks", name, size, device.type, dtype, *words))
    assert {row["case"] for row in rows} >= {"batch 1", "batch 3", "batch 8", "missing camera", "short prompt", "held rows"}
    bound = 1e-4 if dtype == "float32" else 5e-2
    assert [row for row in rows if not row["difference"] < bound] == []
