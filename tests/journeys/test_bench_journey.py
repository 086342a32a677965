"""`pi0fm bench inference` and `pi0fm bench training` to their last lines, on the tiny network: the shape of the result, not the speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

from pi0fm.policy.device import compute_dtype

pytestmark = [pytest.mark.journey, pytest.mark.long]

NUMBER = {"type": "number", "exclusiveMinimum": 0}
BY_CASE = {"type": "object", "properties": {"tiny": NUMBER}, "required": ["tiny"], "additionalProperties": False}
INTERVAL = {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}
NAMES = (
    "ratio", "seconds", "peer_seconds", "gemm_ratio", "products_seconds", "max_abs_difference", "gflop", "peer_gflop", "weight_megabytes",
    "gflop_per_second", "roofline_seconds", "roofline_share",
)  # fmt: skip
ROW = {"type": "object", "properties": dict.fromkeys(NAMES, NUMBER) | {"interval": INTERVAL}, "required": [*NAMES, "interval"]}


def both_modes(item: dict) -> dict:
    mode = {"type": "object", "properties": {"tiny": item}, "required": ["tiny"], "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"like_for_like": mode, "as_shipped": mode},
        "required": ["like_for_like", "as_shipped"],
        "additionalProperties": False,
    }


INFERENCE = {
    "like_for_like": BY_CASE,
    "as_shipped": BY_CASE,
    "intervals": both_modes(INTERVAL),
    "gemm_ratio": BY_CASE,
    "max_abs_difference": BY_CASE,
    "figures": both_modes(ROW),
    "roofline": {"type": "object", "required": ["gflop_per_second", "gigabytes_per_second"]},
    "machine": {"type": "object", "required": ["processor", "cores"]},
    "versions": {"type": "object", "required": ["pi0fm", "lerobot", "torch"]},
}
SIDES = ("lerobot", "like_for_like", "as_shipped")
PEAK_NAMES = ("whole_megabytes", "above_imports_megabytes", "whole_ratio", "above_imports_ratio")
PEAK = {"type": "object", "properties": dict.fromkeys(PEAK_NAMES, NUMBER), "required": list(PEAK_NAMES)}
TRAINING = INFERENCE | {
    "peer_bfloat16": {"type": "object", "properties": {"tiny": NUMBER}, "additionalProperties": False},
    "memory_ratio": BY_CASE,
    "memory": {
        "type": "object",
        "properties": {"tiny": {"type": "object", "properties": dict.fromkeys(SIDES, PEAK), "required": list(SIDES)}},
        "required": ["tiny"],
    },
    "flow_draws_8": BY_CASE,
    "flow_draws_8_predicted": BY_CASE,
    "flow_draws_8_intervals": {"type": "object", "properties": {"tiny": INTERVAL}, "required": ["tiny"]},
    "flow_draws_8_seconds": {"type": "object", "properties": {"tiny": INTERVAL}, "required": ["tiny"]},
}


def measured(output_dir: Path, *words: str) -> tuple[dict, str]:
    """The last line of standard output, checked against the file, and standard error."""
    command = [sys.executable, "-m", "pi0fm.cli.main", "bench", *words, "--cases", "tiny", "--rounds", "1", "--output_dir", str(output_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (written,) = output_dir.glob("*.json")
    on_disk = json.loads(written.read_text())
    assert {name: on_disk[name] for name in result} == result
    assert on_disk["command"].endswith(str(output_dir))
    return result, done.stderr


def check(result: dict, properties: dict) -> None:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    jsonschema.validate(result, schema)


def test_inference(tmp_path):
    result, shown = measured(tmp_path / "out", "inference", "--seed", "3")
    check(result, INFERENCE)
    assert result["max_abs_difference"]["tiny"] < 1e-4
    # no padded prompt token, no last backbone layer behind its keys
    row = result["figures"]["like_for_like"]["tiny"]
    assert row["gflop"] < row["peer_gflop"]
    assert "like for like" in shown


def test_training(tmp_path):
    result, shown = measured(tmp_path / "out", "training", "--flow_draws_cases", "tiny")
    check(result, TRAINING)
    assert 1 < result["flow_draws_8_predicted"]["tiny"] < 8
    assert "flow draws 8 tiny" in shown
    narrow = "peer_bfloat16" in result["figures"]["as_shipped"]["tiny"]
    assert narrow == ("tiny" in result["peer_bfloat16"]) == ("peer bfloat16 tiny" in shown)
    assert narrow == (compute_dtype("auto", torch.device("cpu")) == torch.bfloat16)
