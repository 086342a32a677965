"""`pi0fm bench NAME`: run a measurement of pi0fm/bench, show its figures and keep them.

Owns: the list, the result file, tables, the lines about the machine, the rounding of figures. Does not know: what is measured.
A measurement is a module of pi0fm/bench with `measure(options) -> BenchReport`, imported when it runs; its options are in bench/config.
Where they have an `output_dir`, the module's `RESULT` is the file in it: NAME.json when not given, None for no file.
"""

import functools
import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, machine, progress
from pi0fm.bench.harness.measure import BenchReport
from pi0fm_client.errors import OutputError

HELP = "measure pi0fm and its peers on this machine"
SUBCOMMANDS = {
    "loading": "samples per processor second: frame cache and stream against LeRobot's loader, copying and decoding",
    "learning": "one task, the same data and processor time: pi0fm against LeRobot's PI0",
    "inference": "ten Euler steps for one observation: LeRobot's PI0 against ours",
    "training": "one optimiser step on the same batch: LeRobot's PI0 against ours",
    "checkpoint": "steps with an asynchronous checkpoint against steps without",
    "card": "one GPU in eight minutes: whether it computes right, inference and training at full size",
    "planning": "steps of one, two and four processes, against what pi0fm plan predicts from their rates",
    "serving": "server time with one robot, eight robots against a server that answers one at a time, a 50 Hz loop",
    "soak": "a policy server for ten minutes under request storms, damaged frames, killed clients and a paused model",
    "scaling": "Ray workers against torchrun's; seconds of a start, a kill and a lost node; bytes of a sharded state",
    "simulation": "eight simulated environments in one process against one at a time, processor seconds",
    "density": "a chunk's log-likelihood against its sampling, with the same evaluations",
}
DIGITS = 6


def subcommand(name: str) -> SimpleNamespace:
    """Return the measurement of that name as a command."""
    return question("card.run" if name == "card" else name, SUBCOMMANDS[name])


@functools.cache
def question(name: str, text: str) -> SimpleNamespace:
    """Wrap a measurement of bench/config as a command. text: its help line."""
    from pi0fm.bench.config import QUESTIONS  # here: other commands use only this module's tables

    asked = QUESTIONS[name]
    run = functools.partial(ask, f"pi0fm.bench.{name}")
    return SimpleNamespace(HELP=text, run=run, Options=asked.options, ALIASES=asked.aliases, POSITIONAL=asked.positional)


def ask(path: str, options: Any) -> dict[str, Any]:
    """Import the module, refuse to overwrite a result, measure, and report."""
    module: ModuleType = importlib.import_module(path)
    name = getattr(module, "RESULT", f"{module.__name__.rpartition('.')[2]}.json")
    written = free_place(getattr(options, "output_dir", None), name)
    return answer(module.measure(options), written, module.__doc__)


def answer(report: BenchReport, written: Path | None, notes: str | None) -> dict[str, Any]:
    """Write the result file, show the figures, and return them for the last line. notes: the meaning of the figures, for the file."""
    figures: dict[str, Any] = rounded(report.figures)
    figures |= {"machine": machine.describe_machine(), "versions": machine.describe_versions()}
    if written is not None:
        background = rounded(report.background or {}) | {"command": machine.command_line(), "notes": notes}
        files.write_json(written, figures | background)
    show(figures if report.shown is None else report.shown)
    for facts in ("machine", "versions"):
        progress.say(", ".join(f"{name} {value}" for name, value in figures[facts].items()))
    if written is not None:
        progress.say(f"written: {written}")
    return figures


def free_place(output_dir: Path | None, name: str | None) -> Path | None:
    """Return the path of the result. Raises OutputError for an output_dir that is a file, or that holds a result."""
    if output_dir is None or name is None:
        return None
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {output_dir}; type --output_dir ANOTHER")
    if (output_dir / name).exists():
        raise OutputError(f"a result is never overwritten, and {output_dir / name} exists; type --output_dir ANOTHER")
    return output_dir / name


def show(figures: Mapping[str, Any]) -> None:
    """Print each mapping of rows as a table, and all other figures as one table, to standard error."""
    console = Console(stderr=True, highlight=False, width=max(200, Console(stderr=True).width))
    leaves: dict[str, Any] = {}
    for name, value in _parts("", figures):
        if isinstance(value, Mapping):
            console.print(_table(name, value))
        else:
            leaves[name] = {"": value}
    if leaves:
        console.print(_table("", leaves))


def _parts(path: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf or mapping of rows) for everything in `tree` except machine and versions."""
    for key, value in tree.items():
        name = f"{path} {key}".strip().replace("_", " ")
        if not isinstance(value, Mapping) or (value and all(_is_row(row) for row in value.values())):
            yield name, value
        elif key not in {"machine", "versions"}:
            yield from _parts(name, value)


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(isinstance(leaf, Mapping) for leaf in value.values())


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Make a table, transposed where it would have more columns than rows."""
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    cells = {name: {column: row.get(column, "") for column in columns} for name, row in rows.items()}
    if len(columns) > len(rows):
        cells = {column: {name: row[column] for name, row in cells.items()} for column in columns}
    table = Table(box=None, padding=(0, 2), header_style="", title=title, title_justify="left")
    for heading in ("", *next(iter(cells.values()), {})):
        words = not table.columns or any(isinstance(row[heading], str) for row in cells.values())
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for name, row in cells.items():
        table.add_row(name, *map(_text, row.values()))
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "unknown" if value is None else str(value)


def rounded(tree: Any) -> Any:
    """Return `tree` with every float rounded to DIGITS significant digits."""
    if isinstance(tree, Mapping):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.{DIGITS}g}") if isinstance(tree, float) and math.isfinite(tree) else tree
