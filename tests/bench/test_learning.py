"""Tests of the comparison of learning: the same samples on both sides, separate trainings, order, budget, figures."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learning_help import PROMPT
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.random_utils import seeded_context

from pi0fm import options
from pi0fm.bench import learning
from pi0fm.bench.config import LearningOptions
from pi0fm.bench.harness import peer
from pi0fm.bench.learning import (
    LeRobotTraining,
    compare,
    open_shared,
    parameters,
    read_training,
    train,
    train_for,
    with_lerobots_heads,
)
from pi0fm.cli.main import main
from pi0fm.data.chain import Sample
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.eval.rollouts.episode import EpisodeResult
from pi0fm.eval.summary import summarize
from pi0fm.models.config import TINY
from pi0fm.policy.saved import bundle
from pi0fm.train.loop import train as train_loop
from pi0fm.train.parallel.context import Context
from pi0fm.train.start.output import claim
from pi0fm_client.errors import ConfigError, DatasetError
from pi0fm_client.types import Observation

STEPS = 12
SEEN = Observation({"base": np.full((48, 32, 3), 90, np.uint8)}, np.zeros(4, np.float32), PROMPT)


@pytest.fixture(scope="module")
def run(learning_run):
    dataset = replace(learning_run().dataset, episodes=(0, 1, 2))
    run = learning_run(steps=STEPS, log_every=1, micro_batch_size=2, flow_draws_per_observation=2, dataset=dataset)
    return with_lerobots_heads(run, LearningOptions(task="reach-v3", dataset=run.dataset))


@pytest.fixture(scope="module")
def data(run):
    return open_shared(run, PROMPT)


# one data set for both


@pytest.mark.parametrize("first", [0, 5, 22])
def test_both_sides_see_the_same_batch(data, first):
    """Positions 22 to 27 span two epochs of the 24 frames."""
    collator = data.collator(seed=3)
    ours, theirs = collator(first, 6), data.lerobot_batch(collator, first, 6)
    assert torch.equal(ours.observation.images[:, 0], theirs["observation.images.base"].permute(0, 2, 3, 1))
    assert theirs["observation.images.base"].dtype == torch.uint8
    back = collator.chain.inverse(Sample(ours.observation.state.numpy(), ours.actions.numpy()))
    np.testing.assert_allclose(back.state, theirs["observation.state"], atol=1e-6)
    np.testing.assert_allclose(back.actions, theirs["action"], atol=1e-6)
    assert torch.equal(ours.action_mask[:, :, 0], ~theirs["action_is_pad"])
    assert theirs["task"] == [PROMPT] * 6
    assert not torch.equal(data.lerobot_batch(data.collator(4), first, 6)["observation.state"], theirs["observation.state"])


def test_an_epoch_is_every_frame_of_the_task_and_no_other_in_memory(learning_run):
    run = learning_run()
    data, whole = open_shared(run, PROMPT), open_source(run.dataset, run.embodiment)
    found = data.lerobot_batch(data.collator(0), 0, 24)["observation.state"].numpy()
    assert sorted(map(tuple, found)) == sorted(map(tuple, whole.state[whole.episode < 3]))
    assert len(whole.state) == 48
    assert not any(isinstance(camera, np.memmap) for camera in data.cache.cameras)


def test_data_that_both_cannot_learn_from_is_refused(learning_run):
    run = learning_run()
    with pytest.raises(DatasetError, match=r"holds no episode of 'fold the towel', found: .*open the door"):
        open_shared(run, "fold the towel")
    with pytest.raises(DatasetError, match="no chosen episode"):
        open_shared(replace(run, dataset=replace(run.dataset, episodes=(4, 5))), PROMPT)
    with pytest.raises(ConfigError, match="delta_actions"):
        open_shared(learning_run(embodiment=Embodiment(delta_actions=(0,))), PROMPT)


# each side as shipped


def test_our_side_is_the_run_of_pi0fm_train(run, data, tmp_path):
    policy, _, losses, _ = train("pi0fm", run, data, 3, 600.0, STEPS)
    whole = replace(run, output_dir=tmp_path / "run", seed=3)
    claim(whole)
    shipped = bundle.load(train_loop(Context(shown=False), whole).bundle, device="cpu", precision="float32", threads=1)
    lines = [json.loads(line) for line in (whole.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    ours, theirs = (each.infer_batch([SEEN], [5])[0].actions for each in (policy, shipped))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert policy.metadata["num_flow_steps"] == 10


class OneProcess:
    """What accelerate does on one process in float32."""

    def autocast(self):
        return nullcontext()

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, norm):
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def unwrap_model(self, model, keep_fp32_wrapper):
        return model


def lerobots_own_losses(run, data, seed: int, steps: int) -> list[float]:
    """The same run with LeRobot's seeding and `update_policy` in the place of ours."""
    with seeded_context(seed):
        config = peer.policy_config(data.policy.model, peer.RobotFeatures(("base",), 4, 4), run.optimizer.learning_rate)
        policy = peer.ShrunkPI0(config, data.policy.model)
        before, _ = peer.processors(config, data.lerobot_stats())
        optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
        scheduler = config.get_scheduler_preset().build(optimizer, steps)
        collator, losses = data.collator(seed), []
        for step in range(steps):
            tracker = MetricsTracker(4, 4, 1, {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")})
            raw = data.lerobot_batch(collator, 4 * step, 4)
            raw["observation.images.base"] = raw["observation.images.base"].to(dtype=torch.float32) / 255.0
            _, parts = update_policy(tracker, policy, before(raw), optimizer, 1.0, OneProcess(), lr_scheduler=scheduler)
            losses.append(parts["loss"])
    return losses


def test_lerobots_side_is_lerobots_own_update(run, data):
    """35 steps: LeRobot's scaled warm-up is one step long."""
    before = torch.get_rng_state()
    _, scheduled, losses, _ = train("lerobot", run, data, 3, 600.0, 35)
    assert losses == lerobots_own_losses(run, data, 3, 35)
    assert scheduled == 35
    assert torch.equal(torch.get_rng_state(), before), "the caller's randomness is left alone"


@pytest.mark.parametrize("side", learning.SIDES)
def test_calibration_leaves_no_trace(run, data, side, monkeypatch):
    def three_steps(update, cpu_seconds):
        return STEPS + 0 * len([update(step) for step in range(3)])

    monkeypatch.setattr(learning, "steps_in_budget", three_steps)
    _, scheduled, calibrated, _ = train(side, run, data, 3, 1e-9, None)
    counted = train(side, run, data, 3, 600.0, STEPS)[2]
    assert (scheduled, calibrated) == (STEPS, counted[:1])


def test_lerobots_policy_is_its_prediction_in_robot_units(run, data):
    """Alone and in a batch; every key of an observation has an effect."""
    training = LeRobotTraining(run, data, 0, 1)
    policy, config = training.policy(), training._policy.config
    dark = replace(SEEN, images={"base": np.zeros((48, 32, 3), np.uint8)})
    (alone,), (_, beside) = policy.infer_batch([SEEN], [9]), policy.infer_batch([dark, SEEN], [3, 9])
    noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(9))
    raw = {"observation.images.base": torch.full((1, 3, 48, 32), 90 / 255), "observation.state": torch.zeros(1, 4), "task": [PROMPT]}
    normalized = training._policy.predict_action_chunk(training._processors[0](raw), noise=noise)[0]
    stats = data.lerobot_stats()["action"]
    np.testing.assert_allclose(alone.actions, normalized * stats["std"] + stats["mean"], rtol=1e-5)
    np.testing.assert_allclose(alone.actions, beside.actions, rtol=1e-4, atol=1e-4)
    for changed in (dark, replace(SEEN, state=SEEN.state + 1), replace(SEEN, prompt="open")):
        assert not np.array_equal(policy.infer_batch([changed], [9])[0].actions, alone.actions)
    assert {"action_horizon": 4, "robot_action_dim": 4, "state_dim": 4}.items() <= policy.metadata.items()
    assert policy.metadata["cameras"] == {"base": "observation.images.base"}


def test_as_many_parameters_take_part_on_both_sides(data):
    sizes = parameters(data)
    assert sizes["lerobot_used"] == sizes["pi0fm"] < sizes["lerobot"]


def test_the_shipped_configuration_becomes_lerobots_eight_heads_and_keeps_every_width():
    base = read_training(options.shipped()["quickstart"])
    run = with_lerobots_heads(replace(base, flow=replace(base.flow, solver="heun", num_flow_steps=3)), LearningOptions(threads=2))
    network = run.network()
    assert (network.decoder.num_heads, network.decoder.head_dim) == (8, 24)
    assert replace(network, decoder=replace(network.decoder, num_heads=4, head_dim=48)) == TINY
    assert (run.flow.solver, run.flow.num_flow_steps, run.threads) == ("euler", 10, 2)
    assert (run.optimizer.learning_rate, run.execution_horizon) == (1e-3, 8)


# turns, budget, figures


@pytest.fixture
def clock(monkeypatch):
    """The processor's time, which `clock.now` sets and `clock.step` turns by the seconds of every reading."""
    found = SimpleNamespace(now=7.0, step=0.0)

    def read() -> float:
        found.now += found.step
        return found.now

    monkeypatch.setattr(learning, "cpu_seconds_of_tree", read)
    return found


@pytest.mark.parametrize(
    ("cpu_seconds", "steps", "spent"),
    [(3.2, None, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)), (0.1, None, (0.5,)), (600, 3, (0.5, 1.0, 1.5)), (math.inf, 2, (0.5, 1.0))],
    ids=["the step that passes it", "one at least", "steps first", "steps alone"],
)
def test_what_ends_a_training(clock, capsys, cpu_seconds, steps, spent):
    clock.step = 0.5
    losses, found = train_for("side", float, cpu_seconds, steps)
    assert (found, losses) == ([*spent], [*map(float, range(len(spent)))])
    assert ("side, steps 2/2" in capsys.readouterr().err) == (steps == 2)


