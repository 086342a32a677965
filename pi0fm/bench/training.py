"""One optimiser step on the same batch: LeRobot's PI0 against ours; what 8 flow draws cost; the memory of each side.

Owns: what each side's step consists of, which process measures what, the bounds within which losses and gradients must agree.
Does not know: how its report is shown.

    LeRobot   its model's forward with noise and time given -> mean -> backward -> clip -> AdamW, as its `update_policy` does
    ours      train.step.train_step, the very function of `pi0fm train`, with accelerate's precision

    this process                imports neither side
      |- like_for_like          both sides, in turns
      |- as_shipped             both sides, in turns
      |- flow draws             8 draws against 1 of ours
      '- memory                 one side alone, a process for each side, case and mode

Neither side's step reads data or averages weights. Ours takes its batch as the chain leaves it: bytes of pictures. A mode has a process of
its own since accelerate keeps its precision to the end of one. Both sides of a mode's process keep freed memory, as `pi0fm train` asks of
the C library: LeRobot gains from it as well. In its memory process LeRobot does not.

    like_for_like   float32, torch's default for products, the fused AdamW on both sides
    as_shipped      LeRobot: float32 and its optimiser preset. Ours: bfloat16 autocast where the processor has it, and the fused AdamW
    peer_bfloat16   where ours takes bfloat16: LeRobot as shipped over LeRobot under autocast, so that a reader sees what of the second
                    ratio is the precision's alone, on this machine, at this hour
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pi0fm import progress
from pi0fm.bench.cases import CASES, PEER_CASES, PeerOptions, make_batch
from pi0fm.bench.inference import MODES, speed, speed_report
from pi0fm.bench.measure import Report, Roofline, check_words, measure_roofline, paired_ratio, products_of, synchronized
from pi0fm.data.loading.batch import Batch
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.options import option
from pi0fm.policy.device import choose_device, compute_dtype
from pi0fm.processes import in_fresh_process, peak_resident
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import StateConfig, TrainState
from pi0fm.train.step import train_step

ALIASES = {"num_threads": "threads"}
RESULT = "training.json"
PRECISIONS = dict(zip(MODES, ("float32", "auto"), strict=True))
LOSS_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
GRADIENT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.09}
"""Relative to the largest entry of each parameter's gradient: the worst of a few hundred parameters, whose gradients may nearly cancel."""
DRAWS = 8
MEMORY_STEPS = 3  # the moments are there after the first, so the second is the first that has all at once


