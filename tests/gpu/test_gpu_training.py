"""Tests of the optimiser, trained parameters and a step on the device against the host; no step waits for the device."""

import copy
import itertools
import signal
import subprocess
import time
from dataclasses import replace

import programs
import pytest
import torch
from accelerate.state import AcceleratorState
from device_cases import FLOW, Synthetic, apart, configuration, gradient_apart, gradients, make_batch, mean_loss, on
from small_pi0 import network
from torch import nn

from pi0fm.data.config import LoaderConfig
from pi0fm.data.loading.batch import Batch
from pi0fm.data.loading.loader import micro_batches
from pi0fm.models.config import LoraConfig
from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import Adaptation, OptimizerConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import ClippedAdamW, make_optimizer
from pi0fm.train.parallel.accelerate import make_accelerator
from pi0fm.train.start.adaptation import adapt, plain_weights
from pi0fm.train.step import train_step

CPU = torch.device("cpu")
PI0 = configuration("pi0", "small")
HOW = {
    "full": Adaptation(),
    "checkpointed": Adaptation(activation_checkpointing="full"),
    "selectively checkpointed": Adaptation(activation_checkpointing="selective"),
    "expert only": Adaptation("expert_only"),
    "lora": Adaptation(lora=LoraConfig(rank=2)),
}


def trained(
    device: torch.device, how: Adaptation, batches: list[Batch], name: str = "pi0", wrap=lambda model: model
) -> tuple[Pi0, list[float]]:
    """A network after a step on each batch, and the losses."""
    AcceleratorState._reset_state(reset_partial_state=True)  # which holds a process to the first device that it trained on
    torch.manual_seed(7)  # the adapters'
    model = adapt(network(configuration(name, "small")), how, torch.float32).to(device).train()
    accelerator = make_accelerator("float32", 1, allow_cuda=device.type == "cuda")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), model)
    wrapped, losses = wrap(model), []
    for batch in batches:
        valid = int(batch.action_mask.sum()) * batch.uniform.shape[1]
        loss, _ = train_step(wrapped, FLOW, optimizer, accelerator, iter([batch]), valid, 1.0)
        losses.append(float(loss))
    return model, losses


@pytest.mark.parametrize("how", list(HOW))
def test_three_steps_are_the_host_s(device, how):
    batches = [make_batch(PI0, size=4, seed=seed, draws=2) for seed in range(3)]
    (here, expected), (there, losses) = trained(CPU, HOW[how], batches), trained(device, HOW[how], batches)
    assert losses == pytest.approx(expected, rel=1e-4)
    ours, theirs = (dict(plain_weights(model.state_dict(), HOW[how])) for model in (there, here))
    # AdamW's first steps have the size of the learning rate even where a gradient is rounding alone
    assert {name: apart(ours[name], theirs[name]) for name in theirs if apart(ours[name], theirs[name]) > 2e-3} == {}
    start = network(PI0).state_dict()
    moved = {name for name in theirs if apart(ours[name], start[name]) > 0}
    frozen = {name for name, parameter in network(PI0).named_parameters() if name.startswith("vision.")}
    assert (moved & frozen == set()) == (how == "expert only")


def test_pi05_trains_as_on_the_host(device):
    batches = [make_batch(configuration("pi05", "small"), size=4, seed=seed) for seed in range(2)]
    assert trained(device, HOW["full"], batches, "pi05")[1] == pytest.approx(trained(CPU, HOW["full"], batches, "pi05")[1], rel=1e-4)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_steps_with_held_rows_are_the_host_s(device, name):
    """As `--rtc.max_delay` trains: first rows of a chunk clean, at flow time 1, without a loss; each draw with its delay."""
    delays = torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1]])
    config = configuration(name, "small")
    batches = [replace(make_batch(config, size=4, seed=seed, draws=2), delays=delays.roll(seed, 0)) for seed in range(2)]
    free = [replace(batch, delays=None) for batch in batches]
    expected, found = trained(CPU, HOW["full"], batches, name)[1], trained(device, HOW["full"], batches, name)[1]
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(abs(held / all_free - 1) for held, all_free in zip(found, trained(device, HOW["full"], free, name)[1], strict=True)) > 1e-2


def test_frozen_bfloat16_keeps_what_trains_in_float32(device):
    how = Adaptation("expert_only", frozen_bfloat16=True)
    model, exact = adapt(on(device), how, torch.bfloat16).train(), adapt(on(CPU), Adaptation("expert_only"), torch.bfloat16).train()
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32}
    batch = make_batch(PI0)
    with torch.autocast(device.type, torch.bfloat16):
        loss = mean_loss(model, batch.to(device))[1]
    expected = mean_loss(exact, batch)[1]
    loss.backward()
    expected.backward()
    assert apart(loss, expected) < 2e-2
    worst = gradient_apart(gradients(model), gradients(exact))
    assert max(worst.values()) < 0.15, worst


def made_optimizer(device: torch.device) -> tuple[list[nn.Parameter], ClippedAdamW]:
    random = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=random).to(device)) for shape in ((5, 7), (11,), (64, 32))]
    return weights, ClippedAdamW([{"params": weights, "weight_decay": 0.1}], 1e-2, (0.9, 0.95))


