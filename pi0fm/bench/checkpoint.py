"""The slowdown of training steps while an asynchronous checkpoint is written.

Owns: blocks of steps with and without a checkpoint, alternating in one process. Does not know: how a checkpoint is written.

    with      | step | save | step | step | step | ... | step | (wait)      wait: until the checkpoint is written, if it is not yet
    without   | step | step | step | step | ... | step |
              |------------------- CLOCK ---------------------------|

Inside the clock: the steps of `pi0fm train` with the moving average, gathering and copying the state, the facts of the run, and the time
that the saving thread takes from the steps while it plans, computes checksums, writes, fsyncs and removes old checkpoints. Outside:
reading data, logs.
A block is `every` steps. The cost of a checkpoint does not depend on that number, so short blocks measure it best; `slowdown_every_1000`
converts the result to a checkpoint every 1000 steps. A slowdown of 0.01 is 1 % more wall time per step. Processor time is measured too: it
charges the saving thread in full, as on a machine without an idle core, and depends less on other programs.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pi0fm import options as option_files
from pi0fm import progress
from pi0fm.bench.config import CheckpointOptions
from pi0fm.bench.harness.cases import make_batch
from pi0fm.bench.harness.measure import (
    BenchReport,
    PairedRatio,
    paired_ratio,
    ratio_of,
    seconds_of,
)
from pi0fm.bench.harness.sizes import CASES
from pi0fm.bench.harness.steps import Trainer
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.facts import RunFacts
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.state import StateConfig


@dataclass(frozen=True)
class Block:
    """Processor seconds of a block, seconds of the call to save, steps until the checkpoint was written (both 0 without one)."""

    cpu: float
    blocking: float
    steps: int


def measure(options: CheckpointOptions) -> BenchReport:
    """Run both kinds of block in this process. Raises OutputError for a full disk."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pi0(CASES[options.case].config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer.for_network(model, options.precision, device, StateConfig(ema_decay=0.999))
    found: dict[bool, list[Block]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="pi0fm-bench-checkpoint-", dir=options.folder) as folder:
        with (
            closing(Checkpoints(folder, trainer.parallel, options.keep)) as checkpoints,
            progress.step("blocks", 2 * (options.rounds + 1)) as bar,
        ):
            step = trainer.step_on(make_batch(replace(CASES[options.case], training_batch=options.batch_size), seed=0))

            def run(saves: bool) -> None:
                found[saves].append(take_block(options, trainer, step, checkpoints, saves))
                bar.advance()

            wall = paired_ratio(lambda: run(True), lambda: run(False), options.rounds, warm_up=1)
        size = sum(path.stat().st_size for path in max(Path(folder).iterdir()).iterdir())
    return BenchReport(figures_of(options, wall, found[True][1:], found[False][1:]) | {"bytes": size, "parameters": parameter_count(model)})


def figures_of(options: CheckpointOptions, wall: PairedRatio, with_one: Sequence[Block], without: Sequence[Block]) -> dict[str, Any]:
    """Slowdown by a checkpoint, by wall time and by processor time."""
    cpu = ratio_of([(one.cpu, other.cpu) for one, other in zip(with_one, without, strict=True)])
    steps = median(block.steps for block in with_one)
    every, usual = options.every, TrainConfig.checkpoint_every
    return {
        "slowdown": wall.median - 1,
        "interval": [end - 1 for end in wall.interval],
        "blocking_seconds": median(block.blocking for block in with_one),
        "cpu_slowdown": cpu.median - 1,
        "cpu_interval": [end - 1 for end in cpu.interval],
        "slowdown_while_written": (wall.median - 1) * every / steps,
        f"slowdown_every_{usual}": (wall.median - 1) * every / usual,
        "steps_until_written": steps,
        "step_seconds": wall.second_seconds / every,
        **{name: getattr(options, name) for name in ("every", "rounds", "case", "batch_size", "threads")},
    }


def take_block(options: CheckpointOptions, trainer: Trainer, step: Callable[[], object], checkpoints: Checkpoints, saves: bool) -> Block:
    """Take `options.every` steps, with a checkpoint after the first where `saves`."""
    state, run = trainer.state, TrainConfig()
    facts = RunFacts(option_files.encode(run), {}, run.steps, run.global_batch_size, run.optimizer, 1)
    began, asked, there, blocking = time.process_time(), state.step + 1, 0, 0.0
    for number in range(1, options.every + 1):
        step()
        checkpoints.settle(wait=False)  # as training does after every step
        if saves and number == 1:
            blocking = seconds_of(lambda: checkpoints.save(asked, state.tensors(), facts.at(asked)))
        if saves and not there and checkpoints.saved == asked:
            there = number
    if saves and not there:
        checkpoints.settle()
        there = options.every
    return Block(time.process_time() - began, blocking, there)
