"""`pi0fm bench density`: what a chunk's log-likelihood costs beside its sampling.

Owns: the table, and the last line of JSON. Does not know: how either is computed.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import machine, progress
from pi0fm.bench.density import DensityConfig, measure
from pi0fm.bench.paired import Ratio

HELP = "a chunk's log-likelihood beside its sampling, with the same evaluations"
Options = DensityConfig
ALIASES = {"policy.path": "bundle"}


def run(config: DensityConfig) -> dict[str, Any]:
    """Measure, print the table, return the figures; `ratio` is log-likelihood by sampling against one cached prefix."""
    progress.say(f"{config.rounds} rounds of each comparison, one thread")
    costs = measure(config)
    divergence = f"Hutchinson, probes: {config.num_probes}" if config.num_probes else "exact divergence"
    _show(
        {"log-likelihood, cached prefix": costs.cached, "sampling and log-likelihood in one pass": costs.one_pass, "whole call": costs.call}
    )
    progress.say(f"{config.solver}, {config.num_flow_steps} steps, {config.evaluations} evaluations on each side; {divergence}")
    return {
        "ratio": round(costs.cached.median, 4),
        "interval": _interval(costs.cached),
        "log_prob_seconds": round(costs.cached.first_seconds, 6),
        "sample_seconds": round(costs.cached.second_seconds, 6),
        "one_pass": {"ratio": round(costs.one_pass.median, 4), "interval": _interval(costs.one_pass)},
        "call": {"ratio": round(costs.call.median, 4), "interval": _interval(costs.call)},
        "evaluations": config.evaluations,
        "num_probes": config.num_probes,
        "solver": config.solver,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "policy": "random, tiny preset" if config.bundle is None else str(config.bundle),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }


def _show(rows: dict[str, Ratio]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("beside sampling")
    for heading in ("times as long", "95 % interval", "milliseconds", "sampling"):
        table.add_column(heading, justify="right")
    for name, ratio in rows.items():
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
        table.add_row(name, f"{ratio.median:.2f}", interval, f"{1e3 * ratio.first_seconds:.1f}", f"{1e3 * ratio.second_seconds:.1f}")
    Console(stderr=True, highlight=False).print(table)


def _interval(ratio: Ratio) -> list[float]:
    return [round(ratio.low, 4), round(ratio.high, 4)]
