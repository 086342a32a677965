"""Checkpoints of a run's state, from which a killed run resumes.

Owns: the saving thread, which worker writes which tensors, retention, the choice of the newest whole checkpoint.
Does not know: what trains, what the tensors mean, the layout of the files (format.py).

    training thread   | step | step | copy | step | step | step | step | copy | ...      copy: this worker's part (staging.py)
    saving thread                          |  plan, write, fsync ........ COMMIT, older ones removed |
                                              communicates in the process group "checkpoint"

The position in the data is not stored as a tensor: it follows from the step (data/order/counter.py).
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor

from pi0fm import progress
from pi0fm.train.checkpoint.format import Reader, Writer
from pi0fm.train.checkpoint.index import Index, TornError, read_index, remove
from pi0fm.train.checkpoint.staging import HostCopies
from pi0fm.train.checkpoint.storage import COMMIT, Store, folder, open_store, steps_in, unlisted, whole
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm_client.errors import OutputError

__all__ = ["COMMIT", "Checkpoints", "whole"]

_NONE, _UNREADABLE = -1, -2  # sent instead of a step when workers agree on one


@final
class Checkpoints:
    """The checkpoints of one run. Every worker makes it and calls its methods in the same order.

    place: a folder that all workers see, or an `s3://` address; keep: how many of the newest to keep.
    """

    def __init__(self, place: Path | str, parallel: Parallel, keep: int) -> None:
        self._store, self._parallel, self._keep = open_store(place), parallel, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pi0fm-checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._copies = HostCopies()
        self.saved: int | None = None  # step of the newest checkpoint that this process has written or read

    @property
    def place(self) -> str:
        """Folder or `s3://` address of the checkpoints."""
        return self._store.where

    @property
    def _group(self) -> ProcessGroup | None:
        return self._parallel.host_group("checkpoint")

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Copy the state after `step` steps and write it in another thread, while training continues; wait first for an earlier one.

        A checkpoint that could not be written is reported on standard error, at the latest by the next call: training goes on, and the
        earlier checkpoint is kept.
        """
        self.settle()
        self._pending = step, self._thread.submit(self._write, step, self._copies.of(self._part(tensors)), dict(facts))

    def save_now(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the state and wait, unless `step` was already saved. Raises OutputError when it could not be written."""
        self.settle()
        if self.saved == step:
            return
        self._pending = step, self._thread.submit(self._write, step, self._part(tensors), dict(facts))
        reason = self.settle()
        if reason is not None:
            stays = f"the one of step {self.saved} stays" if self.saved is not None else "there is none before it"
            raise OutputError(
                f"checkpoint of step {step} in {self._store.where} could not be written ({reason}); {stays}; "
                "free some room, then add --resume true"
            )

    def settle(self, *, wait: bool = True) -> str | None:
        """Record the outcome of the checkpoint being written, if any; return the reason of a failure. wait: until it is done."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (step, written), self._pending = self._pending, None
        try:
            written.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            reason = _reason(error)
            if self._parallel.context.is_first:
                stays = "there is none before it" if self.saved is None else f"the one of step {self.saved} stays"
                progress.say(f"checkpoint of step {step} in {self._store.where} could not be written ({reason}); {stays}")
            return reason
        self.saved = step
        return None

    def close(self) -> None:
        """Wait for the checkpoint being written. Nothing can be saved afterwards."""
        self.settle()
        self._thread.shutdown()
        self._copies.clear()

    def restore(self, tensors: dict[str, Tensor], check: Callable[[Index], None]) -> Index | None:
        """Read the newest whole checkpoint into `tensors`, in place; return its index, or None without a checkpoint.

        A torn one is reported on standard error and skipped. check: called with the index before tensors are read; its errors pass
        through. Raises OutputError for tensors of other names or shapes, and where every checkpoint proved damaged while it was read.
        """
        damaged: list[int] = []
        while (found := self._newest(damaged)) is not None:
            step, index = found
            check(index)
            self._refuse_other(step, index, tensors)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)", category=UserWarning)
                    state_dict_loader.load(
                        dict(tensors),
                        storage_reader=Reader(self._store, step, index),
                        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                        process_group=self._group,
                        no_dist=self._group is None,
                    )
            except CheckpointException as error:
                if not any(isinstance(fault, (TornError, FileNotFoundError)) for fault, _ in error.failures.values()):
                    place = f"{self._store.where}/{folder(step)}"
                    raise OutputError(f"checkpoint {place} could not be read ({_reason(error)}); type the same command again") from error
                damaged.append(step)
                self._say_torn(step, _reason(error))
                continue
            self.saved = step
            return index
        if damaged:  # some tensors may hold values read before the damage
            raise OutputError(f"no checkpoint in {self._store.where} can be read whole; remove it to start the run again")
        return None

    def _newest(self, damaged: list[int]) -> tuple[int, Index] | None:
        """Find the newest whole checkpoint on the first worker, and broadcast its step."""
        step, fault = _NONE, None
        if self._parallel.context.is_first:
            try:
                candidates = sorted(steps_in(self._store.sizes()), reverse=True)
                step = next((number for number in candidates if number not in damaged and self._whole(number)), _NONE)
            except OSError as error:
                step, fault = _UNREADABLE, error
        if self._group is not None:
            agreed = torch.tensor(step)
            torch.distributed.broadcast(agreed, 0, group=self._group)
            step = int(agreed)
        if step == _UNREADABLE:
            raise OutputError(unlisted(self._store, fault or "as the first worker says")) from fault
        if step == _NONE:
            return None
        try:
            return step, read_index(self._store, step, self._store.sizes())
        except TornError as error:
            place = f"{self._store.where}/{folder(step)}"
            raise OutputError(
                f"worker {self._parallel.context.rank} cannot read {place} ({error}); checkpoints must be where all workers can read"
            ) from error

    def _whole(self, step: int) -> bool:
        try:
            read_index(self._store, step, self._store.sizes())
        except TornError as error:
            self._say_torn(step, str(error))
            return False
        return True

    def _say_torn(self, step: int, reason: str) -> None:
        if self._parallel.context.is_first:
            progress.say(f"checkpoint {self._store.where}/{folder(step)} is torn ({reason}); it is passed over")

    def _refuse_other(self, step: int, index: Index, tensors: Mapping[str, Tensor]) -> None:
        here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        there = {name: entry.shape for name, entry in index.tensors.items()}
        if here != there:
            name = min(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise OutputError(
                f"{self._store.where}/{folder(step)} is of another network: {name} is {there.get(name, 'not there')}, "
                f"here it is {here.get(name, 'not there')}; resume with the model it was trained with, or choose another place"
            )

    def _part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select the tensors that this worker writes: its boxes of every sharded tensor, and its share of the replicated tensors."""
        loads = [0] * self._parallel.context.world_size
        mine: dict[str, Tensor] = {}
        for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
            owner = loads.index(min(loads))
            if isinstance(tensors[name], DTensor) or owner == self._parallel.context.rank:
                mine[name] = tensors[name]
            if not isinstance(tensors[name], DTensor):
                loads[owner] += tensors[name].nbytes
        return mine

    def _write(self, step: int, part: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a checkpoint; runs in the saving thread of every worker."""
        # torch warns of `no_dist` at each save; a temporary filter would not be thread-safe
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
        try:
            state_dict_saver.save(
                {},
                storage_writer=Writer(self._store, step, self._parallel.context.rank, facts),
                planner=_Planner(part),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (CheckpointException, OSError):
            if self._parallel.context.is_first:
                remove(self._store, step, list(self._store.sizes()))  # room for the next one
            raise
        if self._parallel.context.is_first:
            _keep_newest(self._store, step, self._keep)


@final
class _Planner(DefaultSavePlanner):
    """torch's planner, given the tensors directly: `save` would log each name twice, a third of the saving thread's Python time."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = dict(tensors)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Set up for the constructor's tensors; `state_dict` is empty."""
        super().set_up_planner(self._tensors, storage_meta, is_coordinator)


def _keep_newest(store: Store, step: int, keep: int) -> None:
    """Keep the newest `keep` whole checkpoints up to `step`; later ones are from before the run resumed at an earlier step."""
    names = store.sizes()
    kept = sorted(number for number in steps_in(names) if number <= step and f"{folder(number)}/{COMMIT}" in names)[-keep:]
    for number in sorted(steps_in(names) - set(kept)):
        remove(store, number, list(names))


def _reason(error: BaseException) -> str:
    """Return the first worker's fault in one line, without torch's wrapping."""
    if isinstance(error, CheckpointException):
        error = error.failures[min(error.failures)][0]
    return f"{' '.join(str(error).split()) or type(error).__name__:.240}"
