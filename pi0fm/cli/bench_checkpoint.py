"""`pi0fm bench checkpoint`: what a checkpoint that is written behind the training's back costs a step.

Owns: the table, and the last line of JSON. Does not know: how it is measured.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import machine, progress
from pi0fm.bench.checkpoint import CheckpointConfig, CheckpointCost, measure
from pi0fm.train.config import TrainConfig

HELP = "steps with an asynchronous checkpoint beside steps without"
Options = CheckpointConfig
ALIASES = {"checkpoint_every": "every", "keep_checkpoints": "keep"}


def run(config: CheckpointConfig) -> dict[str, Any]:
    """Measure, print the table, return the figures; `slowdown` 0.01 is one hundredth more wall time a step."""
    progress.say(f"{config.rounds} rounds of two blocks of {config.every} steps, one with a checkpoint behind its first step")
    found = measure(config)
    usual = TrainConfig.checkpoint_every
    _show(config, found, usual)
    written = (found.wall.median - 1) * config.every / found.steps
    progress.say(
        f"a state of {found.bytes / 2**20:.1f} MiB; the call that saves returned after {1e3 * found.blocking:.1f} ms, "
        f"the checkpoint was there after {found.steps:.0f} steps, of which each was slower by {100 * written:.1f} %"
    )
    return {
        "slowdown": round(found.wall.median - 1, 5),
        "interval": [round(found.wall.low - 1, 5), round(found.wall.high - 1, 5)],
        "bytes": found.bytes,
        "blocking_seconds": round(found.blocking, 5),
        "cpu_slowdown": round(found.cpu.median - 1, 5),
        "cpu_interval": [round(found.cpu.low - 1, 5), round(found.cpu.high - 1, 5)],
        "slowdown_while_written": round(written, 5),
        f"slowdown_every_{usual}": round((found.wall.median - 1) * config.every / usual, 6),
        "steps_until_written": found.steps,
        "step_seconds": round(found.wall.second_seconds / config.every, 5),
        "every": config.every,
        "rounds": config.rounds,
        "case": config.case,
        "parameters": found.parameters,
        "batch_size": config.batch_size,
        "threads": config.threads,
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }


def _show(config: CheckpointConfig, found: CheckpointCost, usual: int) -> None:
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("a step is slower by")
    for heading in (f"every {config.every}", "95 % interval", f"every {usual}", "at most"):
        table.add_column(heading, justify="right")
    for name, ratio, target in (("wall time", found.wall, "5 %"), ("processor time", found.cpu, "")):
        low, high = (_percent(value) for value in (ratio.low, ratio.high))
        table.add_row(name, _percent(ratio.median), f"{low} to {high}", _percent(1 + (ratio.median - 1) * config.every / usual), target)
    Console(stderr=True, highlight=False, width=max(100, Console(stderr=True).width)).print(table)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.2f} %"
