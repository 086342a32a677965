"""Files of an open-loop evaluation: report.html, summary.json, moments.parquet.

Owns: their content, and the pictures: error by row of the chunk, episodes dimension by dimension, the worst moments.
Does not know: how chunks were predicted.

    moments.parquet   row per moment: episode, index, seconds, task, error, nats_per_entry, predicted and recorded [H x A] row by row, rows
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm import files, machine, pages
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.eval.recorded_config import OpenLoopConfig
from pi0fm.eval.report.page import ReportContext

if TYPE_CHECKING:
    from pi0fm.eval.open_loop import OpenLoopErrors

POLICY, RECORDED, STILL, MEAN = "#0f766e", pages.INK, "#c8862b", "#5b5fc7"
MOMENTS = "moments.parquet"
COLUMNS = 4  # of small charts in a row
STRIP = 8  # pictures above an episode


def write(
    output: Path,
    config: OpenLoopConfig,
    found: "OpenLoopErrors",
    source: LeRobotSource,
    facts: Mapping[str, Mapping[str, str]],
    seconds: float,
) -> Path:
    """Write the three files; return the page's path."""
    with files.new_file(output / MOMENTS) as file:
        pq.write_table(table(found, source), file, write_page_checksum=True)
    traced = traced_episodes(found, config.traces)
    worst = np.argsort(-found.each, kind="stable")[: config.worst].tolist()
    pictures = {"rows": draw_rows(found)}
    pictures |= {f"trace_{episode}": draw_trace(found, source, episode) for episode in traced}
    pictures |= {f"strip_{episode}": _strip(found, episode) for episode in traced}
    for number in worst:
        pictures |= {f"worst_{number}": draw_moment(found, source, number), f"seen_{number}": _side_by_side(found.moments.pictures[number])}
    context = ReportContext(config.policy, machine.command_line(), seconds, facts=facts)
    page = pages.render(
        "eval/report/open_loop.html.j2",
        pictures,
        found=found,
        background=context,
        dimensions=[
            {"name": name, "error": ours, "still": still, "mean": mean, "scale": scale}
            for name, ours, still, mean, scale in zip(
                found.names,
                *(found.by_dimension(which).tolist() for which in ("error", "still", "mean")),
                found.scale.tolist(),
                strict=True,
            )
        ],
        traced=[{"episode": episode, "error": float(found.each[found.moments.episode == episode].mean())} for episode in traced],
        worst=[
            {
                "number": number,
                "episode": int(found.moments.episode[number]),
                "row": int(source.rows[place := int(found.moments.place[number])]),
                "seconds": float(source.time[place]),
                "task": source.tasks[source.task[place]],
                "error": float(found.each[number]),
                "nats": float(found.nats[number]),
            }
            for number in worst
        ],
    )
    files.write_json(output / "summary.json", {**found.json(), "seconds": round(seconds, 1), "command": context.command, "facts": facts})
    files.write_text(output / "report.html", page)
    return output / "report.html"


def table(found: "OpenLoopErrors", source: LeRobotSource) -> pa.Table:
    """Make a table of all moments with both chunks."""
    moments, count = found.moments, len(found.each)
    return pa.table(
        {
            "episode": moments.episode,
            "index": source.rows[moments.place],
            "seconds": source.time[moments.place],
            "task": [source.tasks[number] for number in source.task[moments.place]],
            "error": found.each,
            "nats_per_entry": pa.array(found.nats, mask=np.isnan(found.nats)),
            "rows": moments.real.sum(1),
            "predicted": list(found.predicted.reshape(count, -1)),
            "recorded": list(moments.recorded.reshape(count, -1)),
        }
    )


def traced_episodes(found: "OpenLoopErrors", count: int) -> list[int]:
    """Choose `count` episodes, evenly from the largest to the smallest mean error."""
    episodes = np.unique(found.moments.episode)
    errors = np.array([found.each[found.moments.episode == episode].mean() for episode in episodes])
    order = episodes[np.argsort(-errors, kind="stable")]
    chosen = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)) if count else []
    return [int(order[place]) for place in chosen]


