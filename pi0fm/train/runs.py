"""Training runs below a folder: state, progress and loss of each, and a page that compares several.

Owns: finding runs, their states, which options differ between them, the page's picture. Does not know: how a run trains, terminals.

    running       its lease is held on this machine, or was renewed on another one a moment ago
    finished      its bundle exists, and its last metrics are of its last step
    stopped       neither: --resume true continues
    not started   no line of metrics
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pi0fm import files, machine, options, pages, progress
from pi0fm.train.start import lease
from pi0fm.train.watch.metrics import read_lines
from pi0fm_client.errors import ConfigError

DEEPEST_FOLDER = 4  # levels of folders below the one given
COLOURS = ("#0f766e", "#c8862b", "#5b5fc7", "#b4483d", "#5a7d2b", "#7a4f8f")
SHOWN_METRICS = ("loss", "validation_loss", "samples_per_second", "share_of_peak", "memory_gib", "seconds_left")
SPARK_BLOCKS = "▁▂▃▄▅▆▇█"
Line = Mapping[str, float]


@dataclass(frozen=True)
class RunSummary:
    """One run. lines: its metrics.jsonl, in order; config: its run.json."""

    name: str
    state: str
    config: Mapping[str, Any] = field(repr=False)
    lines: Sequence[Line] = field(repr=False)

    @property
    def step(self) -> int:
        """Last logged step, 0 before the first."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def steps(self) -> int:
        """Number of steps that the run was configured for."""
        return int(self.config.get("steps", 0))

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric, None without one."""
        return next((line[metric] for line in reversed(self.lines) if metric in line), None)

    def curve(self, metric: str = "loss") -> list[tuple[int, float]]:
        """List (step, value) of every line with a finite value."""
        return [(int(line["step"]), line[metric]) for line in self.lines if math.isfinite(line.get(metric, math.nan))]

    def json(self) -> dict[str, Any]:
        """Return the run's entry in the command's last line of JSON."""
        found = {name: value for name in SHOWN_METRICS if (value := self.last(name)) is not None}
        return {"state": self.state, "step": self.step, "steps": self.steps} | {
            name: each for name, each in found.items() if each is not None
        }


def find_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """Find every run at or below the folders, in order of name. Raises ConfigError for a missing folder, or one without runs."""
    found: dict[str, RunSummary] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"runs are looked for in folders, but {files.missing(folder)}; type pi0fm runs outputs")
        below: dict[str, RunSummary] = {}
        for place in _places(folder, 0):
            try:
                below[str(place)] = summarize(place, str(place))
            except ConfigError as error:  # an unreadable run does not hide the others
                if place == folder:
                    raise
                progress.say(str(error))
        if not below:
            raise ConfigError(f"a run is a folder with run.json, found none in {folder} or {DEEPEST_FOLDER} folders below it")
        found |= below
    return [found[name] for name in sorted(found)]


def summarize(folder: Path, name: str) -> RunSummary:
    """Summarize the run in `folder` from its files, without locks or changes. Raises ConfigError for a run.json that is not a run's."""
    try:
        config = json.loads((folder / "run.json").read_text())
        steps = int(config["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder / 'run.json'} must be what pi0fm train writes, and is not") from None
    lines = read_lines(folder)
    ended = lines and int(lines[-1]["step"]) >= steps and (folder / "bundle").is_dir()
    state = "running" if lease.is_held(folder) else "finished" if ended else "stopped" if lines else "not started"
    return RunSummary(name, state, config, lines)


def _places(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
    elif depth < DEEPEST_FOLDER:
        with os.scandir(folder) as entries:
            below = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."))
        for path in below:
            yield from _places(Path(path), depth + 1)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as at most `width` blocks, each the mean of a segment; logarithmic where all are above 0."""
    if not values:
        return ""
    stretches = np.array_split(np.array(values, dtype=np.float64), min(width, len(values)))
    means = np.array([stretch.mean() for stretch in stretches])
    if (means > 0).all():
        means = np.log(means)
    spread = float(np.ptp(means)) or 1.0
    return "".join(SPARK_BLOCKS[round((len(SPARK_BLOCKS) - 1) * float(mean - means.min()) / spread)] for mean in means)


def differences(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Return the options that differ between the runs by name, with one value per run."""
    flat = [options.flat(dict(run.config)) for run in runs]
    names = sorted({name for each in flat for name in each} - {"output_dir"})
    return {name: [str(each.get(name, "")) for each in flat] for name in names if len({str(each.get(name)) for each in flat}) > 1}


def write_page(path: Path, runs: Sequence[RunSummary]) -> None:
    """Write one self-contained HTML page of the runs: curves, last values, options that differ."""
    page = pages.render(
        "train/runs.html.j2",
        {"curves": _curves(runs)},
        runs=runs,
        differing=differences(runs),
        background={"command": machine.command_line(), "facts": {}},
    )
    files.make_folder(path.parent)
    files.write_text(path, page)


def _curves(runs: Sequence[RunSummary]) -> bytes:
    """Draw loss, validation loss where there is one, and samples a second against the step."""
    wanted = {"loss": "loss", "validation_loss": "validation loss", "samples_per_second": "samples/s"}
    shown = [metric for metric in wanted if any(run.curve(metric) for run in runs)] or ["loss"]
    figure, axes = pages.panels(len(shown), height=3.6)
    for axis, metric in zip(axes, shown, strict=True):
        for number, run in enumerate(runs):
            if curve := run.curve(metric):
                axis.plot(*zip(*curve, strict=True), color=COLOURS[number % len(COLOURS)], linewidth=1.6, label=run.name[-40:])
        pages.chart(axis, wanted[metric], "step", "")
        values = [value for run in runs for _, value in run.curve(metric)]
        if metric != "samples_per_second" and values and min(values) > 0 and max(values) > 12 * min(values):
            axis.set_yscale("log")
            pages.plain_log(axis.yaxis)
    pages.legend(figure, loc="outside lower left", ncols=2)
    return pages.png(figure)
