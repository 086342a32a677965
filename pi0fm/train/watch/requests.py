"""What a run is asked for through files in its folder, where no signal reaches it.

Owns: the names, and which of two wins. Does not know: torch, who listens (signals.py), what is then done (guard.py).

    SAVE    a checkpoint now; the file is removed when it is there        a person, or Ray before it changes the number of workers
    MOVE    the same, then leave, to be started again on other nodes      Ray, when a node is announced to go
    STOP    the same, then end                                            a person, or a driver that was told to
"""

import os
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

from pi0fm import files


class Request(IntEnum):
    """A request to a running process; of two at once the greater one is done."""

    NONE = 0
    SAVE = 1
    MOVE = 2
    INTERRUPT = 3
    STOP = 4


FILES = (Request.STOP, Request.MOVE, Request.SAVE)  # each of its name


def ask(output_dir: Path, request: Request) -> Path:
    """Write the file that asks a run, from another process: a driver for its workers, or a person on a shared disk. Returns it."""
    with files.write_faults(output_dir):
        files.write_text(output_dir / request.name, f"{os.getpid()}\n")
    return output_dir / request.name


def withdraw(output_dir: Path, requests: Iterable[Request] = FILES) -> None:
    """Remove requests: before a run continues, and when they are done."""
    for request in requests:
        (output_dir / request.name).unlink(missing_ok=True)
