"""Time of an optimiser step on the same batch, LeRobot's PI0 against ours; the cost of 8 flow draws; the memory of each side.

Owns: the processes and their measurements, the bounds within which losses and gradients must agree.
Does not know: how its report is shown.

    this process                imports neither side
      |- like_for_like          both sides, alternating
      |- as_shipped             both sides, alternating
      |- flow draws             8 draws against 1, our side only
      '- memory                 one side alone, a process for each side, case and mode

On a GPU the rows of `pi0fm bench card` follow: networks of full size.

Neither side's step reads data or averages weights. Ours takes its batch as the chain leaves it: pictures as bytes. Each mode has a separate
process, since accelerate cannot change its precision within one. Both sides of such a process keep freed memory, as `pi0fm train` asks of
the C library; LeRobot gains from it as well. LeRobot's memory process does not keep it.

    like_for_like   float32, torch's default for products, the fused AdamW on both sides
    as_shipped      LeRobot: float32 and its optimiser preset. Ours: bfloat16 autocast where the processor has it, and the fused AdamW
    peer_bfloat16   where ours takes bfloat16: time of LeRobot as shipped / time of LeRobot under autocast, the part of the second ratio
                    that is due to precision alone
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from pi0fm import progress
from pi0fm.bench.config import TrainingOptions
from pi0fm.bench.harness.cases import make_batch
from pi0fm.bench.harness.limits import Rates, measure_rates, products_of, synchronized
from pi0fm.bench.harness.measure import BenchReport, paired_ratio
from pi0fm.bench.harness.sizes import CASES
from pi0fm.bench.harness.steps import Trainer, their_loss, their_step
from pi0fm.bench.inference import MODES, speed, speed_report, with_full_size
from pi0fm.data.loading.batch import Batch
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.device import choose_device, compute_dtype
from pi0fm.processes import in_fresh_process, peak_resident
from pi0fm.train.parallel.allocator import keep_freed_memory

PRECISIONS = dict(zip(MODES, ("float32", "auto"), strict=True))
LOSS_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
GRADIENT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.09}
"""Bounds relative to the largest entry of a parameter's gradient, for the worst of a few hundred parameters, which may nearly cancel."""
DRAWS = 8
MEMORY_STEPS = 3  # the first step allocates the moments, so the second is the first with its full memory


def measure(options: TrainingOptions) -> BenchReport:
    """Measure each part in a separate process. Raises Pi0fmError when the two sides differ, ConfigError for a missing device."""
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    rates = measure_rates(device, LOSS_BOUNDS)
    rows, memory = {}, {}
    with progress.step("measurements", len(MODES) + 1 + 3 * len(options.cases)) as bar:
        for mode in MODES:
            rows[mode] = in_fresh_process(compare_steps, options, mode, rates)
            bar.advance(1, mode)
        draws = in_fresh_process(compare_draws, options)
        bar.advance(1, "flow draws")
        for name in options.cases:
            memory[name] = compare_peaks(name, options)
            bar.advance(3, f"memory of {name}")
    gains = {name: row["peer_bfloat16"] for name, row in rows["as_shipped"].items() if "peer_bfloat16" in row}
    ratios = {name: sides["like_for_like"]["whole_ratio"] for name, sides in memory.items()}
    report = speed_report(rows, rates, {"peer_bfloat16": gains, "memory_ratio": ratios, "memory": memory, **draws})
    return with_full_size(report, "training", device, options.output_dir)


def lerobots_step(policy: Any, batch: Batch, device: torch.device, fused: bool, bfloat16: bool = False) -> Callable[[], float]:
    """Step of LeRobot's policy. fused: its AdamW with torch's fused kernel, else its preset. bfloat16: under autocast."""
    preset, weights = policy.config.get_optimizer_preset(), list(policy.train().get_optim_params())
    optimizer = preset.build(weights)
    if fused:
        optimizer = torch.optim.AdamW(weights, preset.lr, preset.betas, weight_decay=preset.weight_decay, fused=True)
    return their_step(their_loss(policy.model, batch, device), optimizer, preset.grad_clip_norm, device if bfloat16 else None)


def our_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """Mean loss of `train_step` for a batch without padding and with one draw per sample."""
    flow, given = trainer.flow, batch.to(trainer.parallel.device)
    t = flow.times(given.uniform[:, 0])
    pair = flow.training_pair(given.actions, t, given.noise[:, 0])
    total, count = flow.loss(trainer.state.trained(given.observation, pair.x_t, t), pair.target, given.action_mask, t)
    return total / count


def compare_steps(options: TrainingOptions, mode: str, rates: Rates) -> dict[str, dict[str, Any]]:
    """A row for each case; to be called in a process that has not used accelerate."""
    _set_up_process(options.threads)
    return {name: _compare_case(name, mode, options, rates) for name in options.cases}


