"""Requests to a run through files in its folder, where no signal reaches it.

Owns: their names and precedence. Does not know: torch, who reads them (signals.py), what follows (guard.py).

    SAVE    a checkpoint now; the file is removed once it is written      a person, or Ray before it changes the number of workers
    MOVE    the same, then leave, to be restarted on other nodes          Ray, when a node is about to shut down
    STOP    the same, then end                                            a person, or a driver that was stopped
"""

import os
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

from pi0fm import files


class RunRequest(IntEnum):
    """Request to a running process; of two at once the greater one applies."""

    NONE = 0
    SAVE = 1
    MOVE = 2
    INTERRUPT = 3
    STOP = 4


FILES = (RunRequest.STOP, RunRequest.MOVE, RunRequest.SAVE)  # each named after its request


def write_request(output_dir: Path, request: RunRequest) -> Path:
    """Write the request's file for a run in another process, as a driver does for its workers. Returns the file."""
    with files.write_faults(output_dir):
        files.write_text(output_dir / request.name, f"{os.getpid()}\n")
    return output_dir / request.name


def remove_requests(output_dir: Path, requests: Iterable[RunRequest] = FILES) -> None:
    """Remove requests, before a run resumes and when they are fulfilled."""
    for request in requests:
        (output_dir / request.name).unlink(missing_ok=True)
