"""One run at a time in an output folder.

Owns: the lease that a live run holds on its folder. Does not know: the contents of the folder.

    .running   JSON: host, process, beat; locked (flock) and renewed every 10 s by the run's first process, removed at its end

    locked                                   refused at once: on this machine, and where the file system shares locks between machines
    unlocked, written on this machine        its run is dead: the lease is taken
    unlocked, written on another machine     a file system without locks: watched for 3 beats; refused if renewed, else taken

Ages are differences of the file server's times, so the clocks of the machines need not agree.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pi0fm import files, progress
from pi0fm_client.errors import OutputError

NAME = ".running"
SECONDS_BETWEEN_BEATS = 10.0
BEATS_UNTIL_DEAD = 3


@contextmanager
def hold_lease(folder: Path) -> Iterator[None]:
    """Hold the lease on `folder`, which is made if needed, during the block. Raises OutputError while another run holds it."""
    files.refuse_name(folder)
    made = not folder.exists()
    files.make_folder(folder)
    with files.write_faults(folder):
        descriptor = _take(folder / NAME)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, stop), name="pi0fm-lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        with suppress(OSError):
            (folder / NAME).unlink()
            if made and not any(folder.iterdir()):
                folder.rmdir()
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a run seems live in `folder`, without touching it: by its process on this machine, by its last beat on another one."""
    path = folder / NAME
    try:
        held = json.loads(path.read_text())
        beaten = time.time() - path.stat().st_mtime < BEATS_UNTIL_DEAD * SECONDS_BETWEEN_BEATS
    except (OSError, ValueError):
        return False
    if not isinstance(held, dict):
        return False
    return _holder_runs(held) if held.get("host") == socket.gethostname() else beaten


def _take(path: Path) -> int:
    """Take the lease and return its descriptor. Raises OutputError while another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _read(descriptor)
            locked = files.try_lock(descriptor)
            if locked is False or (held and not _holder_is_dead(path, descriptor, held, locks=locked is True)):
                raise OutputError(_held_message(path.parent, held))
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                _write(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended and removed it between our open and our lock


def _holder_is_dead(path: Path, descriptor: int, held: dict[str, Any], *, locks: bool) -> bool:
    """Whether the run that wrote `held` is dead. locks: the lease could be locked, so no process of this machine holds it."""
    if held.get("host") == socket.gethostname():
        return locks or not _holder_runs(held)
    if _age(path, descriptor) > BEATS_UNTIL_DEAD * SECONDS_BETWEEN_BEATS:
        return True
    progress.say(f"waiting to see whether the run of {held.get('host')} in {path.parent} still lives")
    deadline = time.monotonic() + BEATS_UNTIL_DEAD * SECONDS_BETWEEN_BEATS
    while time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_BEATS / 10)
        if _read(descriptor).get("beat") != held.get("beat"):
            return False
    return True


def _holder_runs(held: dict[str, Any]) -> bool:
    try:
        return psutil.Process(int(held["process"])).create_time() == held["created"]
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _age(path: Path, descriptor: int) -> float:
    """Return the seconds since the last beat, by the clock of the file server."""
    probe = path.with_name(f"{NAME}.{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - os.fstat(descriptor).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _held_message(folder: Path, held: dict[str, Any]) -> str:
    who = f"process {held['process']} on {held['host']}" if {"process", "host"} <= held.keys() else "another process"
    return f"one run at a time may use {folder}, found {who} at work in it; end it, or choose another --output_dir"


def _beat(descriptor: int, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(SECONDS_BETWEEN_BEATS):
        beat += 1
        with suppress(OSError):  # a full disk is reported where the run writes
            _write(descriptor, beat)


def _write(descriptor: int, beat: int) -> None:
    """Write the facts in place, in a fixed length, so that a beat needs no disk space."""
    facts = {"host": socket.gethostname(), "process": os.getpid(), "created": psutil.Process().create_time(), "beat": beat}
    os.pwrite(descriptor, json.dumps(facts).ljust(255).encode() + b"\n", 0)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
