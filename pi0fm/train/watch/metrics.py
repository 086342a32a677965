"""A run's metrics: JSON lines for programs, TensorBoard and other trackers for people.

Owns: both files. Does not know: the meaning of the numbers, other trackers (trackers.py).
"""

import io
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from pi0fm import files
from pi0fm.train.watch.trackers import TENSORBOARD, Tracker

CUT = 2**62  # stands for the step of a line truncated by a kill: later than any


@final
class MetricsWriter:
    """Append to `<output_dir>/metrics.jsonl`, one object per line with `step`, and to trackers: TensorBoard files next to it, and others.

    first_step: lines of later steps belong to a run that was killed before its next checkpoint; they are dropped. config: options of the
    run for trackers. Raises what `Tracker` raises.
    """

    def __init__(
        self, output_dir: Path, first_step: int, trackers: Sequence[str] = (TENSORBOARD,), config: Mapping[str, Any] | None = None
    ) -> None:
        path = output_dir / "metrics.jsonl"
        with files.write_faults(output_dir):
            if path.exists():
                files.write_text(path, "".join(f"{line}\n" for line in _lines(path) if _step_of(line) <= first_step))
            self._file = path.open("a", buffering=1)
            boards = [_Board(output_dir / TENSORBOARD, first_step) for name in trackers if name == TENSORBOARD]
        self._sinks: tuple[_Board | Tracker, ...] = (
            *boards,
            *(Tracker(name, output_dir, config or {}) for name in trackers if name != TENSORBOARD),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line and flush it, since a driver on another machine draws its progress bar from it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Flush and close all files and trackers."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


@final
class _Board:
    """TensorBoard event file, written without TensorBoard's writer thread, whose errors cannot be caught."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # not needed to read metrics.jsonl

        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}").open("ab", buffering=0)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides later steps of a killed run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

    def close(self) -> None:
        self._file.close()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.write(record.getvalue())


def read_last(output_dir: Path, metric: str = "loss") -> dict[str, float] | None:
    """Return the last whole line of metrics.jsonl that holds `metric`, or None."""
    path = output_dir / "metrics.jsonl"
    if not path.exists():
        return None
    for line in reversed(_lines(path)):
        if 0 <= _step_of(line) < CUT and metric in (values := json.loads(line)):
            return dict(values)
    return None


def read_lines(output_dir: Path) -> list[dict[str, float]]:
    """Return every whole line of metrics.jsonl in order; none without a file."""
    path = output_dir / "metrics.jsonl"
    return [dict(json.loads(line)) for line in _lines(path) if 0 <= _step_of(line) < CUT] if path.exists() else []


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _step_of(line: str) -> int:
    """Return the step of a line, CUT for a truncated one, -1 for an empty one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return CUT if line.strip() else -1
