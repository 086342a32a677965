"""What a checkpoint that is written behind the training's back costs the steps in front of it.

Owns: blocks of steps with and without a checkpoint, in turn in one process. Does not know: the command line, how a checkpoint is written.

    with      | step | save | step | step | step | ... | step | (wait)      wait: for a checkpoint that outlasts its block
    without   | step | step | step | step | ... | step |
              |------------------- CLOCK ---------------------------|

Inside the clock: the steps of `pi0fm train` with the moving average, gathering and copying the state, the facts of the run, and whatever
the saving thread takes from the steps beside it while it plans, sums, writes and fsyncs, retention included. Outside: reading data, logs.
A block is `every` steps. A checkpoint costs the same whatever that number is, so short blocks measure it best, and its share at another
number follows. Processor time is given beside wall time: it charges the saving thread in full, as on a machine without a core to spare,
and other work on the machine moves it less.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pi0fm import options, progress
from pi0fm.bench.paired import Ratio, paired_ratio, ratio_of
from pi0fm.bench.peer_cases import case_named, make_batch
from pi0fm.bench.peer_config import PI0_PROPORTIONS
from pi0fm.bench.training_sides import step_of
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.options import nearest, option
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.facts import RunFacts
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import StateConfig, TrainState
from pi0fm_client.errors import ConfigError

CASES = ("tiny", "width_512", PI0_PROPORTIONS)


@dataclass(frozen=True)
class CheckpointConfig:
    """Options of `pi0fm bench checkpoint`."""

    case: str = option("tiny", "network: " + ", ".join(CASES))
    batch_size: int = option(32, "samples of a step")
    every: int = option(10, "steps of a block, the first of which is followed by a checkpoint; training's own default is 1000")
    rounds: int = option(20, "blocks of each kind")
    precision: str = option("auto", "as pi0fm train takes it")
    folder: Path | None = option(None, "folder on the disk to write to; the system's folder for temporary files when not given")
    keep: int = option(2, "checkpoints that are kept, so that older ones are removed as in training")
    threads: int = option(1, "CPU threads of a step")

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise ConfigError(f"--case must be one of the sizes, found {self.case!r}: {nearest(self.case, CASES)}")
        for name, least in {"batch_size": 1, "every": 2, "rounds": 1, "keep": 1, "threads": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be {least} or more, found {getattr(self, name)}; leave it out for the default")


@dataclass(frozen=True)
class CheckpointCost:
    """Blocks with a checkpoint by blocks without. blocking: seconds of the calls that save; steps: until it was there; all medians."""

    wall: Ratio
    cpu: Ratio
    blocking: float
    steps: float
    bytes: int
    parameters: int


@dataclass(frozen=True)
class _Block:
    """Of one block: processor seconds, seconds of the call that saves, steps until the checkpoint was there; 0 without one."""

    cpu: float
    blocking: float
    steps: int


def measure(config: CheckpointConfig) -> CheckpointCost:
    """All of it, in this process. Raises OutputError where a checkpoint cannot be written."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()  # as training does
    found: dict[bool, list[_Block]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="pi0fm-bench-checkpoint-", dir=config.folder) as folder:
        parallel = Parallel(Context(), config.precision)
        with closing(Checkpoints(folder, parallel, config.keep)) as checkpoints:
            block, parameters = _blocks(config, parallel, checkpoints)
            with progress.step("blocks", 2 * (config.rounds + 1)) as bar:

                def run(saves: bool) -> None:
                    found[saves].append(block(saves))
                    bar.advance()

                wall = paired_ratio(lambda: run(True), lambda: run(False), config.rounds, warm_up=1)
        newest = max(path for path in Path(folder).iterdir())
        size = sum(path.stat().st_size for path in newest.iterdir())
    with_one, without = found[True][1:], found[False][1:]
    cpu = ratio_of([(one.cpu, other.cpu) for one, other in zip(with_one, without, strict=True)])
    blocking, steps = (float(np.median([getattr(one, name) for one in with_one])) for name in ("blocking", "steps"))
    return CheckpointCost(wall, cpu, blocking, steps, size, parameters)


def _blocks(config: CheckpointConfig, parallel: Parallel, checkpoints: Checkpoints) -> tuple[Callable[[bool], _Block], int]:
    """`block(saves)`, which takes the steps of a block, with a checkpoint or without; and the number of parameters."""
    case = replace(case_named(config.case), training_batch=config.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pi0(case.config)
    state = TrainState(model.to(parallel.device), StateConfig(ema_decay=0.999))
    state.prepare(parallel)
    step = step_of(state.trained, state.optimizer, parallel.accelerator, make_batch(case, seed=0))
    run = TrainConfig()
    facts = RunFacts(options.encode(run), {}, run.steps, run.global_batch_size, run.optimizer, 1)

    def save(taken: int) -> float:
        began = time.perf_counter()
        checkpoints.save(taken, state.tensors(), facts.at(taken))
        return time.perf_counter() - began

    def block(saves: bool) -> _Block:
        began, asked, there, blocking = time.process_time(), 0, 0, 0.0
        for number in range(1, config.every + 1):
            step()
            state.advance()
            taken = state.step
            checkpoints.settle(wait=False)  # as training looks after every step
            if saves and number == 1:
                asked, blocking = taken, save(taken)
            if asked and not there and checkpoints.saved == asked:
                there = number
        if asked and not there:
            checkpoints.settle()
            there = config.every
        return _Block(time.process_time() - began, blocking, there)

    return block, parameter_count(model)
