"""Tests of the kernels of models/fused.py against the plain layers: by Triton's interpreter, or on a GPU."""

import json

import programs
import pytest


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_fused_layers_give_the_plain_velocity(device, name):
    """Padded prompts, missing cameras, one flow time for all rows and one each; in a separate process."""
    interpreted = {"TRITON_INTERPRET": "1"} if device.type == "cpu" else {}
    rows = json.loads(programs.last_line("fused_layers", name, device.type, **interpreted))
    assert {row["rows"] for row in rows} == ({5} if device.type == "cpu" else {5, 72})
    assert [row for row in rows if not row["difference"] < row["bound"]] == []
