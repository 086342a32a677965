"""`pi0fm bench loading`: what a sample costs, beside LeRobot's loader, copying and plain decoding.

Owns: the table, and the last line of JSON. Does not know: how anything is measured.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import machine, progress
from pi0fm.bench.loading import LoadingFigures, measure
from pi0fm.bench.loading_config import LoadingConfig
from pi0fm.bench.paired import Ratio

HELP = "samples a processor second: frame cache and stream beside LeRobot's loader, copying and decoding"
Options = LoadingConfig
ALIASES = {"chunk_size": "action_horizon", "dataset.root": "root", "loader.processes": "processes"}


def run(config: LoadingConfig) -> dict[str, Any]:
    """Measure, print the table, return the figures."""
    found = measure(config)
    rows = {
        "cached_ratio": ("loader from the cache : LeRobot's loader", found.cached, 30.0),
        "cached_of_memcpy": ("gathering pictures : copying as many bytes", found.gather, 0.5),
        "streaming_of_decode": ("pictures of the stream : decoding in order", found.streaming.pictures, 0.6),
        "build_of_decode": ("building the cache : decoding in order", found.build, 0.8),
    }
    _show(rows, found)
    speeds = {name: 1 / seconds for name, seconds in _seconds(found).items()}
    progress.say(
        f"{speeds['cached']:.0f} samples a processor second, LeRobot {speeds['lerobot']:.0f}; decoding {speeds['decoded']:.0f} frames, of "
        f"which the stream took {found.streaming.frames_a_sample:.2f} a sample"
    )
    memory = found.memory
    progress.say(
        f"memory no file backs: {memory.start:.1f} MiB after a tenth of {config.memory_batches} batches, {memory.end:.1f} MiB after all, "
        f"never more than {memory.peak:.1f} MiB in between"
    )
    return {
        **{name: round(ratio.median, 3) for name, (_, ratio, _) in rows.items()},
        "norm_stats_seconds_per_million_frames": round(found.norm_stats_seconds, 2),
        "intervals": {name: [round(ratio.low, 3), round(ratio.high, 3)] for name, (_, ratio, _) in rows.items()},
        "cached_samples_per_cpu_second": round(speeds["cached"], 1),
        "lerobot_samples_per_cpu_second": round(speeds["lerobot"], 1),
        "decoded_frames_per_cpu_second": round(speeds["decoded"], 1),
        "streamed_frames_a_sample": round(found.streaming.frames_a_sample, 3),
        "batch_of_memcpy": round(found.collate.median, 3),
        "build_of_decode_on_all_processors": round(found.build_all.median, 3),
        "streamed_batch_of_decode": round(found.streaming.batches.median, 3),
        "memory_mib": {"start": round(memory.start, 2), "end": round(memory.end, 2), "peak": round(memory.peak, 2)},
        "memory_growth_mib": round(memory.end - memory.start, 2),
        "memory_batches": config.memory_batches,
        "frames": found.frames,
        "size": config.size,
        "action_horizon": config.action_horizon,
        "batch_size": config.batch_size,
        "processes": config.processes,
        "lerobot_workers": config.lerobot_workers,
        "video_backend": found.video_backend,
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }


def _show(rows: dict[str, tuple[str, Ratio, float]], found: LoadingFigures) -> None:
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("speed, ours : the other's")
    for heading in ("ratio", "95 % interval", "at least"):
        table.add_column(heading, justify="right")
    for text, ratio, target in rows.values():
        table.add_row(text, *_cells(ratio), f"{target:g}")
    table.add_row("a whole batch : copying its pictures", *_cells(found.collate), "")
    table.add_row("building the cache : decoding, wall time on all processors", *_cells(found.build_all), "")
    table.add_row("a whole batch of the stream : decoding in order", *_cells(found.streaming.batches), "")
    table.add_row("seconds for statistics of a million frames", f"{found.norm_stats_seconds:.1f}", "", "at most 20")
    Console(stderr=True, highlight=False, width=max(100, Console(stderr=True).width)).print(table)


def _cells(ratio: Ratio) -> tuple[str, str]:
    return f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"


def _seconds(found: LoadingFigures) -> dict[str, float]:
    """Processor seconds of one sample or one frame."""
    return {"lerobot": found.cached.first_seconds, "cached": found.cached.second_seconds, "decoded": found.build.first_seconds}
