"""One progress line for every long step: items done and time left.

Owns: the bar on a terminal, and a plain line every few seconds elsewhere (a log file, a CI run). Both go to standard error,
so that standard output holds results only. Does not know: the step's work.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Step:
    """A running long step. `advance` is cheap enough for every item."""

    def __init__(self, name: str, total: int, start: int, bar: Progress | None) -> None:
        self._name, self._total, self._done, self._start = name, total, start, start
        self._began = self._last_line = time.monotonic()
        self._bar = bar
        self._task = bar.add_task(name, total=total, completed=start, note="") if bar else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` items as done; `note` is shown after the line (a loss, a rate)."""
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._last_line = now
            print(self.line(now, note), file=sys.stderr, flush=True)

    def line(self, now: float, note: str = "") -> str:
        """Format `name 40/150 (27%), 00:12 so far, 00:33 left, note`."""
        elapsed = now - self._began
        done_here = self._done - self._start
        left = clock(elapsed / done_here * (self._total - self._done)) if done_here else "?"
        percent = 100 * self._done // self._total if self._total else 100
        tail = f", {note}" if note else ""
        return f"{self._name} {self._done}/{self._total} ({percent}%), {clock(elapsed)} so far, {left} left{tail}"


def clock(seconds: float) -> str:
    """Format seconds as `mm:ss`, or as `h:mm:ss` from one hour."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"


@contextmanager
def step(name: str, total: int, start: int = 0) -> Iterator[Step]:
    """Show the progress of `total` items, `start` of them done earlier (a resumed run)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Step(name, total, start, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Step(name, total, start, bar)


def say(text: str) -> None:
    """Print a status line to standard error, and pass it to the listeners of `passed_to`."""
    print(text, file=sys.stderr, flush=True)
    for listener in list(_LISTENERS):
        listener(text)


_LISTENERS: list[Callable[[str], object]] = []


@contextmanager
def passed_to(listener: Callable[[str], object]) -> Iterator[None]:
    """Pass every status line that any thread of this process prints during the block to `listener`."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)
