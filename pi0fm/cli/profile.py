"""`pi0fm profile`: where the steps of a run go, beside the limits of this machine, and what to change.

Owns: the table, the last line of JSON. Does not know: how steps are taken or timed.
"""

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import progress
from pi0fm.bench.profile import RESULT, TRACE, PartOfStep, Profile, ProfileSteps, measure, write
from pi0fm.cli.bench import rounded
from pi0fm.cluster.training import TrainingRun
from pi0fm.options import option

HELP = "where the steps of a run go: data, forward, backward, optimiser, average; their share of the limit, and what to change"
NAMED_BY_ROW = "output_dir"
ALIASES = {"batch_size": "global_batch_size", "policy.type": "model.preset", "policy.path": "pretrained"}


@dataclass(frozen=True)
class ProfiledRun(TrainingRun):
    """A run as `pi0fm train` takes it, of which one worker's share of some steps is looked at; its files go to output_dir/profile."""

    profile: ProfileSteps = option(ProfileSteps, "")


Options = ProfiledRun


def run(options: ProfiledRun) -> dict[str, Any]:
    """Measure, print the table and the advice, return the figures."""
    share, folder = options.global_batch_size // max(1, options.num_workers), options.output_dir / "profile"
    if options.num_workers > 1:
        progress.say(f"one process takes the {share} samples of one of {options.num_workers} workers, without communication")
    found = measure(replace(options, global_batch_size=share, num_workers=1), options.profile, folder)
    figures: dict[str, Any] = rounded(write(found, folder / RESULT))
    _print(found)
    for line in found.advice or ("nothing stands out",):
        progress.say(line)
    progress.say(f"written: {folder / RESULT}, {folder / TRACE}")
    return figures


def _print(found: Profile) -> None:
    title = f"{found.device}: {1e3 * found.seconds:.1f} ms a step of {found.samples} samples, {found.samples / found.seconds:.1f} samples/s"
    if found.peak:
        title += f"; {found.peak / 2**30:.1f} GiB at most, estimated {found.estimated / 2**30:.1f}"
    table = Table(box=None, padding=(0, 2), header_style="", title=title, title_justify="left")
    table.add_column("part")
    for heading in ("ms", "of the step", "limit ms", "of the limit", "TFLOP", "GB"):
        table.add_column(heading, justify="right")
    for name, part in found.parts.items():
        reached = f"{part.limit_seconds / part.seconds:.0%}" if part.limit_seconds and part.seconds else ""
        share = f"{part.seconds / found.seconds:.0%}"
        table.add_row(name, f"{1e3 * part.seconds:.2f}", share, f"{1e3 * part.limit_seconds:.2f}", reached, *_counts(part))
    Console(stderr=True, highlight=False, width=max(140, Console(stderr=True).width)).print(table)


def _counts(part: PartOfStep) -> tuple[str, str]:
    return f"{part.flops / 1e12:.4g}", f"{part.moved / 1e9:.3g}"
