"""Optimiser steps at full size, on batches in device memory.

Owns: the cases, growing batches until memory runs out, estimated and peak memory. Does not know: data sets, checkpoints.

    full, checkpointed    with and without the moving average; the batch grows until the device runs out of memory
    expert only, LoRA     the largest batch of a few that fits
"""

import functools
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pi0fm.bench.card.inference import GIB
from pi0fm.bench.card.results import OUT_OF_MEMORY, Results
from pi0fm.bench.card.work import training_flops
from pi0fm.bench.harness.cases import CAMERAS, make_batch, random_network
from pi0fm.bench.harness.limits import Rates, device_seconds, forget_peak, measure_rates, peak_bytes, percentile, synchronize
from pi0fm.bench.harness.sizes import Case
from pi0fm.bench.harness.steps import PARTS, StepClock, Trainer, their_loss, their_step
from pi0fm.data.loading.batch import Batch
from pi0fm.models.config import PI0, TINY, LoraConfig, Pi0Config
from pi0fm.train.components import Adaptation
from pi0fm.train.plan.memory import estimate
from pi0fm.train.start.adaptation import adapt
from pi0fm.train.state import StateConfig

START, STEPS, PEER = 10.0, 5, 32.0  # seconds until the first case, steps of a figure, seconds of LeRobot's case
COMPILATION = 49.0  # seconds of the three graphs of full fine-tuning


@dataclass(frozen=True)
class TrainingCase:
    """A way to train. batches: sizes in ascending order; the case ends with the first that does not fit.

    rate: samples/s that are expected, for the time that a figure takes; compilation: seconds, 0 for plain layers.
    """

    name: str
    how: Adaptation
    averaged: bool
    batches: tuple[int, ...]
    target: str = ""
    rate: float = 25.0
    compilation: float = 0.0

    def seconds(self, size: int) -> float:
        """Seconds of the figure of a batch size: network, batch and estimate, compilation where it is the first, steps."""
        return 2.0 + self.compilation * (size == self.batches[0]) + STEPS * size / self.rate


def cases() -> list[TrainingCase]:
    """Cases in order: the one that LeRobot's step is compared with, those never measured, then those in docs/gpu.md.

    Seconds on the H100 of docs/gpu.md, compilation last, since it may take longer and be killed; rows stay on disk:

        start                       10       LoRA, 64               15
        full, 32, and LeRobot's     40       expert, compiled       45      of which 35 compilation: no backward pass of the prefix
        selective, 16 and 32        14       LoRA, compiled         76      of which 63: its graphs have 1.29 times full's nodes
        with average, 32             8                            = 208     of 220; what follows is measured again where time is left

    Full fine-tuning's compilation: 117 s of a part, less 46 of steps, 8 to start, 14 for seven figures.
    """
    full, lora = Adaptation(activation_checkpointing="full"), LoraConfig(rank=16)
    adapted = Adaptation(lora=lora, frozen_bfloat16=True, activation_checkpointing="full")
    expert, selective = Adaptation("expert_only", frozen_bfloat16=True), Adaptation(activation_checkpointing="selective")
    plain, fast = "full, checkpointed, no average", ">= 26 samples/s"
    return [
        TrainingCase(plain, full, False, (32,), fast),
        TrainingCase("full, selectively checkpointed, no average", selective, False, (16, 32), fast),
        TrainingCase("full, checkpointed, with average", full, True, (32,)),
        TrainingCase("LoRA 16, checkpointed", adapted, True, (64,), ">= 30 samples/s"),
        TrainingCase("expert only, compiled", expert, True, (128,), rate=80.0, compilation=35.0),
        TrainingCase("LoRA 16, checkpointed, compiled", adapted, True, (64,), ">= 30 samples/s", 30.0, 63.0),
        TrainingCase(f"{plain}, compiled", full, False, (32, 64), fast, 30.0, COMPILATION),
        TrainingCase("expert only", expert, True, (64, 128), ">= 60 samples/s", 90.0),
        TrainingCase(plain, full, False, (64, 96), fast),
    ]


def measure(results: Results, device: torch.device, whole: bool) -> None:
    """Run all cases. whole: at full size; else the tiny preset with two small batches."""
    rates = measure_rates(device, whole=whole)
    results.add("bfloat16 product rate", rates.flops_per_second[torch.bfloat16] / 1e12, "TFLOP/s")
    for number, case in enumerate(cases()):
        tried = case if whole else replace(case, batches=(1, 2))
        needed = case.seconds(case.batches[0]) if whole else 1
        results.attempt(f"training, {case.name}", functools.partial(_grow, results, tried, device, rates, whole), needed, clear)
        clear()
        if number == 0:
            results.attempt("training, LeRobot's PI0, full", functools.partial(_peer, results, device, whole), PEER if whole else 1, clear)


