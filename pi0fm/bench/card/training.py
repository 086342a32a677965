"""Optimiser steps at full size, on batches that are on the device.

Owns: the cases, growing batches until memory ends, the estimate beside the peak. Does not know: data sets, checkpoints.

    full, checkpointed    with the moving average and without; the batch grows until the device has no memory left
    expert only, LoRA     the largest batch of a few that fits
"""

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pi0fm.bench.card.inference import GIB
from pi0fm.bench.card.limits import (
    Rates,
    device_seconds,
    forget_peak,
    measure_rates,
    peak_bytes,
    percentile,
    synchronize,
    training_flops,
)
from pi0fm.bench.card.policies import random_network
from pi0fm.bench.card.results import OUT_OF_MEMORY, Results
from pi0fm.bench.step_clock import PARTS, StepClock, clocked_step
from pi0fm.data.loading.batch import Batch
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.lora import LoraConfig
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0Config
from pi0fm.models.presets import PI0, TINY
from pi0fm.train.parallel.accelerate import Accelerator, Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.plan.memory import estimate
from pi0fm.train.start.adaptation import Adaptation, adapt
from pi0fm.train.state import StateConfig, TrainState
from pi0fm.train.step import train_step

CAMERAS = 3


@dataclass(frozen=True)
class Case:
    """One way to train. batches: in growing order; the case ends with the first that does not fit."""

    name: str
    how: Adaptation
    averaged: bool
    compiled: bool
    batches: tuple[int, ...]
    target: str = ""


def cases() -> list[Case]:
    """In order of worth."""
    full, lora = Adaptation(activation_checkpointing=True), LoraConfig(rank=16)
    adapted = Adaptation(lora=lora, frozen_bfloat16=True, activation_checkpointing=True)
    expert = Adaptation("expert_only", frozen_bfloat16=True)
    found = [
        Case("full, checkpointed, no average", full, False, False, (8, 16, 32, 48, 64, 96), ">= 26 samples/s"),
        Case("expert only", expert, True, False, (32, 64, 128), ">= 60 samples/s"),
        Case("LoRA 16, checkpointed", adapted, True, False, (32, 64), ">= 30 samples/s"),
        Case("full, checkpointed, with average", full, True, False, (4, 8, 16, 24)),
    ]
    found.insert(1, replace(found[0], name="full, checkpointed, no average, compiled", compiled=True, batches=(32, 48, 64)))
    found.append(replace(found[2], name="expert only, compiled", compiled=True, batches=(64, 128)))
    return found


def measure(results: Results, device: torch.device, whole: bool) -> None:
    """All cases. whole: at full size; else the tiny preset with two small batches."""
    rates = measure_rates(device, whole)
    results.add("bfloat16 product rate", rates.flops_per_second / 1e12, "TFLOP/s")
    for case in cases():
        tried = case if whole else replace(case, batches=(1, 2))
        results.attempt(f"training, {case.name}", functools.partial(_grow, results, tried, device, rates, whole), 12 if whole else 1, clear)
        clear()
    results.attempt("training, LeRobot's PI0, full", functools.partial(_peer, results, device, whole), 15 if whole else 1, clear)


