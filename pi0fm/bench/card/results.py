"""What a part of the card's measurements has found so far, on disk after every row.

Owns: the rows, the time that is left to a part, what becomes of a case that fails. Does not know: what is measured; it imports no torch.

    case -> enough time left? -> run -> row, written at once
                  |               `-> out of memory, error: a row that says so, and the next case goes on
                  `-> a row that says that there was no time
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from pi0fm import files

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Row:
    """One figure. limit_share: of the limit that was measured in the same run, 0 to 1; target: what it should be; note: why it is none."""

    what: str
    value: float | None = None
    unit: str = ""
    limit_share: float | None = None
    target: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@final
class Results:
    """The rows of one part, in `path` as JSON. seconds: how long the part may take from now on."""

    def __init__(self, part: str, path: Path, seconds: float) -> None:
        self._part, self._path, self._began, self._seconds = part, path, time.monotonic(), seconds
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}
        self.write(finished=False)

    def left(self) -> float:
        """Seconds until the part's time is over."""
        return self._seconds - (time.monotonic() - self._began)

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        limit_share: float | None = None,
        target: str = "",
        note: str = "",
        **details: Any,
    ) -> None:
        """Keep a figure."""
        share = None if limit_share is None else _short(limit_share)
        self._keep(Row(what, _short(value), unit, share, target, note, details))

    def attempt(self, what: str, case: Callable[[], None], seconds: float, clear: Callable[[], None] = lambda: None) -> str:
        """Run a case that adds its own rows, when `seconds` are left. The reason when it could not be run to its end, else empty.

        clear: called after a failure, once the case's own objects are gone.
        """
        if self.left() < seconds:
            reason = f"not measured: {self.left():.0f} s were left, and it takes about {seconds:.0f}"
            self._keep(Row(what, note=reason))
            return reason
        try:
            case()
        except Exception as error:  # noqa: BLE001  (whatever it is, the other cases are still worth having)
            short = OUT_OF_MEMORY if "out of memory" in str(error) else f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
        else:
            return ""
        clear()
        self._keep(Row(what, note=short))
        return short

    def write(self, finished: bool) -> None:
        """Put what there is on disk."""
        seconds = round(time.monotonic() - self._began, 1)
        tree = {
            "part": self._part,
            "finished": finished,
            "seconds": seconds,
            "facts": self.facts,
            "rows": [asdict(row) for row in self.rows],
        }
        files.write_json(self._path, tree)

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.write(finished=False)


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
