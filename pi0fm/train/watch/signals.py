r"""Requests to save or to stop, and the agreement of all workers on the step after which they do.

Owns: the handlers of SIGTERM and SIGINT during a block, polling requests.py's files, the agreement.
Does not know: what is saved, and what happens to a run that leaves.

    step        |    k    |   k+1   |   k+2   |
    worker 0    | SIGTERM |                        flags of step k are summed while step k+1 computes, and read after it:
    worker 1    |         |                        no worker waits for another, and all leave after the same step
    flags          \__sum of k__/\ -> leave after k+1
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, final

import torch

from pi0fm.processes import Terminated, sigterm_interrupts
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.watch.requests import FILES, RunRequest, remove_requests
from pi0fm_client.errors import OutputError, Pi0fmError

SECONDS_BETWEEN_LOOKS = 1.0  # at the files; each may cost a round trip to a file server
HANDLED = (signal.SIGTERM, signal.SIGINT)


_REQUESTED = {int(signal.SIGINT): RunRequest.INTERRUPT, int(signal.SIGTERM): RunRequest.STOP}


class StoppedError(Pi0fmError):
    """A run stopped by Ctrl-C, after a checkpoint."""

    exit_code = 128 + signal.SIGINT


class TerminatedError(StoppedError):
    """A run stopped by SIGTERM or a STOP file, after a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class MovedError(TerminatedError):
    """A run that left a node about to shut down, after a checkpoint."""


def stopped_error(number: int, line: str) -> StoppedError:
    """Return the error of a run stopped by signal `number`."""
    return StoppedError(line) if number == signal.SIGINT else TerminatedError(line)


@contextmanager
def terminated_outside_steps(describe: Callable[[], str]) -> Iterator[None]:
    """Turn SIGTERM inside the block, where no other handler is set, into TerminatedError with the line of `describe`."""
    try:
        with sigterm_interrupts():
            yield
    except Terminated:
        raise TerminatedError(describe()) from None


@final
class RecordedSignals:
    """`with RecordedSignals(on_first) as signals: ...`: SIGTERM and SIGINT are recorded instead of obeyed; `on_first` is called once.

    number: of the first signal; 0 before. Handlers can be set only in the main thread; elsewhere nothing is recorded. A second signal
    interrupts at once.
    """

    def __init__(self, on_first: Callable[[], object] | None = None) -> None:
        self.number, self._on_first = 0, on_first
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if self._on_first is not None:
            self._on_first()


@final
class StopSignals:
    """`with StopSignals(parallel, output_dir) as stop: ... number = stop.after_step()`; made by every worker.

    A Ray worker, whose loop does not run in the main thread, receives requests only through the files.
    """

    def __init__(self, parallel: Parallel, output_dir: Path) -> None:
        self._parallel, self._folder = parallel, output_dir
        self._signals = RecordedSignals()
        self._found, self._looked = RunRequest.NONE, 0.0
        self._flag, self._sum = torch.zeros(1, dtype=torch.int32), None

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._signals.__exit__(kind, error, trace)

    def after_step(self) -> RunRequest:
        """Return the request to obey after this step, the same for all workers; a single worker obeys at once."""
        self._poll_files()
        asked = max(_REQUESTED.get(self._signals.number, RunRequest.NONE), self._found)
        group = self._parallel.host_group("stop")
        if group is None:
            return asked
        agreed = 0
        if self._sum is not None:
            self._sum.wait()
            agreed = int(self._flag)
        self._flag.fill_(asked)
        self._sum = torch.distributed.all_reduce(self._flag, torch.distributed.ReduceOp.MAX, group=group, async_op=True)
        return RunRequest(agreed)

    def saved(self, request: RunRequest) -> None:
        """Withdraw a request after its checkpoint was written, or could not be; its file is removed."""
        if self._parallel.context.is_first and request in (RunRequest.SAVE, RunRequest.MOVE):
            remove_requests(self._folder, (request,))
        self._found = RunRequest.NONE
        if self._sum is not None:  # the flags of the step in between repeat the request
            self._sum.wait()
            self._sum = None

    def error(self, request: RunRequest, step: int, steps: int) -> StoppedError:
        """Return the error of a run that stops after `step`, with its checkpoint written."""
        if request is RunRequest.MOVE:
            return MovedError(f"left after step {step} of {steps} for a node that goes away, with a checkpoint; add --resume true to go on")
        interrupted = request is RunRequest.INTERRUPT
        cause = "Ctrl-C" if interrupted else "SIGTERM or its STOP file"
        line = f"stopped by {cause} after step {step} of {steps}, with a checkpoint; add --resume true to go on"
        return stopped_error(signal.SIGINT if interrupted else signal.SIGTERM, line)

    def _poll_files(self) -> None:
        now = time.monotonic()
        if not self._parallel.context.is_first or now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        try:
            self._found = next((request for request in FILES if (self._folder / request.name).exists()), RunRequest.NONE)
        except OSError as error:
            raise OutputError(f"{self._folder} cannot be read ({error.strerror}); mount it again and add --resume true") from error
