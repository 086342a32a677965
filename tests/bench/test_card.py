"""Tests of `pi0fm bench card` on a CPU: rows kept on disk, counted work, LeRobot's import on a bare machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pi0fm.bench import inference
from pi0fm.bench.card.results import OUT_OF_MEMORY, Results
from pi0fm.bench.card.training import PEER, START, cases
from pi0fm.bench.card.work import inference_work, least_seconds
from pi0fm.bench.config import CARD_PARTS, CardOptions
from pi0fm.bench.harness.cases import random_network, random_observations, random_policy
from pi0fm.bench.harness.limits import Rates, percentile
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.models.config import PI0, TINY
from pi0fm_client.errors import ConfigError

CHANGED = ("training, LoRA 16, checkpointed",)  # measured with other layers than today's
CPU = torch.device("cpu")
CARD = Rates({torch.bfloat16: 790e12}, bytes_per_second=3e12)


def raising(error: Exception):
    def case() -> None:
        raise error

    return case


def test_every_row_is_on_disk_and_a_fault_stops_nothing(tmp_path):
    path, cleared = tmp_path / "part.json", []
    results = Results("inference", path, seconds=60)
    assert results.attempt("first", lambda: results.add("first", 12.3456, "ms", limit_share=0.5), 1) == ""
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert results.attempt("second", raising(memory), 1, lambda: cleared.append(1)) == OUT_OF_MEMORY
    assert "KeyError" in results.attempt("third", raising(KeyError("x")), 1)
    assert "60 s were left" in results.attempt("fourth", raising(AssertionError("is not run")), 1000)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["what"], row["value"]) for row in rows] == [("first", 12.35), ("second", None), ("third", None), ("fourth", None)]
    assert cleared == [1] and rows[1]["note"] == OUT_OF_MEMORY
    assert not json.loads(path.read_text())["finished"]


def test_parts_take_eight_minutes_and_can_be_named():
    assert sum(CardOptions().bounds().values()) <= 8 * 60
    assert CardOptions(parts=("extras", "right=9")).bounds() == {"extras": CARD_PARTS["extras"], "right": 9.0}
    for parts, rule in ((("rigt",), "did you mean 'right'"), (("right=x",), "whole seconds"), ((), "found none")):
        with pytest.raises(ConfigError, match=rule):
            CardOptions(parts=parts)
    with pytest.raises(ConfigError, match="--whole false"):
        CardOptions(device="cpu")


def test_training_begins_with_what_no_card_has_measured(repository):
    """docs/gpu.md, the last table; the first case is what LeRobot's step is held against."""
    days = ("gpu_h100_training", "gpu_h100_training_first_day")
    rows = [row for day in days for row in json.loads((repository / f"docs/results/{day}.json").read_text())["rows"]]
    measured = {row["what"] for row in rows if row["value"] and row["what"].rpartition(", ")[0] not in CHANGED}
    known = [any(what.startswith(f"training, {case.name}, batch") for what in measured) for case in cases()]
    assert known[1:] == sorted(known[1:]), [case.name for case in cases()]
    new = [case for case, before in zip(cases(), known, strict=True) if not before]
    seconds = START + cases()[0].seconds(32) + PEER + sum(case.seconds(size) for case in new for size in case.batches)
    assert seconds < CARD_PARTS["training"], "a part has the time that its new figures take, by estimate"


def test_operations_of_pi0_by_hand():
    """Twice the entries of every matrix for each token, and the products of attention."""
    tower, decoder = PI0.vision, PI0.decoder
    seen, patches = 3 * tower.tokens_per_image, 3 * 14**2
    layer = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
    vision = 2 * seen * (tower.depth * (layer + 2 * tower.tokens_per_image * tower.width) + patches * tower.width + tower.width * 2048)
    prefix, attended = seen + 48, decoder.num_heads * decoder.head_dim
    projections = 2048 * (attended + 2 * decoder.head_dim) + attended * 2048
    one = projections + 3 * 2048 * 16384 + 2 * prefix * attended
    keys = 2048 * 2 * decoder.head_dim  # all that the last layer computes of the prefix
    work = inference_work(PI0, batch=1, cameras=3, prompt_tokens=48, num_flow_steps=10)
    assert work["vision"][0] == pytest.approx(vision, rel=0.01)
    assert work["prefix"][0] == pytest.approx(2 * prefix * (17 * one + keys), rel=0.01)
    assert work["steps"][1] > 10 * work["vision"][1] / 2, "the expert's weights are read at every step"
    eight = inference_work(PI0, batch=8, cameras=3, prompt_tokens=48, num_flow_steps=10)
    assert eight["prefix"] == (8 * work["prefix"][0], work["prefix"][1])
    assert 6e-3 < sum(least_seconds(work, CARD).values()) < 8e-3


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([float(value) for value in range(1, 101)], 0.99) == 99.0


