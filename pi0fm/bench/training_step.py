"""One optimiser step on the same batch: LeRobot's PI0 against ours; what 8 flow draws cost; the memory of each side.

Owns: which process measures what, the bounds within which losses and gradients must agree. Does not know: the table.

    this process                imports neither side
      |- like_for_like          both sides, interleaved
      |- as_shipped             both sides, interleaved; then 8 draws against 1 of ours
      |- memory, LeRobot        one side alone, a process for each case
      '- memory, ours           the same, once a mode

A mode has a process of its own since accelerate keeps its precision to the end of one. Both sides of a mode's process keep freed memory,
as `pi0fm train` asks of the C library: LeRobot gains from it as well. In its memory process LeRobot does not.

    like_for_like   float32, torch's default for products, the fused AdamW on both sides
    as_shipped      LeRobot: float32 and its optimiser preset. Ours: bfloat16 autocast where the processor has it, and the fused AdamW
    peer_bfloat16   where ours takes bfloat16: LeRobot as shipped over LeRobot under autocast, so that a reader sees what of the second
                    ratio is the precision's alone, on this machine, at this hour
"""

from dataclasses import dataclass
from typing import Any

import torch

from pi0fm import progress
from pi0fm.bench.paired import Ratio, paired_ratio
from pi0fm.bench.peer_cases import Case, case_named, make_batch
from pi0fm.bench.peer_config import MODES, TrainingBenchConfig
from pi0fm.bench.peer_report import Speed, rounded, summary
from pi0fm.bench.products import Roofline, bare, measure_roofline, products_of, synchronized, work_of
from pi0fm.bench.training_memory import Peak, peak_of_training
from pi0fm.bench.training_sides import our_loss, prepared, step_of, their_loss, their_step
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.device import choose_device, compute_dtype
from pi0fm.processes import in_fresh_process
from pi0fm.train.parallel.allocator import keep_freed_memory

PRECISIONS = {"like_for_like": "float32", "as_shipped": "auto"}
LOSS_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
GRADIENT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.09}
"""Relative to the largest entry of each parameter's gradient: the worst of a few hundred parameters, whose gradients may nearly cancel."""
DRAWS = 8


@dataclass(frozen=True)
class DrawsCost:
    """Time of a step with `DRAWS` flow draws over one with 1, and what the operations of the two predict."""

    measured: Ratio
    predicted: float


def compare_training(config: TrainingBenchConfig) -> dict[str, Any]:
    """Everything, each in its process. Raises Pi0fmError when the two sides differ, ConfigError for a device that is not there."""
    device = choose_device(config.device)
    torch.set_num_threads(config.threads)
    roofline = measure_roofline(device, LOSS_BOUNDS)
    rows: dict[str, Any] = {}
    draws: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    with progress.step("measurements", len(MODES) + 1 + len(config.cases) * 3) as bar:
        for mode in MODES:
            bar.advance(0, mode)
            rows[mode] = in_fresh_process(steps_compared, config, mode, roofline)
            bar.advance(1, mode)
        draws = in_fresh_process(draws_compared, config)
        bar.advance(1, "flow draws")
        for name in config.cases:
            memory[name] = {}
            for side, precision in (("lerobot", "float32"), ("pi0fm", "float32"), ("pi0fm", "auto")):
                asked = (case_named(name), side, precision, config.device, config.threads, config.seed)
                memory[name][side, precision] = in_fresh_process(peak_of_training, *asked)
                bar.advance(1, f"memory of {name}")
    return summary(rows, roofline) | _peer_figures(rows) | _memory_figures(memory) | _draws_figures(draws)


def steps_compared(config: TrainingBenchConfig, mode: str, roofline: Roofline) -> dict[str, dict[str, Any]]:
    """A row for each case; in a process that has no accelerate yet."""
    _settle(config)
    return {name: _measured(case_named(name), mode, config, roofline) for name in config.cases}


def draws_compared(config: TrainingBenchConfig) -> dict[str, DrawsCost]:
    """The cost of the draws for each case, as shipped: one network, its batches of 8 draws and of 1 in turn."""
    _settle(config)
    device, found = choose_device(config.device), {}
    for name in config.flow_draws_cases:
        case = case_named(name)
        parts = prepared(Pi0(case.config), PRECISIONS["as_shipped"], device)
        steps = [step_of(*parts, make_batch(case, config.seed, draws)) for draws in (DRAWS, 1)]
        many, one = (work_of(products_of(step, ())).total_flops for step in steps)
        whole = [synchronized(step, device) for step in steps]
        found[name] = DrawsCost(paired_ratio(whole[0], whole[1], config.rounds), many / one)
    return found