def test_the_optimiser_is_adamw_on_clipped_gradients(device):
    weights, ours = made_optimizer(device)
    copies = [nn.Parameter(weight.detach().double().cpu()) for weight in weights]
    plain = torch.optim.AdamW(copies, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    random = torch.Generator().manual_seed(1)
    for _ in range(4):
        for weight, exact in zip(weights, copies, strict=True):
            gradient = torch.randn(exact.shape, generator=random)
            weight.grad, exact.grad = gradient.to(device), gradient.double()
        norm = ours.clip(0.5)
        expected = nn.utils.clip_grad_norm_(copies, 0.5)
        ours.step()
        plain.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    for weight, exact in zip(weights, copies, strict=True):
        assert apart(weight, exact) < 1e-5


@pytest.mark.parametrize("wild", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(device, wild):
    weights, ours = made_optimizer(device)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    ours.clip(1.0)
    ours.step()
    kept = [weight.detach().clone() for weight in weights]
    moments = copy.deepcopy([ours.state[weight] for weight in weights])
    weights[1].grad[3] = wild
    norm = ours.clip(1.0)
    ours.step()
    assert not norm.isfinite()
    assert all(torch.equal(weight, before) for weight, before in zip(weights, kept, strict=True))
    for weight, before in zip(weights, moments, strict=True):
        assert all(torch.equal(ours.state[weight][name], value) for name, value in before.items())


def test_a_batch_that_is_not_finite_is_no_step(device):
    good, bad = make_batch(PI0, size=4), make_batch(PI0, size=4, seed=1)
    bad.actions[1, 0, 0] = torch.nan
    (with_it, losses), (without, _) = trained(device, HOW["full"], [good, bad]), trained(device, HOW["full"], [good])
    assert losses[1] != losses[1]
    same = gradient_apart(dict(with_it.named_parameters()), dict(without.named_parameters()))
    assert max(same.values()) <= (0 if device.type == "cpu" else 1e-6)


def test_the_average_follows_the_weights(device):
    model = on(device)
    ema, exact = Ema(model, 0.9), {name: value.detach().double().cpu() for name, value in model.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        exact = {name: decay * exact[name] + (1 - decay) * value.detach().double().cpu() for name, value in model.named_parameters()}
    assert max(apart(ema.weights()[name], value) for name, value in exact.items()) < 1e-6


def test_batches_arrive_whole_and_in_order(device):
    """Page-locked and copied ahead on a GPU; noise, times and order are the host's, bit for bit."""
    collator, config = Synthetic(PI0), LoaderConfig(threads=2, ahead=2)
    share = (8, 0, 1, 4)
    found = list(micro_batches(collator, 0, 3, *share, config, device))
    expected = [collator(first, 4) for first in range(0, 24, 4)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.named().items():
            assert ours.named()[name].device.type == device.type
            assert torch.equal(ours.named()[name].cpu(), value), name
    flow_times = [FLOW.times(batch.to(device).uniform.flatten()).cpu() for batch in expected]
    assert all(apart(times, FLOW.times(batch.uniform.flatten())) < 1e-6 for times, batch in zip(flow_times, expected, strict=True))


def test_no_step_waits_for_the_device(device):
    """Forward, backward, clipping, step and average: torch raises at the first look at a value."""
    model, accelerator = on(device).train(), make_accelerator("float32", 1, allow_cuda=device.type == "cuda")
    optimizer, ema, batch = make_optimizer(OptimizerConfig(), model), Ema(model, 0.9), make_batch(PI0, size=4).to(device)
    valid = int(batch.action_mask.sum())

    def steps(count: int) -> None:
        for step in range(count):
            train_step(model, FLOW, optimizer, accelerator, itertools.repeat(batch), valid, 1.0)
            ema.update(step)

    steps(2)
    if device.type != "cuda":
        return steps(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("shapes_unchecked")
def test_one_distributed_worker_trains_as_none(device):
    """DDP on nccl (gloo on a CPU). There is no FSDP2 in this code yet: nothing here stands for it."""
    batches = [make_batch(PI0, size=4, seed=seed) for seed in range(3)]
    alone, expected = trained(device, HOW["full"], batches)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        wrap = lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)  # noqa: E731
        worker, losses = trained(device, HOW["full"], batches, wrap=wrap)
    finally:
        torch.distributed.destroy_process_group()
    assert losses == pytest.approx(expected, rel=1e-6)
    worst = gradient_apart(dict(worker.named_parameters()), dict(alone.named_parameters()))
    assert max(worst.values()) <= (0 if device.type == "cpu" else 1e-4), worst


@pytest.mark.journey
def test_a_killed_training_goes_on_from_its_checkpoint(device, tmp_path):
    """Checkpoints written behind the training's back; SIGKILL in mid-run; the rest gives what an uninterrupted run gives."""
    run = {"env": programs.environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(programs.command("device_training", device.type, str(tmp_path / "killed"), "100000"), **run)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "killed").glob("step-*/COMMIT")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    assert list((tmp_path / "killed").glob("step-*/COMMIT")), said[-3000:]
    ends = [programs.last_line("device_training", device.type, str(tmp_path / folder), "0").split() for folder in ("killed", "whole")]
    (first, last, *killed), (began, end, *whole) = ends
    assert int(began) == 0 < int(first) and last >= end
    if last == end:
        assert [float(value) for value in killed] == pytest.approx([float(value) for value in whole], rel=1e-4)