@pytest.mark.parametrize("change", [{}, {"state_input": "prompt", "time_conditioning": "adaptive_norm"}])
def test_every_prompt_fills_its_tokens(change):
    config = replace(TINY, **change)
    policy = random_policy(random_network(config, CPU), 2, CPU, torch.float32)
    given = random_observations(policy, 2, seed=0)
    inputs = policy.chain.observe(given)
    assert inputs.prompt_mask.all() and inputs.prompt_mask.shape == (2, config.max_prompt_tokens)
    assert inputs.images.shape[:2] == (2, 2)
    assert all(chunk.actions.shape == (config.action_horizon, 7) for chunk in policy.infer_batch(given, [1, 2]))


def test_a_bare_machine_has_all_that_is_imported(repository):
    """No simulator, video library, Ray or LeRobot: `.ci/bare` hides what torch, transformers and their like do not bring."""
    modules = ("run", "inference", "training", "extras", "peer")
    program = "; ".join((*(f"import pi0fm.bench.card.{name}" for name in modules), "import pi0fm.train.loop, pi0fm.cli.bench"))
    places = os.pathsep.join(map(str, (repository / ".ci" / "bare", repository, repository / "client")))
    bare = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    hidden = subprocess.run([sys.executable, "-c", "import av"], env=bare, capture_output=True, text=True, check=False)
    assert "No module named 'av'" in hidden.stderr


@pytest.mark.parametrize("ended", [True, False])
def test_comparisons_with_lerobot_on_a_gpu_show_the_rows_of_full_size_too(monkeypatch, tmp_path, ended):
    table = {"pi0, 3 cameras, batch 1, graph": {"figure": "17.4 ms", "target": "p50 <= 15 ms"}}
    asked = []

    def measured(options: CardOptions) -> BenchReport:
        asked.append(options)
        figures = {"ended": {"inference": "whole" if ended else "exit code 1"}, "figures": {"pi0": 17.4} if ended else {}}
        return BenchReport(figures, {"inference": table} if ended else dict(figures))

    monkeypatch.setattr(inference.card, "measure", measured)
    report = BenchReport({"ratio": 2.0}, {"like_for_like": {}})
    assert inference.with_full_size(report, "inference", CPU, tmp_path) is report and not asked
    found = inference.with_full_size(report, "inference", torch.device("cuda"), tmp_path)
    assert asked == [CardOptions(("inference",), tmp_path / "card", "cuda")] and asked[0].whole
    assert found.shown == {"like_for_like": {}, "full size": table if ended else {"inference": "exit code 1"}}
    assert found.figures == {"ratio": 2.0, "full_size": {"pi0": 17.4} if ended else {}}


@pytest.mark.journey
def test_the_command_measures_a_tiny_network_on_a_cpu(repository, tmp_path):
    command = [sys.executable, "-m", "pi0fm.cli.main", "bench", "card", "--device", "cpu", "--whole", "false"]
    command += ["--parts", "training=200,extras=200", "--output_dir", str(tmp_path)]
    places = os.pathsep.join(map(str, (repository, repository / "client")))
    environment = {**os.environ, "PYTHONPATH": places, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == "CPU"
    assert result["ended"] == {"training": "whole", "extras": "whole"}, (tmp_path / "card.log").read_text()[-2000:]
    assert result["figures"]["training, expert only, batch 2"] > 0
    assert result["figures"]["best of 8 over one, one prefix"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "card.log", "extras.json", "training.json"]
