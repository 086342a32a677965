"""What a run says about itself: JSON lines for programs, TensorBoard for people.

Owns: the two files. Does not know: what the numbers mean.
"""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pi0fm import files

CUT = 2**62  # the step of a line that was cut by a kill: later than any


class Metrics:
    """Appends to `<output_dir>/metrics.jsonl`, one object a line with `step`, and to TensorBoard files beside it.

    first_step: lines of later steps belong to a run that was killed before its next checkpoint; they are dropped.
    """

    def __init__(self, output_dir: Path, first_step: int) -> None:
        path = output_dir / "metrics.jsonl"
        with files.write_faults(output_dir):
            if path.exists():
                files.write_text(path, "".join(f"{line}\n" for line in _lines(path) if _step_of(line) <= first_step))
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, flushed at once: a driver on another machine draws its progress bar from it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_last(output_dir: Path, metric: str = "loss") -> dict[str, float] | None:
    """The last whole line of metrics.jsonl that holds `metric`, or None."""
    path = output_dir / "metrics.jsonl"
    if not path.exists():
        return None
    for line in reversed(_lines(path)):
        if 0 <= _step_of(line) < CUT and metric in (values := json.loads(line)):
            return dict(values)
    return None


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _step_of(line: str) -> int:
    """The step of a line, CUT of one that is not whole, -1 of an empty one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return CUT if line.strip() else -1