def draw_rows(found: "OpenLoopErrors") -> bytes:
    """Draw the error against the row of the chunk, with both baselines, as PNG."""
    figure, (axis,) = pages.panels(width=7.8, height=2.9)
    rows = np.arange(1, len(found.error) + 1)
    for which, label, colour in (("error", "policy", POLICY), ("still", "standing still", STILL), ("mean", "mean chunk", MEAN)):
        axis.plot(rows, found.by_row(which), color=colour, linewidth=2.2 if which == "error" else 1.4, label=label)
    pages.chart(axis, "Error by row of the chunk", "row", "deviations")
    axis.set_ylim(bottom=0)
    pages.legend(axis)
    return pages.png(figure)


def draw_trace(found: "OpenLoopErrors", source: LeRobotSource, episode: int) -> bytes:
    """Draw every dimension of an episode: the recorded actions, and each predicted chunk up to the next moment, as PNG."""
    places = np.flatnonzero(source.episode == episode)
    chosen = np.flatnonzero(found.moments.episode == episode)
    following = [*found.moments.place[chosen][1:].tolist(), int(places[-1]) + 1]
    figure, axes = _small_charts(found)
    for dim, axis in enumerate(axes):
        axis.plot(source.time[places], source.action[places, dim], color=RECORDED, linewidth=1.6, label="recorded")
        for number, stop in zip(chosen.tolist(), following, strict=True):
            first = int(found.moments.place[number])
            shown = np.arange(first, min(stop, first + found.predicted.shape[1]))
            label = "predicted" if number == chosen[0] else None
            axis.plot(
                source.time[shown],
                found.predicted[number, : len(shown), dim],
                color=POLICY,
                linewidth=1.4,
                label=label,
                marker=".",
                markersize=2,
            )
    pages.legend(axes[0])
    return pages.png(figure)


def draw_moment(found: "OpenLoopErrors", source: LeRobotSource, number: int) -> bytes:
    """Draw every dimension of one chunk: recorded, predicted, standing still, as PNG."""
    real = found.moments.real[number]
    rows = np.flatnonzero(real) + 1
    figure, axes = _small_charts(found)
    for dim, axis in enumerate(axes):
        axis.plot(
            rows, found.moments.recorded[number, real, dim], color=RECORDED, linewidth=1.6, label="recorded", marker=".", markersize=3
        )
        axis.plot(rows, found.predicted[number, real, dim], color=POLICY, linewidth=1.6, label="predicted", marker=".", markersize=3)
        axis.axhline(found.moments.still[number, dim], color=STILL, linewidth=1, label="standing still")
    pages.legend(axes[0])
    return pages.png(figure)


def _small_charts(found: "OpenLoopErrors") -> tuple[Any, Sequence[Any]]:
    """Lay out a chart for each action dimension, COLUMNS per row."""
    count = len(found.names)
    rows = -(-count // COLUMNS)
    figure, axes = pages.panels(min(COLUMNS, count), rows, height=2.1 * rows)
    recorded = found.moments.recorded[found.moments.real]
    for axis, name, low, high in zip(axes, found.names, recorded.min(0), recorded.max(0), strict=False):
        pages.chart(axis, name, "", "")
        axis.update_datalim([(0, low), (0, high)], updatex=False)  # one range for a dimension, so that noise looks small
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _strip(found: "OpenLoopErrors", episode: int) -> bytes:
    """Draw the first camera at moments evenly spread over an episode, in a row, as PNG."""
    chosen = np.flatnonzero(found.moments.episode == episode)
    spread = chosen[np.unique(np.linspace(0, len(chosen) - 1, STRIP).round().astype(int))]
    return _side_by_side(found.moments.pictures[spread, 0])


def _side_by_side(pictures: NDArray[np.uint8]) -> bytes:
    """Join pictures [n, size, size, 3] in a row at most 160 pixels high, as PNG."""
    from PIL import Image

    image = Image.fromarray(np.concatenate(list(pictures), axis=1))
    if image.height > 160:
        image = image.resize((image.width * 160 // image.height, 160))
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    return held.getvalue()
