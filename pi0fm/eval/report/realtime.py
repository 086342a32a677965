"""Files of an evaluation in real time: report.html, summary.json, episodes.parquet.

Owns: their content, the figure. Does not know: how episodes ran.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pi0fm import files, machine, pages
from pi0fm.eval.report.compare import COLOURS
from pi0fm.eval.report.page import ROWS, ReportContext, percent
from pi0fm.eval.rollouts.realtime import DrivenEpisode

if TYPE_CHECKING:
    from pi0fm.eval.rollouts.delays import ModeAtDelay


def write(
    output: Path,
    title: str,
    cells: Sequence["ModeAtDelay"],
    rows: Sequence[DrivenEpisode],
    facts: Mapping[str, Mapping[str, str]],
    seconds: float,
) -> Path:
    """Write the three files; return the page's path."""
    with files.new_file(output / ROWS) as file:
        pq.write_table(pa.Table.from_pylist([row.row() for row in rows]), file, write_page_checksum=True)
    context = ReportContext(title, machine.command_line(), seconds, facts=facts)
    page = pages.render("eval/report/realtime.html.j2", {"delays": draw(cells)}, cells=cells, background=context, percent=percent)
    told = {"cells": [cell.json() for cell in cells], "seconds": round(seconds, 1), "command": context.command, "facts": facts}
    files.write_json(output / "summary.json", told)
    files.write_text(output / "report.html", page)
    return output / "report.html"


def draw(cells: Sequence["ModeAtDelay"]) -> bytes:
    """Draw success with its interval, jump and reaction time against the delay, one line per mode, as PNG."""
    figure, axes = pages.panels(3, width=12, height=3.6)
    for number, (mode, of_mode) in enumerate(by_mode(list(cells))):
        colour, delays = COLOURS[number % len(COLOURS)], [cell.delay_ms if cell.asked_ms is None else cell.asked_ms for cell in of_mode]
        known = [(delay, cell.success) for delay, cell in zip(delays, of_mode, strict=True) if cell.success is not None]
        low, high = ([100 * getattr(interval, end) for _, interval in known] for end in ("low", "high"))
        axes[0].plot([delay for delay, _ in known], [100 * interval.rate for _, interval in known], color=colour, marker=".", label=mode)
        axes[0].fill_between([delay for delay, _ in known], low, high, color=colour, alpha=0.12, linewidth=0)
        axes[1].plot(delays, [cell.jump for cell in of_mode], color=colour, marker=".", label=mode)
        axes[1].plot(delays, [cell.change for cell in of_mode], color=colour, linewidth=0.8, linestyle=":")
        axes[2].plot(delays, [cell.reaction_ms for cell in of_mode], color=colour, marker=".", label=mode)
    for axis, title, label in (
        (axes[0], "Success, 95 % interval", "%"),
        (axes[1], "Jump between chunks (dotted: elsewhere)", "half ranges"),
        (axes[2], "Reaction time", "ms"),
    ):
        pages.chart(axis, title, "delay, ms", label)
        axis.set_ylim(bottom=0)
    axes[0].set_ylim(0, 102)
    pages.legend(axes[0])
    return pages.png(figure)


def by_mode(cells: list["ModeAtDelay"]) -> Iterator[tuple[str, list["ModeAtDelay"]]]:
    """Yield each mode and its cells in the order of delays."""
    for mode in dict.fromkeys(cell.mode for cell in cells):
        yield (
            mode,
            sorted(
                (cell for cell in cells if cell.mode == mode), key=lambda cell: cell.delay_ms if cell.asked_ms is None else cell.asked_ms
            ),
        )