def test_calibration_leaves_out_the_first_step(clock):
    """The first step costs 9 s, the others a quarter of one: 3.2 s hold 12.8 of those."""

    def update(step: int) -> None:
        clock.now += 0.25 if step else 9.0

    assert learning.steps_in_budget(update, 3.2) == 13


def judged(*outcomes: str):
    return summarize([EpisodeResult("reach-v3", seed, outcome, 3, 0.1) for seed, outcome in enumerate(outcomes)], ["reach-v3"])


def test_sides_take_turns_with_the_same_plan_and_lerobots_can_be_left_out(run, data, monkeypatch):
    turns = []

    def fake(side, given, shared, seed, cpu_seconds, steps):
        assert (given, shared) == (run, data)
        turns.append((side, seed, cpu_seconds, steps))
        return f"{side} {seed}", 3, [1.0, math.inf, math.nan][: 3 - seed], [2.0, 4.0, 6.0][: 3 - seed]

    monkeypatch.setattr(learning, "train", fake)
    verdicts = {"pi0fm 0": ("success", "failure"), "lerobot 0": ("crash",)}
    figures, curves = compare(
        LearningOptions(cpu_seconds=7, seeds=2), run, data, lambda policy: judged(*verdicts.get(policy, ("success",)))
    )
    assert turns == [("pi0fm", 0, 7, None), ("lerobot", 0, 7, None), ("pi0fm", 1, 7, None), ("lerobot", 1, 7, None)]
    columns = {"cpu_seconds": [6.0, 4.0], "steps": [3, 2], "scheduled_steps": [3, 3]}
    assert figures == {
        "pi0fm": {"success": [0.5, 1.0], "crashes": [0, 0], **columns},
        "lerobot": {"success": [None, 1.0], "crashes": [1, 0], **columns},
    }
    assert curves["pi0fm"][0] == {"cpu_seconds": [2.0, 4.0, 6.0], "loss": [1.0, None, None]}
    turns.clear()
    figures, _ = compare(LearningOptions(cpu_seconds=7, lerobot_cpu_seconds=0, seeds=1), run, data, lambda policy: judged("success"))
    assert (turns, figures["lerobot"]["success"]) == ([("pi0fm", 0, 7, None)], [])
    turns.clear()
    compare(LearningOptions(steps=5, seeds=1), run, data, lambda policy: judged("success"))
    compare(LearningOptions(cpu_seconds=7, lerobot_cpu_seconds=9, seeds=1), run, data, lambda policy: judged("success"))
    assert turns == [("pi0fm", 0, math.inf, 5), ("lerobot", 0, math.inf, 5), ("pi0fm", 0, 7, None), ("lerobot", 0, 9, None)]


# the command


@pytest.fixture
def recordings(monkeypatch):
    """The recordings that were asked for; each stops the command."""
    asked = []

    def record(config):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "record_here", record)
    return asked


def test_without_a_data_set_the_demonstrations_are_recorded_here(recordings, tmp_path):
    """In this process: Ray's would still be around when the first training is timed."""
    assert main(["bench", "learning", "--task", "reach-v3", "--demonstrations", "7", "--output_dir", str(tmp_path / "out")]) == 130
    (asked,) = recordings
    assert (asked.task_names, asked.episodes, asked.num_workers) == (("reach-v3",), 7, 0)
    assert asked.folder == tmp_path / "out" / "dataset"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("validation: {every: 5, episodes: 2}", "found validation in --config; leave it out"),
        ("lora: {rank: 4}\naugment: true", "found lora, augment in --config; leave them out"),
        ("train_only: expert_only", "found train_only in --config"),
        ("stepps: 3", "unknown option stepps"),
    ],
)
def test_what_a_comparison_would_pass_over_is_refused_before_anything_is_recorded(capsys, tmp_path, recordings, given, named):
    (tmp_path / "run.yaml").write_text(given)
    assert main(["bench", "learning", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert (recordings, (tmp_path / "out").exists()) == ([], False)
