"""Tests of validation on held-out episodes: closed forms, the same for any number of workers and after a restart, non-blocking."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from safetensors.torch import load_file

from pi0fm.data.order.counter import slots
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import DensityOptions, log_prob
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.train.checkpoint import checkpoints as checkpoint
from pi0fm.train.components import ValidationConfig
from pi0fm.train.data import RunDataset, open_data
from pi0fm.train.loop import train
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.start.output import claim
from pi0fm.train.state import StateConfig, TrainState
from pi0fm.train.watch.metrics import read_last
from pi0fm.train.watch.validation import ERROR, LOSS, LOSS_DRAWS, NLL, NLL_PER_DIM, Validator, make_validators, measure, summarize
from pi0fm_client.errors import ConfigError

ALONE = Context(shown=False)
CPU = torch.device("cpu")
FLOW = FlowMatching.from_config(FlowConfig())
OFTEN = ValidationConfig(every=2, episodes=1, samples=9, likelihood=True, probes=1, num_flow_steps=2)


@pytest.fixture(scope="module")
def data(configure, tmp_path_factory) -> RunDataset:
    """One of three episodes is held out."""
    return opened(configure(tmp_path_factory.mktemp("data"), validation=OFTEN))


def opened(config) -> RunDataset:
    """The data set of a run without a mixture."""
    (part,) = open_data(config).parts
    return part


def judge_of(collator, model) -> Validator:
    (judge,) = make_validators(OFTEN, {"": collator}, TrainState(model, StateConfig()), FLOW, CPU)
    return judge


@pytest.fixture(autouse=True)
def fast(shapes_unchecked):
    """Runs of many small steps."""


def validator(data: RunDataset, encode, **change) -> Validator:
    config = replace(OFTEN, **change)
    collator = replace(data.held_out, flow_draws=LOSS_DRAWS + config.probes)
    return Validator(config, encode, FLOW, collator, CPU)


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


def validations(config) -> list[dict]:
    return [line for line in lines(config) if NLL in line]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"every": -1}, r"validation\.every must be >= 0, found -1"),
        ({"episodes": -1}, r"validation\.episodes must be >= 0"),
        ({"samples": 0}, r"validation\.samples must be >= 1"),
        ({"probes": 0}, r"validation\.probes must be >= 1, found 0; type --validation\.probes 1"),
        ({"num_flow_steps": 0}, r"validation\.num_flow_steps must be >= 1"),
        ({"solver": "euler_maruyama"}, r"must be a solver of an ODE.*found 'euler_maruyama': known: dopri5, euler, "),
        ({"probes": 1}, r"validation\.probes is for the log-likelihood, which is off; type --validation\.likelihood true"),
        ({"every": 10}, r"validation\.every 10 needs episodes.*type --validation\.episodes 6"),
    ],
)
def test_options_out_of_range(wrong, words):
    with pytest.raises(ConfigError, match=words):
        ValidationConfig(**wrong)


def test_the_density_of_a_gaussian_is_its_closed_form(data):
    """Under the exact field of data N(m, s^2 I), of the chunks inside their episode."""
    mean, scale = 0.3, 0.8
    gaussian = GaussianMixture(torch.full((1, 4, 5), mean), torch.ones(1), scale)
    judge = validator(data, lambda _: lambda x, t: gaussian.velocity(FLOW.path, x, t), solver="rk4", num_flow_steps=24, samples=64)
    found = summarize(measure(judge, 0, 1))
    batch = judge.collator(0, judge.num_chunks)
    whole = batch.action_mask[:, -1, 0]
    assert 0 < whole.sum() == judge.num_whole < judge.num_chunks, "some chunks pass the end"
    real = batch.actions[whole][batch.action_mask[whole]].double()
    nats = ((real - mean) ** 2 / (2 * scale**2) + math.log(scale * math.sqrt(2 * math.pi))).sum()
    assert found[NLL] == pytest.approx(float(nats) / judge.num_whole, rel=1e-4)
    assert found[NLL_PER_DIM] == pytest.approx(float(nats) / len(real), rel=1e-4)


def test_the_error_is_that_of_sampled_chunks_in_robot_units_and_loss_and_error_are_the_default(data):
    """Under a field that stands still a sample is its noise: the error is held against the statistics' own mean and deviation."""
    judge = validator(data, lambda _: lambda x, t: torch.zeros_like(x), likelihood=False, probes=2, num_flow_steps=16)
    found = summarize(measure(judge, 0, 1))
    assert found.keys() == {LOSS, ERROR}
    batch, width = judge.collator(0, judge.num_chunks), len(data.stats.action.mean)
    noise = judge.collator.chain.transforms[1].action.inverse(batch.noise[:, 0, :, :width].numpy())
    frames = judge.collator.source.frames[judge.collator.samples_at(np.arange(judge.num_chunks)).index]
    off = [
        abs(noise[row, step] - judge.collator.source.action[frame + step])
        for row, frame in enumerate(frames)
        for step in range(min(judge.collator.action_horizon, judge.collator.source.end[frame] - frame))
    ]
    assert found[ERROR] == pytest.approx(float(np.mean(off)), rel=1e-4)


