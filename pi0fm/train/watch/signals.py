r"""Being asked to stop, and all workers agreeing on the step after which they do.

Owns: the handlers of SIGTERM and SIGINT for the time of a block, the file that asks where no signal arrives, the agreement.
Does not know: what is saved before the run leaves.

    step        |    k    |   k+1   |   k+2   |
    worker 0    | SIGTERM |                        flags of step k are summed while step k+1 computes, and looked at after it:
    worker 1    |         |                        nobody waits for anybody, and all leave after the same step
    flags          \__sum of k__/\ -> leave after k+1
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, final

import torch

from pi0fm import files
from pi0fm.processes import Terminated, sigterm_interrupts
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm_client.errors import OutputError, Pi0fmError

STOP_FILE = "STOP"
SECONDS_BETWEEN_LOOKS = 1.0  # at the file; a look may cost a round trip to a file server
HANDLED = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Pi0fmError):
    """A run that was asked to stop by Ctrl-C, and left a checkpoint."""

    exit_code = 128 + signal.SIGINT


class TerminatedError(StoppedError):
    """A run that was asked to stop by SIGTERM or a STOP file, and left a checkpoint."""

    exit_code = 128 + signal.SIGTERM


def ask_to_stop(output_dir: Path) -> None:
    """Ask a run for a checkpoint and its end from another process: a driver on behalf of its workers, a person on a shared disk."""
    with files.write_faults(output_dir):
        files.write_text(output_dir / STOP_FILE, f"{os.getpid()}\n")


def withdraw(output_dir: Path) -> None:
    """Take back `ask_to_stop`, before a run goes on."""
    (output_dir / STOP_FILE).unlink(missing_ok=True)


def stopped(number: int, line: str) -> StoppedError:
    """The error of a run that the signal `number` stopped."""
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
class NotedSignals:
    """`with NotedSignals(heard) as noted: ...`: SIGTERM and SIGINT are noted instead of obeyed, and `heard` is called for the first.

    number: the first one's; 0 before. Handlers can be set in the main thread alone; elsewhere nothing is noted. The second signal of an
    impatient person interrupts at once.
    """

    def __init__(self, heard: Callable[[], None] | None = None) -> None:
        self.number, self._heard = 0, heard
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if self._heard is not None:
            self._heard()


@final
class StopSignals:
    """`with StopSignals(parallel, output_dir) as stop: ... number = stop.after_step()`; made by every worker.

    A Ray worker, whose loop does not run in the main thread, listens to the file.
    """

    def __init__(self, parallel: Parallel, output_dir: Path) -> None:
        self._parallel, self._file = parallel, output_dir / STOP_FILE
        self._noted = NotedSignals()
        self._looked = 0.0
        self._flag, self._sum = torch.zeros(1, dtype=torch.int32), None

    def __enter__(self) -> Self:
        self._noted.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._noted.__exit__(kind, error, trace)

    def after_step(self) -> int:
        """0 to go on, else the signal's number, the same for all workers after the same step. Alone: without delay."""
        self._look_at_file()
        group = self._parallel.host_group("stop")
        if group is None:
            return self._noted.number
        agreed = 0
        if self._sum is not None:
            self._sum.wait()
            agreed = int(self._flag)
        self._flag.fill_(self._noted.number)
        self._sum = torch.distributed.all_reduce(self._flag, torch.distributed.ReduceOp.MAX, group=group, async_op=True)
        return agreed

    def error(self, number: int, step: int, steps: int) -> StoppedError:
        """The line for a run that leaves after `step`, its checkpoint written."""
        told = "Ctrl-C" if number == signal.SIGINT else "SIGTERM or its STOP file"
        return stopped(number, f"stopped by {told} after step {step} of {steps}, with a checkpoint; add --resume true to go on")

    def _look_at_file(self) -> None:
        now = time.monotonic()
        if self._noted.number or not self._parallel.context.is_first or now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        try:
            if self._file.exists():
                self._noted.number = int(signal.SIGTERM)
        except OSError as error:
            raise OutputError(f"{self._file.parent} cannot be read ({error.strerror}); mount it again and add --resume true") from error