@dataclass(frozen=True)
class Options(PeerOptions):
    """Options of `pi0fm bench training`. Raises ConfigError for a value out of range."""

    cases: tuple[str, ...] = option(PEER_CASES[:2], f"which networks and batches, of {', '.join(PEER_CASES)}")
    rounds: int = option(10, "pairs of steps, ours and LeRobot's, behind each ratio")
    flow_draws_cases: tuple[str, ...] = option(("pi0_proportions",), f"where 8 flow draws are held against 1, of {', '.join(CASES)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("flow_draws_cases", self.flow_draws_cases, CASES)


def measure(options: Options) -> Report:
    """Everything, each in its process. Raises Pi0fmError when the two sides differ, ConfigError for a device that is not there."""
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    roofline = measure_roofline(device, LOSS_BOUNDS)
    rows, memory = {}, {}
    with progress.step("measurements", len(MODES) + 1 + 3 * len(options.cases)) as bar:
        for mode in MODES:
            rows[mode] = in_fresh_process(steps_compared, options, mode, roofline)
            bar.advance(1, mode)
        draws = in_fresh_process(draws_compared, options)
        bar.advance(1, "flow draws")
        for name in options.cases:
            memory[name] = peaks(name, options)
            bar.advance(3, f"memory of {name}")
    gains = {name: row["peer_bfloat16"] for name, row in rows["as_shipped"].items() if "peer_bfloat16" in row}
    ratios = {name: sides["like_for_like"]["whole_ratio"] for name, sides in memory.items()}
    return speed_report(rows, roofline, {"peer_bfloat16": gains, "memory_ratio": ratios, "memory": memory, **draws})


def their_loss(model: nn.Module, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """LeRobot's mean loss on one draw an observation; its tensors are prepared now. Its clock is 1 - t."""
    from pi0fm.bench.peer import their_prefix

    prefix, state = their_prefix(batch.observation, device), batch.observation.state.to(device)
    actions, noise = batch.actions.to(device), batch.noise[:, 0].to(device)
    time = (1.0 - _flow().times(batch.uniform[:, 0])).to(device)
    return lambda: model(*prefix, state, actions, noise, time).mean()


def their_step(policy: Any, batch: Batch, device: torch.device, fused: bool, bfloat16: bool = False) -> Callable[[], float]:
    """One step of LeRobot's policy. fused: its AdamW with ours' kernel, else its own preset. bfloat16: under autocast."""
    preset, weights = policy.config.get_optimizer_preset(), list(policy.train().get_optim_params())
    optimizer = preset.build(weights)
    if fused:
        optimizer = torch.optim.AdamW(weights, preset.lr, preset.betas, weight_decay=preset.weight_decay, fused=True)
    loss_of = their_loss(policy.model, batch, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def our_loss(model: Pi0, batch: Batch, device: torch.device) -> Tensor:
    """The mean loss that `train_step` sends backwards, when every entry of the batch is real and has one draw."""
    flow, given = _flow(), batch.to(device)
    t = flow.times(given.uniform[:, 0])
    pair = flow.training_pair(given.actions, t, given.noise[:, 0])
    total, count = flow.loss(model(given.observation, pair.x_t, t), pair.target, given.action_mask, t)
    return total / count


def prepared(model: Pi0, precision: str, device: torch.device, ema_decay: float | None = None) -> tuple[TrainState, Parallel]:
    """The model in training, with the precision of `pi0fm train --precision`."""
    parallel = Parallel(Context(), precision, allow_cuda=device.type == "cuda")
    state = TrainState(model.to(parallel.device), StateConfig(ema_decay=ema_decay))
    state.prepare(parallel)
    return state, parallel


def our_step(state: TrainState, parallel: Parallel, batch: Batch) -> Callable[[], float]:
    """One step of what `prepared` gave, on the batch as the chain trims it each time; several may share it, with other batches."""
    flow, clip = _flow(), state.config.optimizer.clip_norm
    batches = (replace(batch, observation=batch.observation.trimmed()) for _ in itertools.count())
    valid = int(batch.action_mask.sum()) * batch.uniform.shape[1]
    return lambda: float(train_step(state.trained, flow, state.optimizer, parallel.accelerator, batches, valid, clip)[0])


def steps_compared(options: Options, mode: str, roofline: Roofline) -> dict[str, dict[str, Any]]:
    """A row for each case; in a process that has no accelerate yet."""
    _settle(options.threads)
    return {name: _compared(name, mode, options, roofline) for name in options.cases}


def _compared(name: str, mode: str, options: Options, roofline: Roofline) -> dict[str, Any]:
    from pi0fm.bench import peer  # in the processes that need LeRobot

    device = choose_device(options.device)
    pair, batch = peer.build_pair(CASES[name], options.seed, device), make_batch(CASES[name], options.seed)
    dtype = compute_dtype(PRECISIONS[mode], device)
    state, parallel = prepared(pair.ours, PRECISIONS[mode], device)
    expected, found = their_loss(pair.theirs.train().model, batch, device)(), our_loss(state.trained, batch, device)
    loss_difference = float((found - expected).detach().abs() / expected.detach())
    peer.check_alike(f"{name} {mode}", "losses", loss_difference, LOSS_BOUNDS[dtype])
    expected.backward()
    parallel.accelerator.backward(found)
    difference = peer.gradient_difference(pair)
    peer.check_alike(f"{name} {mode}", "gradients", difference, GRADIENT_BOUNDS[dtype])
    pair.theirs.zero_grad()
    state.optimizer.zero_grad()
    theirs, ours = their_step(pair.theirs, batch, device, fused=mode == "like_for_like"), our_step(state, parallel, batch)
    row = speed(theirs, ours, ours, pair.ours, options.rounds, device, roofline) | {"batch": len(batch.actions)}
    row |= {"max_abs_difference": difference, "difference_bound": GRADIENT_BOUNDS[dtype], "loss_difference": loss_difference}
    if dtype == torch.bfloat16:
        halved = their_step(pair.theirs, batch, device, fused=False, bfloat16=True)
        gain = paired_ratio(synchronized(theirs, device), synchronized(halved, device), options.rounds)
        row |= {"peer_bfloat16": gain.median, "peer_bfloat16_interval": gain.interval}
    return row


def draws_compared(options: Options) -> dict[str, dict[str, Any]]:
    """Time of a step with 8 flow draws over one with 1, as shipped, and what their operations predict: one network, its batches in turn."""
    _settle(options.threads)
    device = choose_device(options.device)
    found: dict[str, dict[str, Any]] = {f"flow_draws_8{name}": {} for name in ("", "_predicted", "_intervals", "_seconds")}
    for name in options.flow_draws_cases:
        parts = prepared(Pi0(CASES[name].config), PRECISIONS["as_shipped"], device)
        many, one = (our_step(*parts, make_batch(CASES[name], options.seed, draws)) for draws in (DRAWS, 1))
        predicted = products_of(many).flops.total() / products_of(one).flops.total()
        ratio = paired_ratio(synchronized(many, device), synchronized(one, device), options.rounds)
        row = (ratio.median, predicted, ratio.interval, (ratio.first_seconds, ratio.second_seconds))
        for figure, value in zip(found.values(), row, strict=True):
            figure[name] = value
    return found


def peaks(name: str, options: Options) -> dict[str, dict[str, float]]:
    """Megabytes of each side's whole process at its peak, and above what it held before its network was built; ratios to LeRobot's."""
    found: dict[str, dict[str, float]] = {}
    for side, precision in {"lerobot": None, **PRECISIONS}.items():
        whole, imported = in_fresh_process(peak_of_training, name, precision, options)
        found[side] = {"whole_megabytes": whole / 1e6, "above_imports_megabytes": (whole - imported) / 1e6}
    for kind in ("whole", "above_imports"):
        for sizes in found.values():
            sizes[f"{kind}_ratio"] = sizes[f"{kind}_megabytes"] / found["lerobot"][f"{kind}_megabytes"]
    return found


def peak_of_training(name: str, precision: str | None, options: Options) -> tuple[int, int]:
    """Take steps of one side: bytes at the peak, and before the network was built. To be called first in its process.

    On a GPU: the most ever allocated there, and 0. precision: of ours; None trains LeRobot's, in float32.
    """
    case, device = CASES[name], torch.device(options.device)
    if precision is None:
        from pi0fm.bench.peer import build_theirs  # not in our process

        torch.set_num_threads(options.threads)
    else:
        _settle(options.threads)
    imported = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    if precision is None:
        step = their_step(build_theirs(case).to(device), make_batch(case, options.seed), device, fused=False)
    else:
        step = our_step(*prepared(Pi0(case.config), precision, device), make_batch(case, options.seed))
    for _ in range(MEMORY_STEPS):
        step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident(), imported


def _flow() -> FlowMatching:
    return FlowMatching.from_config(FlowConfig())


def _settle(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
