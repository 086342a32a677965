"""What a checkpoint that is written behind the training's back costs the steps in front of it.

Owns: blocks of steps with and without a checkpoint, in turn in one process. Does not know: how a checkpoint is written.

    with      | step | save | step | step | step | ... | step | (wait)      wait: for a checkpoint that outlasts its block
    without   | step | step | step | step | ... | step |
              |------------------- CLOCK ---------------------------|

Inside the clock: the steps of `pi0fm train` with the moving average, gathering and copying the state, the facts of the run, and whatever
the saving thread takes from the steps beside it while it plans, sums, writes and fsyncs, retention included. Outside: reading data, logs.
A block is `every` steps. A checkpoint costs the same whatever that number is, so short blocks measure it best, and its share at another
number follows: `slowdown_every_1000`. A slowdown of 0.01 is one hundredth more wall time a step. Processor time is given beside wall time:
it charges the saving thread in full, as on a machine without a core to spare, and other work on the machine moves it less.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pi0fm import options as option_files
from pi0fm import progress
from pi0fm.bench.cases import CASES, make_batch
from pi0fm.bench.measure import Ratio, Report, check_least, check_words, paired_ratio, ratio_of, seconds_of
from pi0fm.bench.training import our_step, prepared
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.options import option
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.facts import RunFacts
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.state import TrainState

ALIASES = {"checkpoint_every": "every", "keep_checkpoints": "keep"}
NETWORKS = ("tiny", "width_512", "pi0_proportions")


@dataclass(frozen=True)
class Options:
    """Options of `pi0fm bench checkpoint`. Raises ConfigError for a value out of range."""

    case: str = option("tiny", "network: " + ", ".join(NETWORKS))
    batch_size: int = option(32, "samples of a step")
    every: int = option(10, "steps of a block, the first of which is followed by a checkpoint; training's own default is 1000")
    rounds: int = option(20, "blocks of each kind")
    precision: str = option("auto", "as pi0fm train takes it")
    folder: Path | None = option(None, "folder on the disk to write to; the system's folder for temporary files when not given")
    keep: int = option(2, "checkpoints that are kept, so that older ones are removed as in training")
    threads: int = option(1, "CPU threads of a step")

    def __post_init__(self) -> None:
        check_words("case", (self.case,), NETWORKS)
        check_least(self, batch_size=1, every=2, rounds=1, keep=1, threads=1)


@dataclass(frozen=True)
class _Block:
    """Of one block: processor seconds, seconds of the call that saves, steps until the checkpoint was there; 0 without one."""

    cpu: float
    blocking: float
    steps: int


def measure(options: Options) -> Report:
    """All of it, in this process; `slowdown` 0.01 is one hundredth more wall time a step. Raises OutputError for a folder that is full."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pi0(CASES[options.case].config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, parallel = prepared(model, options.precision, device, ema_decay=0.999)
    found: dict[bool, list[_Block]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="pi0fm-bench-checkpoint-", dir=options.folder) as folder:
        with closing(Checkpoints(folder, parallel, options.keep)) as checkpoints:
            block = _blocks(options, state, parallel, checkpoints)
            with progress.step("blocks", 2 * (options.rounds + 1)) as bar:

                def run(saves: bool) -> None:
                    found[saves].append(block(saves))
                    bar.advance()

                wall = paired_ratio(lambda: run(True), lambda: run(False), options.rounds, warm_up=1)
        size = sum(path.stat().st_size for path in max(Path(folder).iterdir()).iterdir())
    with_one, without = found[True][1:], found[False][1:]
    cpu = ratio_of([(one.cpu, other.cpu) for one, other in zip(with_one, without, strict=True)])
    blocking, steps = median(block.blocking for block in with_one), median(block.steps for block in with_one)
    return Report(_figures(options, wall, cpu, blocking, steps) | {"bytes": size, "parameters": parameter_count(model)})


def _figures(options: Options, wall: Ratio, cpu: Ratio, blocking: float, steps: float) -> dict[str, Any]:
    every, usual = options.every, TrainConfig.checkpoint_every
    return {
        "slowdown": wall.median - 1,
        "interval": [end - 1 for end in wall.interval],
        "blocking_seconds": blocking,
        "cpu_slowdown": cpu.median - 1,
        "cpu_interval": [end - 1 for end in cpu.interval],
        "slowdown_while_written": (wall.median - 1) * every / steps,
        f"slowdown_every_{usual}": (wall.median - 1) * every / usual,
        "steps_until_written": steps,
        "step_seconds": wall.second_seconds / every,
        **{name: getattr(options, name) for name in ("every", "rounds", "case", "batch_size", "threads")},
    }


def _blocks(options: Options, state: TrainState, parallel: Parallel, checkpoints: Checkpoints) -> Callable[[bool], _Block]:
    """`block(saves)`, which takes the steps of a block, with a checkpoint or without."""
    case = replace(CASES[options.case], training_batch=options.batch_size)
    step, run = our_step(state, parallel, make_batch(case, seed=0)), TrainConfig()
    facts = RunFacts(option_files.encode(run), {}, run.steps, run.global_batch_size, run.optimizer, 1)

    def save() -> float:
        return seconds_of(lambda: checkpoints.save(state.step, state.tensors(), facts.at(state.step)))

    def block(saves: bool) -> _Block:
        began, asked, there, blocking = time.process_time(), 0, 0, 0.0
        for number in range(1, options.every + 1):
            step()
            state.advance()
            checkpoints.settle(wait=False)  # as training looks after every step
            if saves and number == 1:
                asked, blocking = state.step, save()
            if asked and not there and checkpoints.saved == asked:
                there = number
        if asked and not there:
            checkpoints.settle()
            there = options.every
        return _Block(time.process_time() - began, blocking, there)

    return block