def test_what_stands_past_an_episodes_end_changes_no_density(data):
    """A network that lets steps see each other, as ours does: near an end it met only repeated actions in training, never a zero."""

    def encode(_):
        return lambda x, t: x + x.mean(dim=1, keepdim=True)

    judge = validator(data, encode, samples=8)
    batch = judge.collator(0, 8)
    whole = batch.action_mask[:, -1, 0]
    assert 0 < whole.sum() == judge.num_whole < 8
    probes = torch.where(batch.noise[whole, LOSS_DRAWS:] < 0, -1.0, 1.0).transpose(0, 1)
    density = DensityOptions(probes, OFTEN.num_flow_steps, OFTEN.solver)
    alone = log_prob(FLOW, encode(None), batch.actions[whole], batch.action_mask[whole], density)
    assert summarize(measure(judge, 0, 1))[NLL] == pytest.approx(-float(alone.mean()), rel=1e-6)
    source = data.held_out.source
    short = replace(judge, collator=replace(judge.collator, source=replace(source, frames=source.frames[-2:])))
    assert short.num_whole == 0
    assert set(summarize(measure(short, 0, 1))) == {LOSS, ERROR}


def test_the_loss_is_trainings_own_at_fixed_noise(data):
    """Of a network that answers 0: the mean square of actions - noise over the entries inside the episode."""
    judge = validator(data, lambda _: lambda x, t: torch.zeros_like(x))
    batch = judge.collator(0, judge.num_chunks)
    errors = (batch.actions[:, None] - batch.noise[:, :LOSS_DRAWS])[batch.action_mask[:, None].expand(-1, LOSS_DRAWS, -1, -1)]
    assert summarize(measure(judge, 0, 1))[LOSS] == pytest.approx(float(errors.square().mean()), rel=1e-6)


def test_any_number_of_workers_gives_the_same_numbers_to_the_bit(data):
    torch.manual_seed(0)
    judge = judge_of(data.held_out, Pi0(data.policy.model))
    alone = measure(judge, 0, 1)
    assert len(alone) == 2, "two pieces, so that two workers have something to share"
    shared = measure(judge, 0, 2) + measure(judge, 1, 2)
    assert torch.equal(alone, shared)
    assert torch.equal(measure(judge, 0, 3) + measure(judge, 1, 3) + measure(judge, 2, 3), alone)
    assert not torch.equal(measure(judge, 0, 2), alone)


def test_noise_and_order_are_not_those_of_training(data):
    judge = judge_of(data.training, model := Pi0(data.policy.model))
    assert judge.collator.seed != data.training.seed
    assert model.training, "the network of the run is left as it is"
    a, b = judge.collator(0, 4), data.training(0, 4)
    assert not torch.equal(a.noise[:, 0], b.noise[:, 0])


