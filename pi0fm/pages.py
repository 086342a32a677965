"""A self-contained HTML page with matplotlib pictures, for a report that is sent by mail.

Owns: the template environment and its base page, the style of charts, a figure as PNG bytes. Does not know: the reports.
No pyplot: nothing global is touched, no window opens. matplotlib is imported by the first figure, jinja2 by the first page.
"""

import base64
import io
import time
from collections.abc import Mapping
from typing import Any

from pi0fm import machine

INK, SOFT, LINE, PAPER = "#1d1f24", "#666a73", "#e5e3dd", "#ffffff"
DOTS_PER_INCH = 130


def render(template: str, pictures: Mapping[str, bytes], **values: Any) -> str:
    """Render `template`, a path inside pi0fm. Values are escaped; PNG `pictures` become data URIs, so that the page loads nothing.

    A template extends page.html.j2, which shows `background.facts` (tables by heading), `background.command`, date and revision.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pi0fm", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    uris = {name: "data:image/png;base64," + base64.b64encode(picture).decode() for name, picture in pictures.items()}
    date = time.strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(pictures=uris, date=date, version=machine.version(), **values)


def panels(columns: int = 1, rows: int = 1, *, width: float = 10.4, height: float = 3.4, **grid: Any) -> tuple[Any, list[Any]]:
    """Return a figure of width x height inches and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor=PAPER, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **grid).flat)


def chart(axis: Any, title: str, x_label: str, y_label: str) -> None:
    """Style the axes of a curve: two spines, a faint grid."""
    axis.set_title(title, fontsize=11, color=INK, loc="left", pad=10)
    axis.set_xlabel(x_label, fontsize=9.5, color=SOFT)
    axis.set_ylabel(y_label, fontsize=9.5, color=SOFT)
    axis.tick_params(which="both", colors=SOFT, labelsize=8.5, length=3)
    axis.grid(True, color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(LINE)


def legend(axis: Any, **where: Any) -> None:
    """Add a legend without a frame to axes or to a whole figure, each label once."""
    every = axis.axes if isinstance(axis.axes, list) else [axis]
    shown = {label: handle for one in every for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    axis.legend(shown.values(), shown.keys(), frameon=False, fontsize=8.5, labelcolor=INK, **where).set_zorder(10)


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis (of `axes.xaxis`, say) 0.1, 0.2, 0.5, 1 instead of by powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def png(figure: Any) -> bytes:
    """Return the figure as a PNG file of 256 colours, a third of the size without a visible difference."""
    from PIL import Image

    held, small = io.BytesIO(), io.BytesIO()
    figure.savefig(held, format="png", facecolor=PAPER)
    Image.open(held).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()
