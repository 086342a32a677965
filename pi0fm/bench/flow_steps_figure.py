"""The picture of the table: error against evaluations, a line for each solver.

Owns: the figure. Does not know: how the errors were found.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi0fm import files
from pi0fm.bench.flow_steps import Reference, Row, observed_order

# Okabe and Ito's colours, which readers who see few of them tell apart; the marker says the same again.
STYLES = {
    "euler": ("#0072B2", "o"),
    "midpoint": ("#E69F00", "s"),
    "heun": ("#009E73", "^"),
    "rk4": ("#CC79A7", "D"),
    "dopri5": ("#444444", "v"),
}
INK, PALE = "#222222", "#8a8a8a"
MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(rows: Sequence[Row], reference: Reference, tolerance: float, chosen: Row | None, subject: str, path: Path) -> None:
    """Write the PNG. subject: what was sampled, for the line below the title."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for solver in dict.fromkeys(row.setting.solver for row in rows):
        _line(axes, solver, rows, reference.rms)
    _bounds(axes, rows, reference, tolerance)
    if chosen is not None:
        _mark(axes, chosen, tolerance)
    _dress(axes, rows, subject)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write_bytes(path, content.getvalue())


def _line(axes: Any, solver: str, rows: Sequence[Row], floor: float) -> None:
    color, marker = STYLES[solver]
    own = sorted((row for row in rows if row.setting.solver == solver and row.rms > 0), key=lambda row: row.evaluations)
    order = observed_order(rows, solver, floor)
    label = solver if order is None else f"{solver}, order {order:.1f}"
    axes.plot(
        [row.evaluations for row in own],
        [row.rms for row in own],
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.8,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=label,
        zorder=3,
    )


def _bounds(axes: Any, rows: Sequence[Row], reference: Reference, tolerance: float) -> None:
    """The tolerance that was asked for, and the depth below which the reference itself cannot be trusted."""
    lowest = min(row.rms for row in rows if row.rms > 0)
    bottom = min(lowest, reference.rms or lowest, tolerance) / 2.5
    axes.set_ylim(bottom, max(*(row.rms for row in rows), tolerance) * 2)
    right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "fontsize": 8.5}
    axes.axhline(tolerance, color=INK, linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
    axes.annotate(f"tolerance {tolerance:g}", (0.995, tolerance), xytext=(0, 4), va="bottom", color=INK, **right)
    if reference.rms > bottom:
        axes.axhspan(bottom, reference.rms, color="#eeeeee", zorder=0)
        axes.annotate("error of the reference", (0.995, bottom), xytext=(0, 4), va="bottom", color=PALE, **right)


def _mark(axes: Any, chosen: Row, tolerance: float) -> None:
    steps = chosen.setting.num_flow_steps
    what = f"{chosen.setting.solver}, {steps} step{'s' if steps > 1 else ''}, {chosen.evaluations} evaluations"
    axes.plot(
        [chosen.evaluations],
        [chosen.rms],
        linestyle="none",
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=1.3,
        label=f"cheapest within {tolerance:g}: {what}",
        zorder=4,
    )


def _dress(axes: Any, rows: Sequence[Row], subject: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    most = max(row.evaluations for row in rows)
    least = min(row.evaluations for row in rows)
    axes.set_xlim(least / 1.15, most * 1.2)
    marks = [mark for mark in MARKS if least <= mark <= most * 1.2]
    axes.set_xticks(marks, [str(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_xlabel("evaluations of the network", color=INK)
    axes.set_ylabel("RMS error of the chunk, normalised units", color=INK)
    axes.set_title("Error of a sampled action chunk", loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=24)
    axes.text(0, 1.025, subject, transform=axes.transAxes, fontsize=9, color=PALE)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b0b0b0")
    axes.tick_params(colors=INK, length=3)
    axes.legend(frameon=True, facecolor="white", edgecolor="none", framealpha=0.9, fontsize=9, loc="upper right", labelcolor=INK)
