"""The figures of one part of the card's measurements, on disk after every one.

Owns: the rows, the time that is left to a part, what becomes of a case that fails. Does not know: what is measured; it imports no torch.

    case -> enough time left? -> run -> row, written at once
                  |               `-> out of memory, error: a row that says so, and the next case goes on
                  `-> a row that says that there was no time
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from pi0fm import files

OUT_OF_MEMORY = "out of memory"


@final
class Results:
    """The rows of one part, in `path` as JSON. seconds: how long the part may take from now on."""

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
        """Keep a figure.

        limit_share: of the limit measured in the same run, 0 to 1; target: the value to reach; note: any words, or why there is no figure.
        """
        row = {"what": what, "value": _short(value), "unit": unit, "limit_share": _short(limit_share), "target": target, "note": note}
        self.rows.append(row | {"details": details})
        self.write(finished=False)

    def attempt(self, what: str, case: Callable[[], None], seconds: float, clear: Callable[[], None] = lambda: None) -> str:
        """Run a case that adds its own rows, when `seconds` are left. The reason when it could not be run to its end, else empty.

        clear: called after a failure, once the case's own objects are gone.
        """
        left = self._began + self._seconds - time.monotonic()
        if left < seconds:
            reason = f"not measured: {left:.0f} s were left, and it takes about {seconds:.0f}"
            self.add(what, None, note=reason)
            return reason
        try:
            case()
        except Exception as error:  # noqa: BLE001  (whatever it is, the other cases are still worth having)
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
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")
