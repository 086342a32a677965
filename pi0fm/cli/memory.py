"""How much memory a command and all its processes took at most.

Owns: sampling. Does not know: what ran.
"""

import threading
from types import TracebackType
from typing import Self

import psutil

SECONDS_BETWEEN_LOOKS = 2.0


class PeakMemory:
    """Samples the sum over this process and all its descendants; `peak` in bytes.

    Proportional set size where the system has it (pages that processes share count once), else resident set size.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pi0fm-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, memory_of_tree())

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            self.peak = max(self.peak, memory_of_tree())


def memory_of_tree() -> int:
    """Bytes of this process and its descendants, now."""
    here = psutil.Process()
    return sum(_memory_of(process) for process in (here, *here.children(recursive=True)))


def _memory_of(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.rss)
    except psutil.Error:  # it ended while we looked
        return 0
