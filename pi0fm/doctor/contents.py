"""Contents of a data set: its size, tasks, cameras and numbers, and a sheet of its pictures.

Owns: `DatasetContents`, the criteria of constant and saturated dimensions and of short episodes, the contact sheet. Does not know: faults,
policies, tables on a terminal.
"""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pi0fm import files, pages
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.chosen import pictures_at

SHORT = 0.5  # of the median length
SATURATED, FEW_VALUES = 0.05, 8  # share of the rows at one end of the range; a dimension of at most 8 values is a switch
EPISODES, MOMENTS, SIDE, MARGIN, CAPTION = 6, 6, 160, 6, 22  # of the contact sheet; pixels


@dataclass(frozen=True)
class Dimension:
    """Dimension of the state or the action, in the data set's units. at_end: the larger share of rows at its minimum or maximum."""

    column: str
    name: str
    low: float
    high: float
    at_end: float
    kind: str

    def __str__(self) -> str:
        return f"{self.name} {self.low:.4g} to {self.high:.4g}" + (f" ({self.kind})" if self.kind else "")


@dataclass(frozen=True)
class DatasetContents:
    """Contents of a data set. cameras: column and size by name. short: episodes of less than half of their task's median length."""

    fps: float
    seconds: float
    lengths: tuple[int, int, int]
    tasks: Mapping[str, int]
    cameras: Mapping[str, str]
    dimensions: tuple[Dimension, ...]
    short: tuple[int, ...]

    def facts(self) -> dict[str, str]:
        """Return the rows of a table."""
        least, median, most = self.lengths
        listed = "; ".join(f"{text!r} ({count})" for text, count in list(self.tasks.items())[:5])
        found = {
            "rate": f"{self.fps:g} Hz, {self.seconds / 60:.1f} minutes",
            "lengths": f"{least} to {most} rows, median {median}",
            "tasks": listed + (f" and {len(self.tasks) - 5} more" if len(self.tasks) > 5 else ""),
            "cameras": "; ".join(f"{name}: {text}" for name, text in self.cameras.items()),
        }
        for column in ("state", "action"):
            found[column] = ", ".join(str(each) for each in self.dimensions if each.column == column)
        for kind in ("constant", "saturated"):
            found[kind] = ", ".join(f"{each.column} {each.name}" for each in self.dimensions if each.kind == kind) or "none"
        found["short episodes"] = ", ".join(map(str, self.short[:20])) + (" ..." if len(self.short) > 20 else "") or "none"
        return found

    def json(self) -> dict[str, Any]:
        """Return the figures of the command's last line."""
        return asdict(self)


def describe(source: LeRobotSource) -> DatasetContents:
    """Describe the rows of `source`, which has one or more."""
    first = source.starts
    lengths = source.end[first] - first
    median = int(np.median(lengths))
    tasks: dict[str, int] = {}
    short: list[int] = []
    for number in np.unique(source.task[first]).tolist():
        same = source.task[first] == number
        tasks[source.tasks[number]] = tasks.get(source.tasks[number], 0) + int(same.sum())
        short += source.episode[first[same & (lengths < SHORT * np.median(lengths[same]))]].tolist()
    embodiment = source.embodiment
    sizes = {name: " or ".join(f"{width}x{height}" for height, width in source.sizes.get(name, ())) for name in embodiment.cameras}
    columns = (("state", embodiment.state, source.state), ("action", embodiment.action, source.action))
    return DatasetContents(
        fps=float(source.fps),
        seconds=round(len(source.rows) / source.fps, 1),
        lengths=(int(lengths.min()), median, int(lengths.max())),
        tasks=dict(sorted(tasks.items(), key=lambda each: -each[1])),
        cameras={name: f"{column} {sizes[name]}".strip() for name, column in embodiment.cameras.items()},
        dimensions=tuple(
            _dimension(word, name, values[:, number])
            for word, column, values in columns
            for number, name in enumerate(embodiment.labels(column, values.shape[1]))
        ),
        short=tuple(sorted(short)),
    )


def _dimension(column: str, name: str, values: NDArray[np.float32]) -> Dimension:
    low, high = float(values.min()), float(values.max())
    at_end = max(float(np.mean(values == low)), float(np.mean(values == high)))
    kind = ""
    if low == high:
        kind = "constant"
    elif at_end > SATURATED:
        kind = "switch" if len(np.unique(values)) <= FEW_VALUES else "saturated"
    return Dimension(column, name, low, high, round(at_end, 4), kind)


def write_contact_sheet(path: Path, source: LeRobotSource, dataset: DatasetConfig) -> Path:
    """Write a PNG with a row for each camera of some episodes, a column for each moment. Raises OutputError where it cannot."""
    cameras = list(source.embodiment.cameras)
    first = source.starts
    shown = first[np.unique(np.linspace(0, len(first) - 1, max(2, EPISODES // max(1, len(cameras)))).round().astype(int))]
    moments = [np.linspace(begin, source.end[begin] - 1, MOMENTS).round().astype(np.int64) for begin in shown.tolist()]
    place, back = np.unique(np.concatenate(moments), return_inverse=True)
    pictures = pictures_at(source, dataset, place, SIDE)[back]
    sheet = Image.new("RGB", (MOMENTS * (SIDE + MARGIN) + MARGIN, len(shown) * len(cameras) * (SIDE + CAPTION) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row in range(len(shown) * len(cameras)):
        episode, camera = divmod(row, len(cameras))
        for column, here in enumerate(map(int, moments[episode])):
            corner = (MARGIN + column * (SIDE + MARGIN), MARGIN + row * (SIDE + CAPTION))
            seconds = (here - int(shown[episode])) / source.fps
            caption = f"{seconds:.1f} s" if column else f"episode {source.episode[here]}, {cameras[camera]}"
            draw.text(corner, caption, fill=pages.INK, font=font)
            sheet.paste(Image.fromarray(pictures[episode * MOMENTS + column, camera]), (corner[0], corner[1] + CAPTION - 4))
    held = io.BytesIO()
    sheet.save(held, "PNG", optimize=True)
    files.make_folder(path.parent)
    with files.write_faults(path):
        files.write_bytes(path, held.getvalue())
    return path
