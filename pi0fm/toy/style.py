"""How the demo's pictures look.

Owns: colours, bare axes, a figure as PNG bytes. Does not know: what is drawn. No pyplot: nothing global is touched, no window opens.
"""

import io
from collections.abc import Sequence
from typing import Any

from pi0fm.toy.methods import CNF, DIFFUSION, FLOW_MATCHING

INK, SOFT, LINE, PAPER = "#1d1f24", "#666a73", "#e5e3dd", "#ffffff"
COLOURS = {FLOW_MATCHING: "#0f766e", CNF: "#c8862b", DIFFUSION: "#5b5fc7"}
STREAM = "#4a4f5a"
NOISE_COLOUR, DATA_COLOUR = "#c8862b", "#0f766e"
DENSITY_COLOURS = ("#ffffff", "#dff2ef", "#9fd4cd", "#3f9f94", "#0f766e", "#083f43")
DOTS_PER_INCH = 130


def panels(columns: int, rows: int = 1, *, width: float = 10.4, height: float = 3.4, **grid: Any) -> tuple[Any, list[Any]]:
    """A figure of width x height inches and its axes, row by row."""
    from matplotlib.figure import Figure  # a second of import that only a drawing pays

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor=PAPER, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, list(axes.flat)


def plane(axis: Any, title: str, extent: float) -> None:
    """A square window [-extent, extent]^2 without ticks."""
    axis.set_title(title, fontsize=10, color=INK, pad=6)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
    for spine in axis.spines.values():
        spine.set_color(LINE)


def chart(axis: Any, title: str, x_label: str, y_label: str) -> None:
    """Axes of a curve: two spines, a faint grid."""
    axis.set_title(title, fontsize=11, color=INK, loc="left", pad=10)
    axis.set_xlabel(x_label, fontsize=9.5, color=SOFT)
    axis.set_ylabel(y_label, fontsize=9.5, color=SOFT)
    axis.tick_params(which="both", colors=SOFT, labelsize=8.5, length=3)
    axis.grid(True, color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(LINE)


def density_map() -> Any:
    """White where there is nothing, dark where there is most."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("density", list(DENSITY_COLOURS))


def two_colours(first: str, last: str) -> Any:
    """A map from one colour to another."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("two", [first, last])


def legend(axis: Any, handles: Sequence[Any] | None = None, **where: Any) -> None:
    """A legend without a frame."""
    found = axis.legend(**({"handles": handles} if handles else {}), frameon=False, fontsize=8.5, labelcolor=INK, **where)
    found.set_zorder(10)


def png(figure: Any) -> bytes:
    """The figure as a PNG file of 256 colours: a third of the size, and no eye sees the difference."""
    from PIL import Image

    held, small = io.BytesIO(), io.BytesIO()
    figure.savefig(held, format="png", facecolor=PAPER)
    Image.open(held).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()
