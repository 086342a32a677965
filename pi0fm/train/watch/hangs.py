"""A run that takes no more steps: ended after a timeout, with the stacks of all threads of every worker.

Owns: the timeout, the files of stacks, the status lines. Does not know: why a worker hangs, who restarts the workers.

    worker 0   | step 57 | all-reduce ................ | timeout: stacks, grace, exit    <output_dir>/hangs/step-57-worker-0.txt
    worker 1   | step 57 | a lock, a dead disk ....... | timeout: stacks, grace, exit                            -worker-1.txt
    worker 2   | step 57 | its machine is gone                                           named by the first worker that wrote
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, final

from pi0fm import files, progress
from pi0fm.train.parallel.context import Context

FOLDER = "hangs"
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_STATUS_LINE = 1.0  # for a status line to reach another process before this one ends
SECONDS_OF_GRACE = 5.0  # for all to write: the first worker that ends breaks the connections of the others


@final
class HangWatch:
    """`with HangWatch(...) as watch: ... watch.beat(step)`; ends the process after `seconds` without a beat.

    nodes: of every worker, by rank. end: exits the process with no clean-up, since its threads wait for other machines.
    """

    def __init__(
        self, output_dir: Path, context: Context, nodes: Sequence[str], seconds: float, end: Callable[[int], object] = os._exit
    ) -> None:
        self._folder, self._context, self._nodes, self._seconds, self._end = output_dir / FOLDER, context, nodes, seconds, end
        self._step, self._last, self._stop = 0, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pi0fm-hangs", daemon=True)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, step: int | None = None) -> None:
        """Record progress. step: the step finished; None for a part of one."""
        self._step, self._last = self._step if step is None else step, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(SECONDS_BETWEEN_LOOKS, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                with suppress(OSError):  # the disk itself may hang
                    self._report()
                self._end(1)
                return

    def _report(self) -> None:
        rank, began = self._context.rank, time.time()
        path = self._path(rank)
        line = (
            f"worker {rank} on {self._nodes[rank]} took no step for {self._seconds:g} s (hang_seconds) after step {self._step}; it is "
            f"ended, the stacks of its threads are in {path}"
        )
        files.write_text(path, f"{line}\n\n{stacks(skip=threading.get_ident())}")
        progress.say(line)
        time.sleep(SECONDS_OF_GRACE)
        written = [other for other in range(len(self._nodes)) if self._written(other, began)]
        silent = [f"worker {other} on {self._nodes[other]}" for other in range(len(self._nodes)) if other not in written]
        if silent and rank == min(written):
            progress.say(f"no stack came from {', '.join(silent)}: stopped, or its machine is gone; look there first")
            time.sleep(SECONDS_FOR_STATUS_LINE)

    def _path(self, rank: int) -> Path:
        return self._folder / f"step-{self._step}-worker-{rank}.txt"

    def _written(self, rank: int, began: float) -> bool:
        """Whether a worker has written its stacks; a file of an earlier hang after the same step does not count."""
        found = self._path(rank)
        return found.exists() and found.stat().st_mtime > began - 2 * SECONDS_OF_GRACE


def stacks(skip: int = 0) -> str:
    """Format the stacks of every thread of this process, the main one first. skip: the calling thread."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: names.get(item[0]) != threading.main_thread().name)
    each = [f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames if ident != skip]
    return "\n".join(each)
