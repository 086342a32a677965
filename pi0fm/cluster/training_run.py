"""The options of a training run and of its workers.

Owns: `TrainingRun`, and its checks before a run starts. Does not know: how workers are started; neither torch nor Ray is imported.
"""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from pi0fm import machine
from pi0fm.cluster.runtime import refuse_unreachable
from pi0fm.data.config import refuse_missing
from pi0fm.data.prompt import refuse_missing_tokenizer
from pi0fm.options import option
from pi0fm.policy.saved.manifest import check_files
from pi0fm.train.components import OWN
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.context import context_from_environment, restarts
from pi0fm.train.start import lease, output
from pi0fm.train.watch import trackers
from pi0fm_client.errors import ConfigError, Pi0fmError


@dataclass(frozen=True)
class TrainingRun(TrainConfig):
    """Options of a run and of its workers."""

    num_workers: int | str = option(
        0, "0 trains in the calling process, under torchrun in each of its processes; N on N Ray workers, 2..8 on as many as fit"
    )
    gpus_per_worker: float | None = option(None, "GPUs of each Ray worker; empty takes 1 where the cluster has GPUs")
    cpus_per_worker: int | None = option(None, "CPUs of each Ray worker; empty divides those of one machine, on a cluster takes 4 or 1")
    max_failures: int = option(3, "restarts of the Ray workers from the newest checkpoint without a step in between, at most")
    ray_address: str | None = option(None, "address of a running Ray cluster; without it one is started here")
    ship_code: bool = option(False, "send this pi0fm to the nodes of that cluster, instead of requiring the same one there")
    resize_seconds: float = option(60.0, "seconds between two checks for room for more workers, with num_workers 2..8")

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest, most = self.workers
        if fewest < 0 or self.max_failures < 0:
            raise ConfigError(f"num_workers and max_failures must be >= 0, found {self.num_workers} and {self.max_failures}")
        if fewest > most or (fewest < most and not fewest):
            raise ConfigError(f"num_workers must be a number, or FEWEST..MOST from 1 up, found {self.num_workers!r}; type 2..8")
        if self.resize_seconds <= 0:
            raise ConfigError(f"resize_seconds must be above 0, found {self.resize_seconds:g}; leave it out for 60")
        if self.ship_code and self.ray_address is None:
            raise ConfigError("ship_code is for the nodes of a running cluster, found no ray_address; add it, or leave ship_code out")
        if self.ray_address is not None and not most:
            raise ConfigError(f"ray_address is for Ray workers, found num_workers 0; type --num_workers 2 --ray_address {self.ray_address}")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ConfigError(f"cpus_per_worker must be >= 1, found {self.cpus_per_worker}")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ConfigError(f"gpus_per_worker must be >= 0, found {self.gpus_per_worker}")
        if self.gpus_per_worker and self.device == "cpu":
            raise ConfigError(f"gpus_per_worker {self.gpus_per_worker:g} is for GPUs, found device cpu; leave one of them out")
        for count in range(fewest, most + 1) if most else ():
            self.micro_steps(count)
            self.parallel.refuse_for(count)

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers, equal if the number is fixed. Raises ConfigError for neither a number nor a range."""
        fewest, dots, most = str(self.num_workers).partition("..")
        try:
            return int(fewest), int(most if dots else fewest)
        except ValueError:
            raise ConfigError(f"num_workers must be a number, or FEWEST..MOST, found {self.num_workers!r}; type 2 or 2..8") from None


def refuse_at_once(run: TrainingRun) -> None:
    """Raise one error for all faults that can be found before torch or Ray is loaded: paths, libraries, addresses, the folder."""
    faults: list[Pi0fmError] = []
    for check in _checks(run):
        try:
            check()
        except Pi0fmError as error:
            faults.append(error)
    if faults:
        raise type(faults[0])("; ".join(map(str, faults)))


def _checks(run: TrainingRun) -> Iterator[Callable[[], object]]:
    yield from (partial(refuse_missing, entry.dataset) for entry in run.entries().values())
    if run.pretrained is not None:
        yield partial(check_files, run.pretrained)
    if run.tokenizer != OWN:
        yield partial(refuse_missing_tokenizer, run.tokenizer)
    yield partial(trackers.refuse_missing, run.tracker)
    if run.workers != (0, 0):
        yield partial(_refuse_too_many, run)
        yield partial(refuse_unreachable, run.ray_address)
    else:
        yield _refuse_taken_port
    if context_from_environment().is_first and not restarts() and not lease.is_held(run.output_dir):
        yield partial(output.checkpoints_to_resume, run)


def _refuse_too_many(run: TrainingRun) -> None:
    """Raise ConfigError for more workers than this machine has cores; not in `TrainingRun`, which workers on other machines decode too."""
    each, cores = run.cpus_per_worker or 1, machine.cores()
    if run.workers[0] * each > cores and not (run.ray_address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"num_workers are Ray workers that train, here with {each} of {cores} cores each, found {run.num_workers}; leave it out: one "
            f"process trains, and its threads load data, as LeRobot's num_workers do; or type --num_workers {cores // each}"
        )


def _refuse_taken_port() -> None:
    """Raise ConfigError if another program uses the port at which this process, the first, would wait for the others."""
    context, port = context_from_environment(), os.environ.get("MASTER_PORT", "")
    if context.world_size == 1 or not context.is_first or "TORCHELASTIC_RUN_ID" in os.environ or not port.isdecimal():
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"MASTER_PORT must be free where RANK is 0, found {port} ({error}); set another in all workers") from None