def _compare_case(name: str, mode: str, options: TrainingOptions, rates: Rates) -> dict[str, Any]:
    from pi0fm.bench.harness import peer  # in the processes that need LeRobot

    device = choose_device(options.device)
    pair, batch = peer.build_pair(CASES[name], options.seed, device), make_batch(CASES[name], options.seed)
    dtype = compute_dtype(PRECISIONS[mode], device)
    trainer = Trainer.for_network(pair.ours, PRECISIONS[mode], device)
    expected, found = their_loss(pair.theirs.train().model, batch, device)(), our_loss(trainer, batch)
    loss_difference = float((found - expected).detach().abs() / expected.detach())
    peer.check_alike(f"{name} {mode}", "losses", loss_difference, LOSS_BOUNDS[dtype])
    expected.backward()
    trainer.parallel.accelerator.backward(found)
    difference = peer.gradient_difference(pair)
    peer.check_alike(f"{name} {mode}", "gradients", difference, GRADIENT_BOUNDS[dtype])
    pair.theirs.zero_grad()
    trainer.state.optimizer.zero_grad()
    theirs, ours = lerobots_step(pair.theirs, batch, device, fused=mode == "like_for_like"), trainer.step_on(batch)
    row = speed(theirs, ours, ours, pair.ours, options.rounds, device, rates) | {"batch": len(batch.actions)}
    row |= {"max_abs_difference": difference, "difference_bound": GRADIENT_BOUNDS[dtype], "loss_difference": loss_difference}
    if dtype == torch.bfloat16:
        halved = lerobots_step(pair.theirs, batch, device, fused=False, bfloat16=True)
        gain = paired_ratio(synchronized(theirs, device), synchronized(halved, device), options.rounds)
        row |= {"peer_bfloat16": gain.median, "peer_bfloat16_interval": gain.interval}
    return row


def compare_draws(options: TrainingOptions) -> dict[str, dict[str, Any]]:
    """Time of a step with 8 flow draws / with 1, as shipped, and the ratio of their operations; one network, alternating batches."""
    _set_up_process(options.threads)
    device = choose_device(options.device)
    found: dict[str, dict[str, Any]] = {f"flow_draws_8{name}": {} for name in ("", "_predicted", "_intervals", "_seconds")}
    for name in options.flow_draws_cases:
        trainer = Trainer.for_network(Pi0(CASES[name].config), PRECISIONS["as_shipped"], device)
        many, one = (trainer.step_on(make_batch(CASES[name], options.seed, draws)) for draws in (DRAWS, 1))
        predicted = products_of(many).flops.total() / products_of(one).flops.total()
        ratio = paired_ratio(synchronized(many, device), synchronized(one, device), options.rounds)
        row = (ratio.median, predicted, ratio.interval, (ratio.first_seconds, ratio.second_seconds))
        for figure, value in zip(found.values(), row, strict=True):
            figure[name] = value
    return found


def compare_peaks(name: str, options: TrainingOptions) -> dict[str, dict[str, float]]:
    """Peak megabytes of each side's process, in total and above its memory before the network was built; ratios to LeRobot's."""
    found: dict[str, dict[str, float]] = {}
    for side, precision in {"lerobot": None, **PRECISIONS}.items():
        whole, imported = in_fresh_process(peak_of_training, name, precision, options)
        found[side] = {"whole_megabytes": whole / 1e6, "above_imports_megabytes": (whole - imported) / 1e6}
    for kind in ("whole", "above_imports"):
        for sizes in found.values():
            sizes[f"{kind}_ratio"] = sizes[f"{kind}_megabytes"] / found["lerobot"][f"{kind}_megabytes"]
    return found


def peak_of_training(name: str, precision: str | None, options: TrainingOptions) -> tuple[int, int]:
    """Take steps of one side; returns bytes at the peak and before the network was built. To be called first in its process.

    On a GPU: the peak allocated there, and 0. precision: of our side; None trains LeRobot's, in float32.
    """
    case, device, on_cpu = CASES[name], torch.device(options.device), options.device == "cpu"
    if precision is None:
        from pi0fm.bench.harness.peer import build_theirs  # not in our process

        torch.set_num_threads(options.threads)
        imported = psutil.Process().memory_info().rss
        step = lerobots_step(build_theirs(case).to(device), make_batch(case, options.seed), device, fused=False)
    else:
        _set_up_process(options.threads)
        imported = psutil.Process().memory_info().rss
        step = Trainer.for_network(Pi0(case.config), precision, device).step_on(make_batch(case, options.seed))
    for _ in range(MEMORY_STEPS):
        step()
    return (peak_resident(), imported) if on_cpu else (torch.cuda.max_memory_allocated(device), 0)


def _set_up_process(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
