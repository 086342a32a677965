"""What the first worker says, on the driver's standard error: Ray shows nothing of its workers' output.

Owns: the file that carries the lines, both of its ends. Does not know: who says what.

    worker   progress.say -> heard_by -- appends -->  RUN/ray/said.txt  <-- every second --  driver   `Echo.repeat`
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pi0fm import progress


@contextmanager
def heard_by(path: Path | None) -> Iterator[None]:
    """Append what this process says during the block to a file; None for nowhere. A disk that takes no line does not end the run."""
    if path is None:
        yield
        return

    def add(text: str) -> None:
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    with progress.heard(add):
        yield


class Echo:
    """Says here the lines that others append to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, path.stat().st_size if path.exists() else 0

    def repeat(self) -> None:
        """Say what was appended since the last call, whole lines only."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read += len(whole) + 1
                progress.say(whole.decode(errors="replace"))