def clear() -> None:
    """Give back what the last case held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Trained:
    """All that a step needs but its batch."""

    config: Pi0Config
    state: TrainState
    accelerator: Accelerator
    flow: FlowMatching

    def step(self, batches: Iterator[Batch], valid: int) -> tuple[Any, ...]:
        """The arguments of `train_step`."""
        return self.state.trained, self.flow, self.state.optimizer, self.accelerator, batches, valid, 1.0


def prepared(config: Pi0Config, case: Case, device: torch.device) -> Trained:
    """Network, optimiser and average on the device, as `pi0fm train` makes them."""
    parallel = Parallel(Context(), "bfloat16", 1, allow_cuda=device.type == "cuda")
    model = adapt(random_network(config, device), case.how, torch.bfloat16).to(device)
    if case.compiled:
        model.compile_layers()
    state = TrainState(model, StateConfig(adaptation=case.how, ema_decay=0.999 if case.averaged else None))
    state.prepare(parallel)
    return Trained(config, state, parallel.accelerator, FlowMatching.from_config(FlowConfig()))


def random_batch(config: Pi0Config, size: int, device: torch.device) -> Batch:
    """Made on the device; every camera, token and action is real."""
    random = torch.Generator(device).manual_seed(0)
    side, shape = config.vision.image_size, (size, config.action_horizon, config.action_dim)
    made = functools.partial(torch.randn, generator=random, device=device)
    return Batch(
        observation=ModelObservation(
            images=torch.randint(0, 256, (size, CAMERAS, side, side, 3), dtype=torch.uint8, generator=random, device=device),
            image_mask=torch.ones(size, CAMERAS, dtype=torch.bool, device=device),
            prompt_tokens=torch.randint(3, config.vocab_size, (size, config.max_prompt_tokens), generator=random, device=device),
            prompt_mask=torch.ones(size, config.max_prompt_tokens, dtype=torch.bool, device=device),
            state=made(size, config.state_dim),
        ),
        actions=made(*shape),
        action_mask=torch.ones(shape, dtype=torch.bool, device=device),
        noise=made(size, 1, *shape[1:]),
        uniform=torch.rand(size, 1, generator=random, device=device),
    )


def _grow(results: Results, case: Case, device: torch.device, rates: Rates, whole: bool) -> None:
    config = PI0 if whole else TINY
    trained = prepared(config, case, device)
    flops = training_flops(config, case.how, CAMERAS)
    for size in case.batches:
        what = f"training, {case.name}, batch {size}"
        one = functools.partial(_one, results, what, case, trained, size, flops, rates, device, whole)
        reason = results.attempt(what, one, 4 if whole else 0.5, functools.partial(_forget, trained))
        if reason:
            if reason == OUT_OF_MEMORY:
                break
            return


def _one(
    results: Results, what: str, case: Case, trained: Trained, size: int, flops: float, rates: Rates, device: torch.device, whole: bool
) -> None:
    config, clock = trained.config, StepClock(device)
    batch = random_batch(config, size, device)
    given = trained.step(itertools.repeat(batch), batch.action_mask.numel())
    forget_peak(device)
    for _ in range(2):
        train_step(*given)
        trained.state.advance()
    synchronize(device)
    steps = (4 if size < 32 else 3) if whole else 2
    for _ in range(steps):
        clocked_step(clock, trained.state.advance, *given)
    each = {part: seconds / steps for part, seconds in clock.seconds().items()}
    seconds = sum(each.values())
    peak = peak_bytes(device)
    guess = estimate(config, case.how, cameras=CAMERAS, micro_batch=size, averaged=case.averaged, device=device.type).total
    note = ", ".join(f"{part} {1e3 * each[part]:.0f} ms" for part in PARTS)
    note += f"; {peak / GIB:.1f} GiB" + (f", estimate {guess / peak:.2f} of it" if peak else "")
    results.add(
        what,
        size / seconds,
        "samples/s",
        limit_share=flops * size / seconds / rates.flops_per_second,
        target=case.target,
        note=note,
        step_ms=1e3 * seconds,
        parts_ms={part: 1e3 * value for part, value in each.items()},
        peak_gib=peak / GIB,
        estimate_gib=guess / GIB,
        tflop_a_sample=flops / 1e12,
    )


def _peer(results: Results, device: torch.device, whole: bool) -> None:
    """LeRobot's network in float32 under autocast, at growing batch."""
    from pi0fm.bench.card import peer  # LeRobot, where it can be imported

    if not whole:  # LeRobot has no small network: the import is what can be tried
        peer.imported()
        return
    model = peer.network(device, "float32")
    for size in (8, 16, 32):
        what = f"training, LeRobot's PI0, full, checkpointed, batch {size}"
        if results.attempt(what, functools.partial(_peer_step, results, what, peer.training(model, device, size), device, size), 6):
            return


def _peer_step(results: Results, what: str, step: Callable[[], object], device: torch.device, size: int) -> None:
    forget_peak(device)
    seconds = percentile(device_seconds(step, device, 3, warm_up=2), 0.5)
    note = f"{peak_bytes(device) / GIB:.1f} GiB"
    results.add(what, size / seconds, "samples/s", target="ours >= 2 x", note=note, step_ms=1e3 * seconds)


def _forget(trained: Trained) -> None:
    trained.state.optimizer.zero_grad(set_to_none=True)
    clear()
