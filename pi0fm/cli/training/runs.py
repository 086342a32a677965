"""`pi0fm runs DIR`: list the runs below a folder, and compare several on one page.

Owns: the options and the table. Does not know: what a run is (train/runs.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import progress
from pi0fm.options import option
from pi0fm.progress import clock
from pi0fm.train.runs import find_runs, sparkline, write_page
from pi0fm_client.errors import ConfigError

HELP = "list runs with state, step and loss curve; --page compares them on one HTML page"
POSITIONAL, OTHERS = "folder", "others"
ALIASES: dict[str, str] = {}
WIDTH = 32  # characters of a loss curve


@dataclass(frozen=True)
class RunsOptions:
    """Runs to show. Raises ConfigError for a page that is not an HTML file."""

    folder: Path = option(Path("outputs"), "a run, or a folder with runs below it")
    others: tuple[Path, ...] = option((), "more runs, or folders with runs")
    page: Path | None = option(None, "HTML file that shows the curves together, and the options that differ")

    def __post_init__(self) -> None:
        if self.page is not None and self.page.suffix != ".html":
            raise ConfigError(f"page must be an HTML file, found {self.page}; type --page runs.html")


Options = RunsOptions


def run(options: RunsOptions) -> dict[str, Any]:
    """Print a table, write the page; the last line has every run by name."""
    found = find_runs((options.folder, *options.others))
    table = Table(box=None, padding=(0, 2), header_style="")
    for heading in ("run", "state", "step", "loss", "samples/s", "left", "loss curve"):
        table.add_column(heading, justify="right" if heading in ("step", "loss", "samples/s", "left") else "left", no_wrap=heading != "run")
    for each in found:
        loss, speed, left = (each.last(name) for name in ("loss", "samples_per_second", "seconds_left"))
        numbers = ("" if value is None else text.format(value) for value, text in ((loss, "{:.4f}"), (speed, "{:.1f}")))
        remaining = clock(left) if left is not None and each.state == "running" else ""
        curve = sparkline([value for _, value in each.curve()], WIDTH)
        table.add_row(each.name, each.state, f"{each.step}/{each.steps}", *numbers, remaining, curve)
    Console(stderr=True, highlight=False, markup=False, width=max(140, Console(stderr=True).width)).print(table)
    if options.page is not None:
        write_page(options.page, found)
        progress.say(f"written: {options.page}")
    return {each.name: each.json() for each in found}
