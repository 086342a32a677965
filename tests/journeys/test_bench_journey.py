"""Run every measurement that needs no GPU at its smallest size and check the figures in its last line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pi0fm.policy.device import compute_dtype

pytestmark = [pytest.mark.journey, pytest.mark.long]

ROW = (
    "ratio", "interval", "seconds", "peer_seconds", "gemm_ratio", "gemm_interval", "products_seconds", "gflop", "peer_gflop",
    "weight_megabytes", "gflop_per_second", "roofline_seconds", "roofline_share", "max_abs_difference", "difference_bound",
)  # fmt: skip
COMMON = {"machine", "versions"}
SPEED = {"like_for_like", "as_shipped", "intervals", "gemm_ratio", "max_abs_difference", "figures", "roofline", *COMMON}
DRAWS = {f"flow_draws_8{name}" for name in ("", "_predicted", "_intervals", "_seconds")}
RATIOS = ("cached_ratio", "cached_of_memcpy", "streaming_of_decode", "build_of_decode", "batch_of_memcpy", "streamed_batch_of_decode")


def measured(output_dir: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The last line of standard output, checked against the file, and standard error."""
    command = [sys.executable, "-m", "pi0fm.cli.main", "bench", *words, "--rounds", "1", "--output_dir", str(output_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    on_disk = json.loads((output_dir / f"{words[0]}.json").read_text())
    assert {name: on_disk[name] for name in result} == result
    assert on_disk["command"].endswith(str(output_dir))
    assert all(value > 0 for value in numbers(result)), "every figure is above 0"
    return result, done.stderr


def numbers(tree: Any) -> list[float]:
    """All numbers of a result, wherever they are, that are not shares of a slowdown."""
    if isinstance(tree, dict):
        return [value for name, inner in tree.items() if "slowdown" not in name and name not in NOISE for value in numbers(inner)]
    return [value for inner in tree for value in numbers(inner)] if isinstance(tree, list) else [tree] if isinstance(tree, float) else []


NOISE = {"interval", "cpu_interval", "memory_growth_mib", "loss_difference"}  # may be 0 or less: differences of two measurements


def test_inference(tmp_path):
    result, shown = measured(tmp_path / "out", "inference", "--cases", "tiny", "--seed", "3")
    assert result.keys() == SPEED
    for mode in ("like_for_like", "as_shipped"):
        row = result["figures"][mode]["tiny"]
        assert row.keys() == set(ROW) and row["ratio"] == result[mode]["tiny"]
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high
    assert result["max_abs_difference"]["tiny"] < 1e-4
    row = result["figures"]["like_for_like"]["tiny"]
    assert row["gflop"] < row["peer_gflop"], "no padded prompt token, no last backbone layer behind its keys"
    assert "like for like" in shown


@pytest.mark.timeout(1200)  # twelve processes, each with its imports
def test_training(tmp_path):
    result, shown = measured(tmp_path / "out", "training", "--cases", "tiny", "--flow_draws_cases", "tiny")
    assert result.keys() == SPEED | DRAWS | {"peer_bfloat16", "memory_ratio", "memory"}
    assert set(result["figures"]["like_for_like"]["tiny"]) == {*ROW, "batch", "loss_difference"}
    for side in ("lerobot", "like_for_like", "as_shipped"):
        peak = result["memory"]["tiny"][side]
        assert peak.keys() == {f"{kind}_{unit}" for kind in ("whole", "above_imports") for unit in ("megabytes", "ratio")}
    assert 1 < result["flow_draws_8_predicted"]["tiny"] < 8
    assert "flow draws 8 tiny" in shown
    narrow = "peer_bfloat16" in result["figures"]["as_shipped"]["tiny"]
    assert narrow == ("tiny" in result["peer_bfloat16"]) == ("peer bfloat16 tiny" in shown)
    assert narrow == (compute_dtype("auto", torch.device("cpu")) == torch.bfloat16)


def test_checkpoint(tmp_path):
    (folder := tmp_path / "checkpoints").mkdir()
    words = ("--every", "3", "--batch_size", "1", "--precision", "float32", "--folder", str(folder))
    last, shown = measured(tmp_path / "out", "checkpoint", *words)
    low, high = last["interval"]
    assert low <= last["slowdown"] <= high
    assert last["bytes"] > 4 * 4 * 3_000_000  # weights, two moments and the average, float32
    assert 1 <= last["steps_until_written"] <= 3
    assert "slowdown every 1000" in shown
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_loading(tmp_path, workers):
    small = ["--frames", "1400", "--size", "64", "--action_horizon", "8", "--batch_size", "8", "--memory_batches", "40"]
    last, shown = measured(tmp_path / "out", "loading", *small, "--lerobot_workers", str(workers))
    for name in RATIOS:
        low, high = last["intervals"][name]
        assert math.isfinite(last[name]) and 0 < low <= last[name] <= high
    assert last["cached_ratio"] > 5  # a smoke test of the order of magnitude: the claim itself is 30, at the full size
    assert (last["frames"], last["action_horizon"], last["lerobot_workers"]) == (1400, 8, workers)
    memory = last["memory_mib"]
    assert memory["start"] <= memory["peak"] and memory["end"] <= memory["peak"]
    assert 0.5 < last["streamed_frames_a_sample"] < 2
    assert "cached ratio" in shown and "memory mib end" in shown


def test_density(tmp_path):
    last, _ = measured(tmp_path / "out", "density", "--num_flow_steps", "2", "--solver", "heun")
    assert last.keys() == COMMON | {
        *("ratio", "interval", "log_prob_seconds", "sample_seconds", "one_pass", "call", "evaluations", "num_probes", "solver"),
        *("batch_size", "rounds", "policy"),
    }
