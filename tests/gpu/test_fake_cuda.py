"""Tests of the CUDA path on fake tensors: no tensor remains on the host, and no hot loop reads a value."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import device_cases
import pytest
import torch
from fake_cuda import CUDA, Stepped, fake_cuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pi0fm.bench.harness.cases import random_observations, random_robot
from pi0fm.data.loading.batch import Batch
from pi0fm.flow.config import FIXED_GRID_SOLVERS, FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import PRESETS, LoraConfig, Pi0Config
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.sampling import cuda_graphs, sampler
from pi0fm.policy.sampling.sampler import Sampler
from pi0fm.train.components import Adaptation, OptimizerConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import make_optimizer
from pi0fm.train.plan.flops import empty_network
from pi0fm.train.start.adaptation import adapt
from pi0fm.train.step import train_step
from pi0fm.train.watch.validation import LOSS_DRAWS, _loss

# layers are alike: two of each tower show what a tensor's device and a look at a value depend on
SIZES = {
    name: replace(preset, vision=replace(preset.vision, depth=2), decoder=replace(preset.decoder, depth=2))
    for name, preset in PRESETS.items()
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
pytestmark = [pytest.mark.usefixtures("shapes_unchecked"), pytest.mark.timeout(180)]


@pytest.fixture
def cuda(monkeypatch):
    with fake_cuda(monkeypatch) as looks:
        yield looks


def on_cuda(config: Pi0Config, how: Adaptation | None = None) -> Pi0:
    with torch.device(CUDA):
        model = empty_network(config)
    return model.requires_grad_(True) if how is None else adapt(model.requires_grad_(True), how, torch.bfloat16)


def batch(config: Pi0Config, draws: int = 1) -> Batch:
    """On the host, as the loader leaves it."""
    return device_cases.make_batch(config, size=2, cameras=2, draws=draws)


HOW = {
    "full": Adaptation(),
    "checkpointed": Adaptation(activation_checkpointing="full"),
    "selectively checkpointed": Adaptation(activation_checkpointing="selective"),
    "expert, frozen in bfloat16": Adaptation("expert_only", frozen_bfloat16=True),
    "lora": Adaptation(lora=LoraConfig(rank=4), frozen_bfloat16=True),
}


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize(
    ("how", "precision"), [(how, word) for how in HOW for word in PRECISIONS if word == "bfloat16" or not HOW[how].frozen_bfloat16]
)
def test_a_training_step_looks_at_nothing(cuda, name, precision, how):
    """Forward, loss, clipping, AdamW and average; the batch comes from the host, and its two flow draws share a prefix."""
    config = SIZES[name]
    model = on_cuda(config, HOW[how]).train()
    flow, optimizer, ema = FlowMatching.from_config(FlowConfig()), make_optimizer(OptimizerConfig(), model), Ema(model, 0.9)
    given = batch(config, draws=2)
    loss, norm = train_step(model, flow, optimizer, Stepped(model, PRECISIONS[precision]), itertools.repeat(given), 9, 1.0)
    ema.update(0)
    assert loss.device == norm.device == CUDA
    assert cuda.found == []


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_sampling_looks_at_nothing(cuda, name, precision):
    """Every solver of fixed steps, from an observation and noise on the host."""
    config = SIZES[name]
    for solver in FIXED_GRID_SOLVERS:
        flow = FlowMatching.from_config(FlowConfig(solver=solver, num_flow_steps=2))
        plain = Sampler(on_cuda(config), flow, CUDA, PRECISIONS[precision])
        given = batch(config)
        noise, mask = given.noise[:, 0].to(CUDA), given.action_mask.to(CUDA)
        with torch.no_grad(), plain.precision():
            chunk = flow.sample(plain.cached_velocity(plain.prepared(given.observation)), noise, mask=mask, check=False)
        assert chunk.device == CUDA and chunk.dtype == torch.float32
    assert cuda.found == []


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_served_batch_waits_for_its_answer_alone(cuda, name, precision):
    """The call that the batcher makes, from robots' observations to their actions."""
    config = SIZES[name]
    flow = FlowMatching.from_config(FlowConfig(num_flow_steps=3))
    robot, stats = random_robot(config, cameras=2)
    policy = LocalPolicy(on_cuda(config), flow, robot.chain(stats), {}, CUDA, PRECISIONS[precision])
    given = random_observations(policy, 3, seed=0)
    chunks = policy.infer_batch(given, [1, 2, 3])
    assert [chunk.actions.shape for chunk in chunks] == [(config.action_horizon, 7)] * 3
    assert sorted(cuda.found) == ["checks.py:check_finite", "local.py:_on_host"], "finite? spread and actions"


