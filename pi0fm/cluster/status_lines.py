"""Status lines of the first worker, repeated on the driver's standard error, since Ray's own forwarding is off.

Owns: writing and reading the file that carries the lines. Does not know: their contents.

    worker   progress.say -> appended_to -- appends -->  RUN/ray/said.txt  <-- every second --  driver   `StatusReader.print_new`
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pi0fm import progress


@contextmanager
def appended_to(path: Path | None) -> Iterator[None]:
    """Append this process's status lines to a file during the block; None for no file. A failed write does not end the run."""
    if path is None:
        yield
        return

    def add(text: str) -> None:
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    with progress.passed_to(add):
        yield


class StatusReader:
    """Reader that repeats the lines appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, path.stat().st_size if path.exists() else 0

    def print_new(self) -> None:
        """Print the complete lines appended since the last call."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read += len(whole) + 1
                progress.say(whole.decode(errors="replace"))
