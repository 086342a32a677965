"""`pi0fm flow demo`: flow matching and its two ancestors on data in the plane.

Owns: the order compare -> draw -> write, the figures of demo.json, the table. Does not know: how a method trains, how a picture is drawn.
"""

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import machine, options, progress
from pi0fm.toy import comparison_figures, flow_figures, page
from pi0fm.toy.comparison import CURVE_POINTS, HELD_OUT, NEAR, SAMPLES, Comparison, compare
from pi0fm.toy.config import DemoConfig
from pi0fm.toy.training import one_thread

HELP = "flow matching, CNF and diffusion on data in the plane: figures and a comparison"
Options = DemoConfig
ALIASES: dict[str, str] = {}
VERSIONS = ("python", "pi0fm", "torch", "numpy")
LAST_LINE = ("dataset", "nll", "entropy", "train_seconds", "evaluations", "probability_flow_evaluations", "common_nll", "speedup")


def run(config: DemoConfig) -> dict[str, Any]:
    """Train, judge, draw, write; the result is the part of demo.json that is one figure a method."""
    page.refuse_other_folder(config.output_dir)
    with one_thread():
        comparison = compare(config)
        pictures = _pictures(comparison, config.seed)
    found = figures(comparison, config)
    path = page.write(config.output_dir, found, pictures, _background(config))
    _show(comparison, found)
    progress.say(f"report: {path}")
    return {name: found[name] for name in LAST_LINE} | {"report": str(path)}


def figures(comparison: Comparison, config: DemoConfig) -> dict[str, Any]:
    """Everything that was measured, for demo.json and the page."""
    outcomes = comparison.outcomes
    return {
        "dataset": comparison.dataset.name,
        "solver": config.solver,
        "methods": [{"name": outcome.method.name, "title": outcome.method.title} for outcome in outcomes],
        "shown": outcomes[0].method.title,
        "nll": comparison.nll,
        "entropy": comparison.entropy,
        "common_nll": comparison.common_nll,
        "train_seconds": comparison.train_seconds,
        "near_nll": comparison.best_nll + NEAR,
        "seconds_to_near": comparison.seconds_to_near,
        "trained_seconds": {outcome.method.name: outcome.trained.seconds for outcome in outcomes},
        "trained_steps": {outcome.method.name: outcome.trained.steps for outcome in outcomes},
        "common_distance": comparison.common_distance,
        "floor": comparison.floor,
        "evaluations": comparison.evaluations,
        "probability_flow_evaluations": comparison.probability_flow_evaluations,
        "speedup": comparison.speedup,
        "held_out": HELD_OUT,
        "held_out_along_training": CURVE_POINTS,
        "samples": SAMPLES,
        "curves": {outcome.method.name: [_finite(asdict(mark)) for mark in outcome.trained.curve] for outcome in outcomes},
        "qualities": {outcome.method.name: [_finite(asdict(point)) for point in outcome.sampler] for outcome in outcomes},
    }


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: null stands for it."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _pictures(comparison: Comparison, seed: int) -> dict[str, bytes]:
    subject = comparison_figures.subject(comparison, comparison.outcomes[0], seed)
    each = {
        "over_time": lambda: flow_figures.over_time(subject),
        "trajectories": lambda: flow_figures.trajectories(subject),
        "field": lambda: flow_figures.field(subject),
        "learned": lambda: comparison_figures.learned(comparison, seed),
        "comparison": lambda: comparison_figures.curves(comparison),
    }
    drawn = {}
    with progress.step("drawing", len(each)) as bar:
        for name, draw in each.items():
            drawn[name] = draw()
            bar.advance(note=name)
    return drawn


def _background(config: DemoConfig) -> page.Background:
    versions = machine.describe_versions()
    facts = {
        "machine": machine.describe_machine(),
        "versions": {name: versions[name] for name in VERSIONS},
        "options": {name: str(value) for name, value in options.encode(config).items() if value is not None},
    }
    return page.Background(machine.command_line(), facts)


def _show(comparison: Comparison, found: dict[str, Any]) -> None:
    """The table of methods on standard error."""
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("method")
    for heading in ("NLL, nats", "steps", f"to {found['common_nll']:.3f} nats", f"to {found['near_nll']:.3f} nats", "evaluations a sample"):
        table.add_column(heading, justify="right")
    for outcome in comparison.outcomes:
        name = outcome.method.name
        reached = [page.seconds(found[key][name]) for key in ("train_seconds", "seconds_to_near")]
        table.add_row(outcome.method.title, f"{outcome.nll:.3f}", f"{outcome.trained.steps:,}", *reached, str(found["evaluations"][name]))
    console = Console(stderr=True, highlight=False, width=max(100, Console(stderr=True).width))
    console.print()
    console.print(table)
    line = f"entropy of the data {comparison.entropy:.3f} nats"
    if comparison.speedup is not None:
        line += f"; flow matching trains {page.factor(comparison.speedup)} times faster than the CNF to {comparison.common_nll:.3f} nats"
    progress.say(line)
