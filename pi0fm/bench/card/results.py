"""Figures of one part of `pi0fm bench card`, written to disk after each.

Owns: the rows, the time left to a part, the handling of a case that fails. Does not know: what is measured; it imports no torch.

    case -> enough time left? -> run -> row, written at once
                  |               `-> out of memory, error: a row with the reason, then the next case
                  `-> a row that says "not measured"
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from pi0fm import files

OUT_OF_MEMORY = "out of memory"


@final
class Results:
    """Rows of one part, written to `path` as JSON. seconds: time limit of the part, from now on."""

    def __init__(self, part: str, path: Path, seconds: float) -> None:
        self._part, self._path, self._began, self._seconds = part, path, time.monotonic(), seconds
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.write(finished=False)

    def add(
        self,
        what: str,
        value: float | None,
        unit: str = "",
        *,
        limit_share: float | None = None,
        target: str = "",
        note: str = "",
        **details: Any,
    ) -> None:
        """Add a row and write all rows.

        limit_share: share of the limit measured in the same run, 0 to 1; target: value to reach; note: a remark, or why there is no value.
        """
        row = {"what": what, "value": _short(value), "unit": unit, "limit_share": _short(limit_share), "target": target, "note": note}
        self.rows.append(row | {"details": details})
        self.write(finished=False)

    def attempt(self, what: str, case: Callable[[], None], seconds: float, clear: Callable[[], None] = lambda: None) -> str:
        """Run a case, which adds its rows, if `seconds` are left; returns the reason if it did not run to its end, else "".

        clear: called after a failure, when the case's objects have been freed.
        """
        left = self._began + self._seconds - time.monotonic()
        if left < seconds:
            reason = f"not measured: {left:.0f} s were left, and it takes about {seconds:.0f}"
            self.add(what, None, note=reason)
            return reason
        try:
            case()
        except Exception as error:  # noqa: BLE001  (the other cases run even so)
            short = OUT_OF_MEMORY if "out of memory" in str(error) else f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        else:
            return ""
        clear()
        self.add(what, None, note=short)
        return short

    def write(self, finished: bool) -> None:
        """Write all rows to disk."""
        seconds = round(time.monotonic() - self._began, 1)
        tree = {"part": self._part, "finished": finished, "seconds": seconds, "facts": self.facts, "rows": self.rows}
        files.write_json(self._path, tree)


def _short(value: float | None) -> float | None:
    """Round to four significant digits."""
    return None if value is None else float(f"{value:.4g}")
