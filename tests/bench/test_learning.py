"""The comparison: whose turn it is, what is alike, the figures."""

import json
import math
from dataclasses import replace

import pytest
import torch
from learning_help import PROMPT

from pi0fm.bench import learning
from pi0fm.bench.budget import TrainingResult
from pi0fm.bench.learning import Outcome, comparable, compare, curves, figures, parameters
from pi0fm.bench.learning_config import LearningConfig
from pi0fm.bench.shared_data import open_shared
from pi0fm.eval.episode import EpisodeResult
from pi0fm.eval.summary import summarize
from pi0fm.models.presets import TINY
from pi0fm.train.config import TrainConfig
from pi0fm_client.errors import ConfigError


@pytest.fixture(scope="module")
def run(learning_run):
    run = learning_run()
    return comparable(run, LearningConfig(task="reach-v3", dataset=run.dataset))


@pytest.fixture(scope="module")
def data(run):
    return open_shared(run, PROMPT)


def judged(*outcomes: str):
    return summarize([EpisodeResult("reach-v3", seed, outcome, 3, 0.1) for seed, outcome in enumerate(outcomes)], ["reach-v3"])


def outcome(side: str, seed: int, losses=(1.0, 0.5), results=("success", "failure")) -> Outcome:
    spent = tuple(2.0 * (step + 1) for step in range(len(losses)))
    return Outcome(side, seed, TrainingResult(len(losses), 8, 3, spent[-1], losses, spent), judged(*results))


def test_the_tiny_preset_becomes_lerobots_eight_heads_and_keeps_every_width():
    base = TrainConfig(model={"preset": "tiny"})
    network = comparable(base, LearningConfig(threads=2)).network()
    assert (network.decoder.num_heads, network.decoder.head_dim) == (8, 24)
    assert replace(network, decoder=replace(network.decoder, num_heads=4, head_dim=48)) == TINY
    changed = comparable(replace(base, flow=replace(base.flow, solver="heun", num_flow_steps=3)), LearningConfig(threads=2))
    assert (changed.flow.solver, changed.flow.num_flow_steps, changed.threads) == ("euler", 10, 2)


def test_a_pi05_is_refused():
    with pytest.raises(ConfigError, match="only a pi0 can be compared"):
        comparable(TrainConfig(model={"preset": "pi05"}), LearningConfig())


def test_as_many_parameters_take_part_on_both_sides(data):
    sizes = parameters(data)
    assert sizes["lerobot_used"] == sizes["pi0fm"] < sizes["lerobot"]


def test_sides_take_turns_with_the_same_plan_and_lerobots_can_be_left_out(run, data, monkeypatch):
    turns = []

    def train(side, given, shared, plan):
        assert (given, shared) == (run, data)
        turns.append((side, plan))
        return f"{side} {plan.seed}", outcome(side, plan.seed).result

    monkeypatch.setattr(learning, "_train", train)
    threads = torch.get_num_threads()
    alone = LearningConfig(cpu_seconds=7, lerobot_cpu_seconds=0, seeds=2, threads=1)
    ours = figures(compare(alone, run, data, lambda policy: judged("success")))
    assert [(side, plan.seed) for side, plan in turns] == [("pi0fm", 0), ("pi0fm", 1)]
    assert (ours["pi0fm"]["success"], ours["lerobot"]["success"]) == ([1.0, 1.0], [])
    turns.clear()
    asked = LearningConfig(cpu_seconds=7, seeds=2, threads=1)
    found = compare(asked, run, data, lambda policy: judged("success" if policy == "lerobot 1" else "failure"))
    torch.set_num_threads(threads)
    assert [(side, plan.seed) for side, plan in turns] == [("pi0fm", 0), ("lerobot", 0), ("pi0fm", 1), ("lerobot", 1)]
    assert {(plan.cpu_seconds, plan.learning_rate, plan.calibration_steps, plan.max_steps) for _, plan in turns} == {(7, 1e-3, 10, None)}
    assert figures(found)["lerobot"]["success"] == [0.0, 1.0]
    turns.clear()
    compare(LearningConfig(steps=5, seeds=1, threads=1), run, data, lambda policy: judged("success"))
    torch.set_num_threads(threads)
    assert [(side, plan.cpu_seconds, plan.max_steps) for side, plan in turns] == [("pi0fm", math.inf, 5), ("lerobot", math.inf, 5)]


def test_figures_are_by_seed():
    outcomes = [outcome("pi0fm", 0), outcome("lerobot", 0, results=("crash",)), outcome("pi0fm", 1, losses=(1.0,)), outcome("lerobot", 1)]
    assert figures(outcomes) == {
        "pi0fm": {"success": [0.5, 0.5], "cpu_seconds": [4.0, 2.0], "steps": [2, 1], "scheduled_steps": [3, 3], "crashes": [0, 0]},
        "lerobot": {"success": [None, 0.5], "cpu_seconds": [4.0, 4.0], "steps": [2, 2], "scheduled_steps": [3, 3], "crashes": [1, 0]},
    }


def test_a_loss_that_is_not_finite_is_null_in_the_curve():
    found = curves([outcome("pi0fm", 0, losses=(1.0, math.inf, math.nan))])
    assert found == {"pi0fm": [{"cpu_seconds": [2.0, 4.0, 6.0], "loss": [1.0, None, None]}], "lerobot": []}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seeds": 0}, "seeds must be 1 or more, found 0"),
        ({"cpu_seconds": -1.0}, "cpu_seconds must be above 0, found -1"),
        ({"cpu_seconds": math.nan}, "cpu_seconds must be above 0, found nan"),
        ({"lerobot_cpu_seconds": -1.0}, "lerobot_cpu_seconds must be 0 or more, found -1; .* type 0 to train pi0fm's side only"),
        ({"steps": 0}, "steps must be 1 or more, found 0"),
        ({"steps": 3, "cpu_seconds": 7.0}, "steps or processor seconds .* found --steps 3 beside --cpu_seconds 7"),
        ({"steps": 3, "lerobot_cpu_seconds": 9.0}, "--lerobot_cpu_seconds 9"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"episodes": 0}, "episodes must be 1 or more"),
        ({"first_seed": -1}, "first_seed must be 0 or more"),
        ({"task": "button-pres-v3"}, "button-press-v3"),
    ],
)
def test_impossible_options_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        LearningConfig(**wrong)