def clear() -> None:
    """Release the last case's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepared(config: Pi0Config, case: TrainingCase, device: torch.device) -> Trainer:
    """Build network, optimiser and average on the device, as `pi0fm train` does."""
    model = adapt(random_network(config, device), case.how, torch.bfloat16).to(device)
    if case.compilation:
        model.compile_layers()
    return Trainer.for_network(model, "bfloat16", device, StateConfig(adaptation=case.how, ema_decay=0.999 if case.averaged else None))


def full_batch(config: Pi0Config, size: int, device: torch.device) -> Batch:
    """Make a batch without padding on the device."""
    return make_batch(Case(config, (True,) * len(CAMERAS), config.max_prompt_tokens, size), seed=0).to(device)


def _grow(results: Results, case: TrainingCase, device: torch.device, rates: Rates, whole: bool) -> None:
    config = PI0 if whole else TINY
    trainer = prepared(config, case, device)
    flops = training_flops(config, case.how, len(CAMERAS))

    def forget() -> None:
        trainer.state.optimizer.zero_grad(set_to_none=True)
        clear()

    for size in case.batches:
        what = f"training, {case.name}, batch {size}"
        one = functools.partial(_one, results, what, case, trainer, size, flops, rates, whole)
        reason = results.attempt(what, one, case.seconds(size) if whole else 0.5, forget)
        if reason:
            if reason == OUT_OF_MEMORY:
                break
            return


def _one(results: Results, what: str, case: TrainingCase, trainer: Trainer, size: int, flops: float, rates: Rates, whole: bool) -> None:
    config, device = trainer.state.network.config, trainer.parallel.device
    clock, batch = StepClock(device), full_batch(config, size, device)
    given = itertools.repeat(batch), batch.action_mask.numel()
    forget_peak(device)
    for _ in range(2):
        trainer.step(*given)
    synchronize(device)
    steps = STEPS - 2 if whole else 2
    for _ in range(steps):
        trainer.step(*given, clock.mark)
    each = {part: seconds / steps for part, seconds in clock.seconds().items()}
    seconds = sum(each.values())
    peak = peak_bytes(device)
    guess = estimate(config, case.how, cameras=len(CAMERAS), micro_batch=size, averaged=case.averaged, device=device.type).total
    note = ", ".join(f"{part} {1e3 * each[part]:.0f} ms" for part in PARTS)
    note += f"; {peak / GIB:.1f} GiB" + (f", estimate {guess / peak:.2f} of it" if peak else "")
    results.add(
        what,
        size / seconds,
        "samples/s",
        limit_share=rates.seconds({torch.bfloat16: flops * size}, 0) / seconds,
        target=case.target,
        note=note,
        step_ms=1e3 * seconds,
        parts_ms={part: 1e3 * value for part, value in each.items()},
        peak_gib=peak / GIB,
        estimate_gib=guess / GIB,
        tflop_a_sample=flops / 1e12,
    )


def _peer(results: Results, device: torch.device, whole: bool) -> None:
    """Time LeRobot's network in float32 under autocast, checkpointed, with growing batch and torch's fused AdamW, like ours."""
    from pi0fm.bench.card import peer  # LeRobot, where it can be imported

    if not whole:  # LeRobot has no small network: only the import can be tried
        peer.imported()
        return
    model = peer.network(device, "float32").train()
    model.gradient_checkpointing_enable()
    for size in (16, 32):
        what = f"training, LeRobot's PI0, full, checkpointed, batch {size}"
        optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-5, fused=True)
        step = their_step(their_loss(model, full_batch(PI0, size, device), device), optimizer, clip_norm=1.0, autocast=device)
        if results.attempt(what, functools.partial(_peer_step, results, what, step, device, size), 6):
            return


def _peer_step(results: Results, what: str, step: Callable[[], object], device: torch.device, size: int) -> None:
    forget_peak(device)
    seconds = percentile(device_seconds(step, device, 3, warm_up=2), 0.5)
    note = f"{peak_bytes(device) / GIB:.1f} GiB"
    results.add(what, size / seconds, "samples/s", target="ours >= 2 x", note=note, step_ms=1e3 * seconds)