class Copies(TorchDispatchMode):
    """Notes copies between host and card, and every operation on the host that is large enough for torch's threads to share it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        kinds = {tensor.device.type for tensor in given}
        if kinds == {"cpu", "cuda"}:
            self.found.append(f"{given[1].device.type} to {given[0].device.type}")
        elif func.namespace == "aten" and not func.is_view and kinds == {"cpu"} and max(tensor.numel() for tensor in given) >= SHARED:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


SHARED = 32768
"""Numbers from which torch shares an operation on the host between its threads (its grain size)."""


@pytest.fixture
def recording(monkeypatch):
    """Policies that record, of the plain layers; the replay gives the recorded answer. The list has an entry for each wait for the card."""
    waits = []

    def record(call):
        answer = call()
        return lambda: answer

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: waits.append(1)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(sampler, "_with_fused_layers", lambda _: None)
    monkeypatch.setattr(sampler, "check_finite", lambda *_: None)  # it looks at the host's numbers, which are fake here
    monkeypatch.setattr(cuda_graphs, "Recorder", lambda _: record)
    return waits


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("size", [1, 3])
def test_a_recorded_call_copies_once_to_the_card_and_once_back_and_waits_once(cuda, recording, name, size):
    """And on the host no thread but the caller's works on a picture, unless a row is repeated: the slowest would be waited for."""
    config = SIZES[name]
    robot, stats = random_robot(config, cameras=2)
    flow = FlowMatching.from_config(FlowConfig(num_flow_steps=2))
    policy = LocalPolicy(on_cuda(config), flow, robot.chain(stats), {}, CUDA, torch.bfloat16, compile="graph")
    given, seeds = random_observations(policy, size, seed=0), list(range(size))
    for _ in range(2):
        recording.clear()
        with Copies() as copies:
            chunks = policy.infer_batch(given, seeds)
    assert [found for found in copies.found if found != "index" or size == 1] == ["cpu to cuda", "cuda to cpu"]
    assert recording == [1] and cuda.found == []
    assert [chunk.actions.shape for chunk in chunks] == [(config.action_horizon, 7)] * size


@pytest.mark.parametrize("name", list(SIZES))
def test_validation_waits_for_nothing_between_its_pieces(cuda, name):
    config = SIZES[name]
    model, flow = on_cuda(config).eval(), FlowMatching.from_config(FlowConfig())
    given = batch(config, draws=LOSS_DRAWS).to(CUDA)
    with torch.no_grad():
        total, count = _loss(flow, model.cached_velocity(given.observation), given)
    assert total.device == count.device == CUDA and total.dtype == torch.float64
    assert cuda.found == []


class Faulty(nn.Module):
    """A tower with a fault planted behind it."""

    def __init__(self, tower: nn.Module, fault: str) -> None:
        super().__init__()
        self.tower, self.fault = tower, fault

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        tokens = self.tower(pictures)
        if self.fault == "host":
            return tokens + torch.ones(tokens.shape[-1], device="cpu")
        return tokens * 2 if tokens.sum().item() > 1 else tokens


@pytest.mark.parametrize("fault", ["host", "look"])
def test_a_planted_fault_is_found(cuda, fault):
    config = SIZES["tiny"]
    model = on_cuda(config).requires_grad_(False)
    model.vision = Faulty(model.vision, fault)
    seen = batch(config).to(CUDA).observation
    if fault == "host":
        with pytest.raises(RuntimeError, match="two different devices"):
            model.encode_prefix(seen)
        return
    model.encode_prefix(seen)
    assert len(cuda.found) == 1


def test_a_planted_wait_in_a_step_is_found(cuda, monkeypatch):
    config = SIZES["tiny"]
    model = on_cuda(config, HOW["full"]).train()
    optimizer, flow = make_optimizer(OptimizerConfig(), model), FlowMatching.from_config(FlowConfig())
    clip = optimizer.clip
    monkeypatch.setattr(optimizer, "clip", lambda largest: clip(largest) if float(clip(largest)) < 1e9 else None)
    train_step(model, flow, optimizer, Stepped(model, torch.float32), itertools.repeat(batch(config)), 9, 1.0)
    assert len(cuda.found) == 1
