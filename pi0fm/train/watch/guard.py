"""What stands between a run and its loss: after every step, whether to save, to leave, or to stop for a fault.

Owns: the order of these. Does not know: how a step is taken, how each is done.

    step -> norm finite? -> asked to stop? -> checkpoint due? -> next step
               |                 |                  `-- written behind training's back
               |                 `-- written at once, then StoppedError
               `-- skipped, or NonfiniteError: no checkpoint beyond it
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor

from pi0fm.data.loading.loader import BatchMaker
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Context
from pi0fm.train.watch.faults import Nonfinite, full_disk_named
from pi0fm.train.watch.signals import StopSignals
from pi0fm_client.errors import DatasetError, OutputError


@contextmanager
def guarded(
    config: TrainConfig,
    context: Context,
    checkpoints: Checkpoints,
    collator: BatchMaker,
    first: int,
    state: Callable[[], dict[str, Tensor]],
    facts: Callable[[int], dict[str, Any]],
) -> Iterator["Guard"]:
    """Guard the steps inside the block, which begins after `first` steps. state, facts: of the run as it is, of a step."""
    with full_disk_named(config.output_dir), StopSignals(context, config.output_dir) as stop:
        guard = Guard(config, context, checkpoints, Nonfinite(config, context, collator), stop, first, state, facts)
        try:
            yield guard
        except DatasetError as error:
            raise guard.without_data(error) from error
        finally:
            checkpoints.close()


@final
class Guard:
    """Made by `guarded`."""

    def __init__(
        self,
        config: TrainConfig,
        context: Context,
        checkpoints: Checkpoints,
        nonfinite: Nonfinite,
        stop: StopSignals,
        first: int,
        state: Callable[[], dict[str, Tensor]],
        facts: Callable[[int], dict[str, Any]],
    ) -> None:
        self._config, self._context, self._checkpoints = config, context, checkpoints
        self._nonfinite, self._stop, self._done = nonfinite, stop, first
        self._state, self._facts = state, facts

    def after(self, done: int, norm: Tensor) -> None:
        """`done` steps are taken; norm: of the last one's gradient, still on the device.

        Raises NonfiniteError, StoppedError, or OutputError where the checkpoint before leaving could not be written.
        """
        self._done = done
        self._nonfinite.after_step(done, norm)
        self._checkpoints.settle(wait=False)
        asked = self._stop.after_step()
        last = done == self._config.steps
        if asked or last:
            self._nonfinite.settle()
            self._checkpoints.save_now(done, self._state(), self._facts(done))
            if not last:
                raise self._stop.error(asked, done, self._config.steps)
        elif done % self._config.checkpoint_every == 0:
            self._nonfinite.settle()
            self._checkpoints.save(done, self._state(), self._facts(done))

    def without_data(self, error: DatasetError) -> DatasetError:
        """The line for data that could not be read in mid-run. Alone, the steps that were taken are saved first."""
        if self._context.world_size == 1 and self._done:  # others would wait for this worker in the middle of their step
            try:
                self._checkpoints.save_now(self._done, self._state(), self._facts(self._done))
            except OutputError as unsaved:
                return DatasetError(f"{error} (in step {self._done + 1}; and {unsaved})")
        saved = self._checkpoints.saved
        kept = f"the checkpoint of step {saved} holds what was trained; add --resume true" if saved else "nothing was trained yet"
        return DatasetError(f"{error} (in step {self._done + 1}; {kept})")
