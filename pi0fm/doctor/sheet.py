"""PNG of a batch as the network sees it: pictures, prompt and tokens, histograms before and after normalisation.

Owns: the sheet. Does not know: the checks.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi0fm import files, pages
from pi0fm.doctor.batch import NetworkRows

COLUMNS, MOST_DIMS, SHOWN = 8, 32, 8
BEFORE, AFTER = "#5b5fc7", "#0f766e"


def write_sheet(path: Path, seen: NetworkRows) -> Path:
    """Write the sheet. Raises OutputError where it cannot be written."""
    cameras = list(seen.source.embodiment.cameras)
    chosen = np.unique(np.linspace(0, len(seen.place) - 1, SHOWN).round().astype(int)).tolist()
    charts = [
        (f"{name}: {dim}", values[:, number], normal[:, number])
        for name, dims, values, normal in seen.columns()
        for number, dim in enumerate(dims[:MOST_DIMS])
    ]
    chart_rows = -(-len(charts) // (COLUMNS // 2))
    heights = [1.5] * len(cameras) + [0.5] + [1.5] * chart_rows
    figure, axes = pages.panels(COLUMNS, len(heights), width=14, height=sum(heights), height_ratios=heights)
    grid = np.array(axes, dtype=object).reshape(len(heights), COLUMNS)
    for axis in axes:
        axis.set_axis_off()
    for row, camera in enumerate(cameras):
        for column, moment in enumerate(chosen):
            axis = grid[row, column]
            axis.imshow(seen.pictures[moment, row])
            place = seen.place[moment]
            axis.set_title(f"{camera}, ep {seen.source.episode[place]} row {seen.source.rows[place]}", fontsize=7, color=pages.INK)
    words = [f"{count} tokens: {text!r}"[:190] for text, count in dict(zip(seen.texts, seen.tokens, strict=True)).items()][:3]
    prompts = grid[len(cameras), 0].text(0, 0.5, "\n".join(words) or "no prompt", fontsize=8, family="monospace", color=pages.INK)
    prompts.set_in_layout(False)
    for number, (title, values, normal) in enumerate(charts):
        row, column = divmod(number, COLUMNS // 2)
        for axis, each, colour, label in (
            (grid[len(cameras) + 1 + row, 2 * column], values, BEFORE, title),
            (grid[len(cameras) + 1 + row, 2 * column + 1], normal, AFTER, "as the network sees it"),
        ):
            axis.set_axis_on()
            _histogram(axis, each, colour, label)
    files.make_folder(path.parent)
    with files.write_faults(path):
        files.write_bytes(path, pages.png(figure))
    return path


def _histogram(axis: object, values: NDArray[np.float32], colour: str, title: str) -> None:
    axis.hist(values, bins=40, color=colour)  # type: ignore[attr-defined]
    pages.chart(axis, "", "", "")
    axis.set_title(title[:34], fontsize=7, color=pages.INK, pad=2)  # type: ignore[attr-defined]
    axis.tick_params(labelsize=6, labelleft=False)  # type: ignore[attr-defined]
