"""A bounded log of inferences: each batch with its observations, seeds and answers, so that it can be inferred again (replay.py).

Owns: the files, their bound, which batches are dropped when the disk is slower than the robots. Does not know: policies, the network.

    FOLDER/requests-00000007.log     description | entry | entry | ...          the oldest file goes when the bound is reached
    entry                            length, CRC-32 (8 bytes), a message of pi0fm_client.wire: one request of a batch

A batch is kept as it was, since the rounding of a sum depends on the shape that it is computed in. A file that a killed server left is
read up to its last whole batch.
"""

import os
import queue
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import NDArray

from pi0fm import files
from pi0fm.serve.batcher import Request, logger
from pi0fm_client import wire
from pi0fm_client.errors import ConfigError, ObservationError, OutputError, Pi0fmError, ServingError
from pi0fm_client.types import ActionChunk, ActionPrefix, Observation

FORMAT = 1
FILES = 8  # that the bound is divided into
MAX_WAITING_BYTES = 64 * 2**20  # that the disk may be behind
MAX_ENTRY_BYTES = 2 * wire.MAX_FRAME_BYTES
LOCK = ".lock"
_HEAD = struct.Struct("<II")


@dataclass(frozen=True)
class LoggedBatch:
    """Requests that were inferred together, with their seeds, answers and the seconds since 1970 at which they were answered."""

    description: Mapping[str, Any]
    requests: list[Request]
    seeds: list[int]
    actions: list[NDArray[np.float32]]
    at: float


