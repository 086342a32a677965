"""Child processes: a function call in a spawned one, the end of a child with its parent, time and memory of a process tree.

Owns: starting a process for one function, its result and its death; SIGTERM as Ctrl-C; resources used by a process and its descendants.
Does not know: the function.

    this process          its time, its memory
    |- live child         the same, and the time of its ended children
    |  `- live grandchild the same
    `- ended children     their time, kept by the kernel once they have been waited for
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import psutil

from pi0fm_client.errors import Pi0fmError

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_LOOKS_AT_PARENT = 0.5


def in_fresh_process[R](function: Callable[..., R], *arguments: object) -> R:
    """Call `function(*arguments)` in a spawned process, which ends with this one; its exceptions are raised here.

    Function, arguments and result are pickled. Raises Pi0fmError when the process dies before it returns.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise Pi0fmError(
                "a measurement's process must end by itself, found it killed, perhaps for lack of memory; "
                "close other programs, or name fewer --cases"
            ) from None


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent, the process with id `parent`, has ended for any reason.

    Polls the parent's process id, which changes when the parent dies on every POSIX system. Linux's PR_SET_PDEATHSIG follows the thread
    that started the child, not the process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS_AT_PARENT)
        os._exit(1)

    threading.Thread(target=watch, name="pi0fm-parent", daemon=True).start()


class Terminated(KeyboardInterrupt):
    """SIGTERM received inside `sigterm_interrupts`."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, which batch systems and containers send, raise KeyboardInterrupt (`Terminated`) inside the block, as Ctrl-C does.

    Only the main thread can set a handler: in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def cpu_seconds_of_tree() -> float:
    """Return the user plus system seconds of this process and its descendants, live or ended; only differences are meaningful.

    A child that ended is missing until it has been waited for. Other programs on the machine change wall time, but hardly this.
    """
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended after the list was made, and counts among the ended children
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_of_tree() -> int:
    """Return the bytes held by this process and its descendants; shared pages count once where the system reports PSS (else RSS)."""
    return sum(getattr(info, "pss", 0) or info.rss for info in _each(lambda process: process.memory_full_info()))


def anonymous_memory_of_tree() -> int:
    """Return the resident bytes of this process and its descendants that are backed neither by files nor by shared memory."""
    return sum(info.rss - getattr(info, "shared", 0) for info in _each(lambda process: process.memory_info()))


def peak_resident() -> int:
    """Return the peak resident set of this process, in bytes.

    Avoids getrusage on Linux, where its figure survives exec, so that a new process starts with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMemory:
    """The largest `memory_of_tree` inside a block, sampled; `peak` in bytes."""

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


def _each[T](ask: Callable[[psutil.Process], T]) -> Iterator[T]:
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.Error):  # it ended in between
            yield ask(process)
