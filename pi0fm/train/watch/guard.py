"""Decisions after every step: save a checkpoint, stop on request, or stop for a fault.

Owns: their order. Does not know: how a step is taken, how a checkpoint is written, how a request arrives.

    step -> norm finite? -> asked to save or stop? -> checkpoint due? -> next step
               |                 |                          `-- written in another thread while training continues
               |                 `-- written at once; then StoppedError, unless only a checkpoint was requested
               `-- skipped, or NonfiniteError: no checkpoint after it
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from pi0fm.data.loading.loader import BatchMaker
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.facts import RunFacts
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.state import TrainState
from pi0fm.train.watch.faults import FaultConfig, NonfiniteWatch, write_faults
from pi0fm.train.watch.requests import RunRequest
from pi0fm.train.watch.signals import StopSignals
from pi0fm_client.errors import DatasetError, OutputError


@dataclass(frozen=True)
class GuardConfig:
    """Options of the guard. steps: of the whole run; checkpoint_every: steps between two checkpoints."""

    output_dir: Path
    steps: int
    checkpoint_every: int
    faults: FaultConfig


@contextmanager
def guarded(
    config: GuardConfig, parallel: Parallel, checkpoints: Checkpoints, state: TrainState, run: RunFacts, maker: BatchMaker
) -> Iterator["Guard"]:
    """Guard the steps inside the block. maker: makes the batch behind a loss that is not finite again."""
    with write_faults(config.output_dir), StopSignals(parallel, config.output_dir) as stop:
        guard = Guard(config, checkpoints, state, run, NonfiniteWatch(config.faults, parallel.context, maker), stop)
        try:
            yield guard
        except DatasetError as error:
            raise guard.without_data(error, alone=parallel.context.world_size == 1) from error
        finally:
            checkpoints.close()


@final
class Guard:
    """The guard of one run; `guarded` makes it."""

    def __init__(
        self,
        config: GuardConfig,
        checkpoints: Checkpoints,
        state: TrainState,
        run: RunFacts,
        nonfinite: NonfiniteWatch,
        stop: StopSignals,
    ) -> None:
        self._config, self._checkpoints, self._state, self._run = config, checkpoints, state, run
        self._nonfinite, self._stop = nonfinite, stop

    def after_step(self, norm: Tensor) -> None:
        """Judge the state's latest step, save and stop if requested. norm: of its gradient, still on the device.

        Raises NonfiniteError, StoppedError, or OutputError where the last checkpoint could not be written.
        """
        done, steps = self._state.step, self._config.steps
        self._nonfinite.after_step(done, norm)
        self._checkpoints.settle(wait=False)
        asked = self._stop.after_step()
        if asked is RunRequest.SAVE and done < steps:
            self._nonfinite.settle()
            self._checkpoints.save(done, self._state.tensors(), self._run.at(done))
            self._checkpoints.settle()
            self._stop.saved(asked)
        elif asked or done == steps:
            self._nonfinite.settle()
            self._save_now()
            self._stop.saved(asked)
            if done < steps:
                raise self._stop.error(asked, done, steps)
        elif done % self._config.checkpoint_every == 0:
            self._nonfinite.settle()
            self._checkpoints.save(done, self._state.tensors(), self._run.at(done))

    def without_data(self, error: DatasetError, *, alone: bool) -> DatasetError:
        """Return the error for data that could not be read during a run. A single worker first saves the steps taken."""
        done = self._state.step
        if alone and done:  # others would wait for this worker in the middle of their step
            try:
                self._save_now()
            except OutputError as unsaved:
                return DatasetError(f"{error} (in step {done + 1}; and {unsaved})")
        saved = self._checkpoints.saved
        kept = f"the checkpoint of step {saved} holds what was trained; add --resume true" if saved else "nothing was trained yet"
        return DatasetError(f"{error} (in step {done + 1}; {kept})")

    def _save_now(self) -> None:
        self._checkpoints.save_now(self._state.step, self._state.tensors(), self._run.at(self._state.step))
