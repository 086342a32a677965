"""`pi0fm bench loading`: what a sample costs, beside LeRobot's loader, copying and plain decoding.

Owns: the table, and the last line of JSON. Does not know: how anything is measured.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import progress
from pi0fm.bench.loading import LoadingConfig, LoadingFigures, measure
from pi0fm.bench.paired import Ratio
from pi0fm.eval import machine

HELP = "samples a processor second: frame cache and stream beside LeRobot's loader, copying and decoding"
Options = LoadingConfig
ALIASES = {"chunk_size": "action_horizon", "dataset.root": "root"}


def run(config: LoadingConfig) -> dict[str, Any]:
    """Measure, print the table, return the figures."""
    found = measure(config)
    rows = {
        "cached_ratio": ("loader from the cache : LeRobot's loader", found.cached, 30.0),
        "cached_of_memcpy": ("gathering pictures : copying as many bytes", found.gather, 0.5),
        "streaming_of_decode": ("an epoch of the stream : decoding in order", found.stream, 0.6),
        "build_of_decode": ("building the cache : decoding in order", found.build, 0.8),
    }
    _show(rows, found)
    before, after = found.anonymous_mib
    progress.say(
        f"{found.cached_samples:.0f} samples a processor second, LeRobot {found.lerobot_samples:.0f}; decoding {found.decoded_frames:.0f} "
        f"frames; a whole batch at {found.collate.median:.2f} of copying its pictures"
    )
    progress.say(f"memory no file backs: {before:.1f} MiB after a tenth of {config.memory_batches} batches, {after:.1f} MiB after all")
    return {
        **{name: round(ratio.median, 3) for name, (_, ratio, _) in rows.items()},
        "norm_stats_seconds_per_million_frames": round(found.norm_stats_seconds, 2),
        "intervals": {name: [round(ratio.low, 3), round(ratio.high, 3)] for name, (_, ratio, _) in rows.items()},
        "cached_samples_per_cpu_second": round(found.cached_samples, 1),
        "lerobot_samples_per_cpu_second": round(found.lerobot_samples, 1),
        "decoded_frames_per_cpu_second": round(found.decoded_frames, 1),
        "batch_of_memcpy": round(found.collate.median, 3),
        "memory_growth_mib": round(after - before, 2),
        "memory_batches": config.memory_batches,
        "frames": found.frames,
        "size": config.size,
        "action_horizon": config.action_horizon,
        "batch_size": config.batch_size,
        "lerobot_workers": config.lerobot_workers,
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }


def _show(rows: dict[str, tuple[str, Ratio, float]], found: LoadingFigures) -> None:
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("speed, ours : the other's")
    for heading in ("ratio", "95 % interval", "at least"):
        table.add_column(heading, justify="right")
    for text, ratio, target in rows.values():
        table.add_row(text, f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}", f"{target:g}")
    table.add_row("seconds for statistics of a million frames", f"{found.norm_stats_seconds:.1f}", "", "at most 20")
    Console(stderr=True, highlight=False, width=max(100, Console(stderr=True).width)).print(table)