def _measured(case: Case, mode: str, config: TrainingBenchConfig, roofline: Roofline) -> dict[str, Any]:
    from pi0fm.bench.peer_pair import build_pair, check_alike, gradient_difference  # LeRobot: in the processes that need it

    device = choose_device(config.device)
    pair, batch = build_pair(case, config.seed, device), make_batch(case, config.seed)
    dtype = compute_dtype(PRECISIONS[mode], device)
    trained, optimizer, accelerator = prepared(pair.ours, PRECISIONS[mode], device)
    expected, found = their_loss(pair.theirs.train().model, batch, device)(), our_loss(trained, batch, device)
    loss_difference = float((found - expected).detach().abs() / expected.detach())
    check_alike(case.name, mode, "losses", loss_difference, LOSS_BOUNDS[dtype])
    expected.backward()
    accelerator.backward(found)
    difference = gradient_difference(pair)
    check_alike(case.name, mode, "gradients", difference, GRADIENT_BOUNDS[dtype])
    pair.theirs.zero_grad()
    optimizer.zero_grad()
    theirs, ours = their_step(pair.theirs, batch, device, fused=mode == MODES[0]), step_of(trained, optimizer, accelerator, batch)
    products = products_of(ours, pair.ours.parameters())
    our_call, their_call, bare_call = (synchronized(call, device) for call in (ours, theirs, bare(products)))
    speed = Speed(
        peer=paired_ratio(their_call, our_call, config.rounds),
        products=paired_ratio(our_call, bare_call, config.rounds),
        difference=difference,
        bound=GRADIENT_BOUNDS[dtype],
        work=work_of(products),
        peer_flops=work_of(products_of(theirs, pair.theirs.parameters())).total_flops,
    )
    row = speed.row(roofline) | {"loss_difference": rounded(loss_difference), "batch": case.training_batch}
    if dtype != torch.bfloat16:
        return row
    halved = synchronized(their_step(pair.theirs, batch, device, fused=False, bfloat16=True), device)
    gain = paired_ratio(their_call, halved, config.rounds)
    return row | {"peer_bfloat16": rounded(gain.median), "peer_bfloat16_interval": [rounded(gain.low), rounded(gain.high)]}


def _settle(config: TrainingBenchConfig) -> None:
    torch.set_num_threads(config.threads)
    keep_freed_memory()


def _peer_figures(rows: dict[str, Any]) -> dict[str, Any]:
    """`peer_bfloat16`, by case; empty where ours does not take bfloat16."""
    return {"peer_bfloat16": {name: row["peer_bfloat16"] for name, row in rows["as_shipped"].items() if "peer_bfloat16" in row}}


def _memory_figures(memory: dict[str, dict[tuple[str, str], Peak]]) -> dict[str, Any]:
    """`memory_ratio`: whole process, like for like; `memory`: megabytes of the whole and above the imports, by case."""
    ratios, details = {}, {}
    for name, peaks in memory.items():
        theirs = peaks["lerobot", "float32"]
        ratios[name] = rounded(peaks["pi0fm", "float32"].whole / theirs.whole)
        sides = {"lerobot": theirs} | {mode: peaks["pi0fm", precision] for mode, precision in PRECISIONS.items()}
        details[name] = {
            side: {
                "whole_megabytes": rounded(peak.whole / 1e6),
                "above_imports_megabytes": rounded(peak.above / 1e6),
                "whole_ratio": rounded(peak.whole / theirs.whole),
                "above_imports_ratio": rounded(peak.above / theirs.above),
            }
            for side, peak in sides.items()
        }
    return {"memory_ratio": ratios, "memory": details}


def _draws_figures(draws: dict[str, DrawsCost]) -> dict[str, Any]:
    return {
        "flow_draws_8": {name: rounded(cost.measured.median) for name, cost in draws.items()},
        "flow_draws_8_predicted": {name: rounded(cost.predicted) for name, cost in draws.items()},
        "flow_draws_8_intervals": {name: [rounded(cost.measured.low), rounded(cost.measured.high)] for name, cost in draws.items()},
        "flow_draws_8_seconds": {
            name: [rounded(cost.measured.first_seconds), rounded(cost.measured.second_seconds)] for name, cost in draws.items()
        },
    }