@final
class RequestLog:
    """Write batches in a thread. describe: the description of the policy with an identity: its bundle's path, how it was loaded.

    Raises OutputError for a folder that cannot be written or that another server writes.
    """

    def __init__(self, folder: Path, max_bytes: int, describe: Callable[[str | None], Mapping[str, Any]]) -> None:
        self._lock: int | None = _locked(folder)
        self._folder, self._max_bytes, self._describe = folder, max_bytes, describe
        self._number = max((_number(path) for path in _paths(folder)), default=0)
        self._file: BinaryIO | None = None
        self._identity: str | None = None
        self._batch, self._waiting_bytes, self.dropped = 0, 0, 0
        self._jobs: queue.SimpleQueue[tuple[str | None, list[dict[str, Any]], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pi0fm-log", daemon=True)
        self._thread.start()

    def inferred(self, identity: str | None, requests: Sequence[Request], seeds: Sequence[int], chunks: Sequence[ActionChunk]) -> None:
        """Log one batch, or count it as dropped when the disk is too far behind."""
        size = sum(sum(image.nbytes for image in request.observation.images.values()) + 4096 for request in requests)
        if self._waiting_bytes + size > MAX_WAITING_BYTES or not self._thread.is_alive():
            self.dropped += 1
            return
        self._waiting_bytes += size
        self._batch += 1
        entries = [
            {"batch": self._batch, "size": len(requests), "at": time.time(), "actions": chunk.actions, "seed": seed, **_plain(request)}
            for request, seed, chunk in zip(requests, seeds, chunks, strict=True)
        ]
        self._jobs.put((identity, entries, size))

    def close(self) -> None:
        """Write the waiting batches, and release the folder to other servers."""
        self._jobs.put(None)
        self._thread.join(10)
        if self._lock is not None and not self._thread.is_alive():
            os.close(self._lock)
            self._lock = None

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                identity, entries, size = job
                self._notice_deletion()
                if self._file is None or identity != self._identity or self._file.tell() > self._max_bytes // FILES:
                    self._begin_file(identity)
                for entry in entries:
                    self._write(entry)
                assert self._file is not None
                self._file.flush()
                self._waiting_bytes -= size
        except (OSError, Pi0fmError) as error:  # the robots go on
            logger.error("requests are no longer logged: %s cannot be written (%s)", self._folder, error)
        if self._file is not None:
            self._file.close()

    def _notice_deletion(self) -> None:
        """Begin the log again where its file, or the whole folder, was deleted under the server."""
        if self._file is None or os.fstat(self._file.fileno()).st_nlink:
            return
        logger.warning("the log of requests in %s was deleted: it begins again there", self._folder)
        self._file.close()
        self._file = None
        if not (self._folder / LOCK).exists() and self._lock is not None:
            os.close(self._lock)
            self._lock = None
            self._lock = _locked(self._folder)

    def _begin_file(self, identity: str | None) -> None:
        if self._file is not None:
            self._file.close()
        kept = _paths(self._folder)
        while kept and sum(path.stat().st_size for path in kept) > self._max_bytes - self._max_bytes // FILES:
            kept.pop(0).unlink()
        self._number, self._identity = self._number + 1, identity
        path = self._folder / f"requests-{self._number:08d}.log"
        self._file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")  # pictures of somebody's room
        self._write({"format": FORMAT, "identity": identity, **self._describe(identity)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        packed = wire.pack(entry)
        self._file.write(_HEAD.pack(len(packed), zlib.crc32(packed)) + packed)


def _locked(folder: Path) -> int:
    """Make the folder and return its lock. Raises OutputError for one that cannot be written, or that another server writes."""
    with files.write_faults(folder):
        lock = files.lock_file(folder / LOCK)
    if lock is None:
        raise OutputError(f"a log of requests has one writer, and a server writes {folder}: give another folder")
    return lock


def read(folder: Path, damaged: list[str] | None = None) -> Iterator[LoggedBatch]:
    """Yield the whole batches of a log, the oldest first. Raises ServingError for a folder that holds none.

    damaged: takes a line for each file that a disk changed; what follows the damage in it is left out. A cut end is none.
    """
    paths = _paths(folder)
    if not paths:
        instead = "give the folder of pi0fm serve --log_requests" if folder.exists() else files.missing(folder)
        raise ServingError(f"no log of requests in {folder}: {instead}")
    for path in paths:
        description: Mapping[str, Any] | None = None
        entries: list[dict[str, Any]] = []
        for entry in _entries(path, damaged):
            if description is None:
                if entry.get("format") != FORMAT:
                    raise ConfigError(f"{path} is a log of format {entry.get('format')}, this pi0fm reads {FORMAT}")
                description = entry
                continue
            entries.append(entry)
            if len(entries) == entry["size"]:
                requests, seeds = [_request(each) for each in entries], [each["seed"] for each in entries]
                yield LoggedBatch(description, requests, seeds, [each["actions"] for each in entries], entry["at"])
                entries = []


def _entries(path: Path, damaged: list[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the entries of one file up to the first one that is cut or damaged."""
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, expected = _HEAD.unpack(head)
            packed = file.read(min(length, MAX_ENTRY_BYTES))
            if len(packed) != length or zlib.crc32(packed) != expected:
                if damaged is not None and (len(packed) == length or file.read(1)):
                    damaged.append(f"{path} is damaged before byte {file.tell()}: what follows in it is left out")
                return
            try:
                yield wire.unpack(packed, max_bytes=MAX_ENTRY_BYTES)
            except ObservationError:
                return


def _plain(request: Request) -> dict[str, Any]:
    """Return a request as a message; `_request` is its inverse."""
    seen, found = request.observation, dict[str, Any]()
    if request.prefix is not None:
        found = {"prefix": request.prefix.actions, "inference_delay": request.prefix.inference_delay}
    return {"images": dict(seen.images), "state": seen.state, "prompt": seen.prompt, "candidates": request.candidates, **found}


def _request(entry: Mapping[str, Any]) -> Request:
    prefix = ActionPrefix(entry["prefix"], entry["inference_delay"]) if "prefix" in entry else None
    observation = Observation(entry["images"], entry["state"], entry["prompt"])
    return Request(observation, entry["seed"], prefix=prefix, candidates=entry["candidates"])


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("requests-*.log"), key=_number)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("requests-")
    return int(digits) if digits.isdecimal() else 0
