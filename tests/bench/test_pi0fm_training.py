"""pi0fm's side under a budget is the shipped training, number for number."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_help import PROMPT

from pi0fm.bench import pi0fm_training
from pi0fm.bench.budget import TrainingPlan
from pi0fm.bench.learning import comparable
from pi0fm.bench.learning_config import LearningConfig
from pi0fm.bench.pi0fm_training import train_pi0fm
from pi0fm.bench.shared_data import open_shared
from pi0fm.policy import bundle
from pi0fm.train.loop import train
from pi0fm.train.parallel.context import Context
from pi0fm.train.start.output import claim
from pi0fm_client.types import Observation

STEPS = 12


@pytest.fixture(scope="module")
def run(learning_run):
    dataset = replace(learning_run().dataset, episodes=(0, 1, 2))
    run = learning_run(steps=STEPS, log_every=1, micro_batch_size=2, flow_draws_per_observation=2, dataset=dataset)
    return comparable(run, LearningConfig(task="reach-v3", dataset=run.dataset))


@pytest.fixture(scope="module")
def data(run):
    return open_shared(run, PROMPT)


@pytest.fixture(scope="module")
def trained(run, data):
    plan = TrainingPlan(cpu_seconds=600, learning_rate=run.optimizer.learning_rate, seed=3, max_steps=STEPS)
    return train_pi0fm(run, data, plan)


def test_it_is_the_run_of_pi0fm_train(run, trained, tmp_path):
    whole = replace(run, output_dir=tmp_path / "run", seed=3)
    claim(whole)
    result = train(Context(shown=False), whole)
    lines = [json.loads(line) for line in (whole.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert trained.result.losses == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert (trained.result.steps, trained.result.samples) == (STEPS, STEPS * run.global_batch_size)
    shipped = bundle.load(result.bundle, device="cpu", precision="float32", threads=1)
    seen = Observation({"base": np.full((48, 32, 3), 90, np.uint8)}, np.zeros(4, np.float32), PROMPT)
    ours, theirs = (policy.infer_batch([seen], [5])[0].actions for policy in (trained.policy, shipped))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert trained.policy.metadata["num_flow_steps"] == 10


def test_calibration_leaves_no_trace(run, data, trained, monkeypatch):
    def three_steps(update, plan):
        for step in range(3):
            update(step)
        return STEPS

    monkeypatch.setattr(pi0fm_training, "steps_in_budget", three_steps)
    plan = TrainingPlan(cpu_seconds=1e-9, learning_rate=run.optimizer.learning_rate, seed=3)
    result = train_pi0fm(run, data, plan).result
    assert result.scheduled_steps == STEPS
    assert result.losses == trained.result.losses[:1]


def test_the_callers_randomness_is_left_alone(run, data):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_pi0fm(run, data, TrainingPlan(cpu_seconds=600, max_steps=1))
    assert torch.equal(torch.rand(1), expected)