def test_the_averaged_network_follows_the_average_and_costs_no_memory(data):
    model = Pi0(data.policy.model)
    state = TrainState(model, StateConfig(ema_decay=0.5))
    ema = state.average
    (judge,) = make_validators(OFTEN, {"": data.held_out}, state, FLOW, torch.device("cpu", 0))
    shadow = judge.encode.__self__
    with torch.no_grad():
        model.action_out.weight += 1
    ema.update(5)
    assert torch.equal(shadow.action_out.weight, ema.average["action_out.weight"])
    assert not torch.equal(shadow.action_out.weight, model.action_out.weight)
    assert shadow.action_out.weight.data_ptr() == ema.average["action_out.weight"].data_ptr()
    assert not any(parameter.requires_grad for parameter in shadow.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_global_is_touched(data):
    model = Pi0(data.policy.model)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    measure(judge_of(data.held_out, model), 0, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


def test_a_network_of_nan_is_named_and_stops_nothing(data, capsys):
    judge = validator(data, lambda _: lambda x, t: torch.full_like(x, math.nan))
    assert judge.validate(Parallel(ALONE), 7, lambda _: None) == {}
    said = capsys.readouterr().err
    assert "log_prob (or the network's answer) must be finite" in said
    assert f"step 7: {NLL}, {NLL_PER_DIM}, {LOSS}, {ERROR} of the held-out chunks is not finite" in said


def test_held_out_frames_are_in_no_batch_and_not_in_the_statistics(data, configure, tmp_path):
    (held,) = set(data.held_out.source.episode[data.held_out.source.frames].tolist())
    source = data.training.source
    epoch = source.frames[slots(0, len(source.frames), 0, len(source.frames)).index]
    assert held not in source.episode[epoch]
    assert len(epoch) + len(data.held_out.source.frames) == len(source.state)
    rest = tuple(sorted({0, 1, 2} - {held}))
    config = configure(tmp_path / "rest")
    chosen = opened(replace(config, dataset=replace(config.dataset, episodes=rest)))
    assert data.stats.to_json() == chosen.stats.to_json()
    assert data.policy.training["held_out_episodes"] == str(held)
    assert "held_out_episodes" not in chosen.policy.training


def test_more_episodes_than_can_be_held_out(run):
    with pytest.raises(ConfigError, match=r"0 to 1 of these 3 episodes of 2 tasks.*found 2; type --validation\.episodes 1"):
        train(ALONE, run("many", validation=replace(OFTEN, episodes=2)))


@pytest.fixture(scope="module")
def whole(configure, tmp_path_factory):
    """Four steps without a break, validated after 2 and 4."""
    config = configure(tmp_path_factory.mktemp("runs") / "whole", steps=4, checkpoint_every=2, validation=OFTEN)
    claim(config)
    train(ALONE, config)
    return config


def test_a_run_writes_its_validations_and_is_not_changed_by_them(run, whole):
    assert [line["step"] for line in validations(whole)] == [2, 4]
    assert all(set(line) == {"step", NLL, NLL_PER_DIM, LOSS, ERROR} for line in validations(whole))
    assert len({line[NLL] for line in validations(whole)}) == 2, "the weights moved"
    assert read_last(whole.output_dir)["step"] == 4
    silent = run("silent", steps=4, checkpoint_every=2, validation=ValidationConfig(episodes=1))
    claim(silent)
    train(ALONE, silent)
    expected = load_file(silent.output_dir / "bundle/model.safetensors")
    found = load_file(whole.output_dir / "bundle/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    losses = [[line["loss"] for line in lines(config) if "loss" in line] for config in (whole, silent)]
    assert losses[0] == losses[1]
    assert bundle.read(whole.output_dir / "bundle")[0].training["held_out_episodes"] in ("0", "2")


def test_a_run_killed_in_a_validation_keeps_its_checkpoint_and_makes_up_for_it(run, whole, monkeypatch):
    config = run("killed", steps=4, checkpoint_every=2, validation=OFTEN)
    claim(config)
    real = Validator.validate

    def mortal(self, context, step, notice):
        if step == 2:
            raise KeyboardInterrupt
        return real(self, context, step, notice)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "validate", mortal)
        with pytest.raises(KeyboardInterrupt):
            train(ALONE, config)
    assert checkpoint.whole(config.output_dir / "checkpoints")[-1] == 2
    assert validations(config) == []
    train(ALONE, replace(config, resume="true"))
    assert validations(config) == validations(whole)
    train(ALONE, replace(config, resume="true"))
    assert validations(config) == validations(whole), "a finished run has nothing to make up for"
