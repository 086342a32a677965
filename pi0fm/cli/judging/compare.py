"""`pi0fm compare`: evaluations on the same start positions, side by side.

Owns: the printed tables. Does not know: how the figures are found.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import progress
from pi0fm.eval.compare import CompareConfig, compare
from pi0fm.eval.report.compare import write
from pi0fm.eval.statistics import Interval

HELP = "compare evaluations on the same tasks and seeds: intervals, exact paired tests, whether a difference is settled"
Options = CompareConfig
ALIASES: dict[str, str] = {}
POSITIONAL, OTHERS = "baseline", "others"


def run(options: CompareConfig) -> dict[str, Any]:
    """Compare, print two tables and the statements, write the page; return the figures."""
    found = compare(options)
    page = write(options.output_dir, found)
    success, paired = (Table(box=None, padding=(0, 2), header_style="") for _ in range(2))
    success.add_column("task")
    for each in found.evaluations:
        success.add_column(each.name, justify="right")
    for task in found.tasks:
        success.add_row(task, *(_text(each.interval(task)) for each in found.evaluations))
    success.add_row("mean over tasks", *(_text(each.mean(found.tasks)) for each in found.evaluations))
    paired.add_column(f"against {found.evaluations[0].name}")
    for heading in ("pairs", "only it", "only the baseline", "difference", "p", "p, Holm", "p, any time"):
        paired.add_column(heading, justify="right")
    for one in found.paired:
        counts = (str(number) for number in (one.pairs, one.only_this, one.only_baseline))
        paired.add_row(one.name, *counts, _text(one.difference), *(f"{p:.3g}" for p in (one.p, one.p_holm, one.p_any_time)))
    console = Console(stderr=True, highlight=False, markup=False, width=max(120, Console(stderr=True).width))
    console.print(success)
    console.print(paired)
    for line in (*found.warnings, *(one.statement for one in found.paired), f"report: {page}"):
        progress.say(line)
    return found.json() | {"report": str(page)}


def _text(interval: Interval | None) -> str:
    """Format `55 % (44 to 65)`."""
    return "unknown" if interval is None else f"{100 * interval.rate:.0f} % ({100 * interval.low:.0f} to {100 * interval.high:.0f})"
