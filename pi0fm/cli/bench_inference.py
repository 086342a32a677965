"""`pi0fm bench inference`: ten Euler steps of LeRobot's own PI0 and of ours, one after the other.

Owns: the table, inference.json. Does not know: what is timed.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, machine, progress
from pi0fm.bench.peer_config import MODES, InferenceConfig, result_file

HELP = "ten Euler steps for one observation: LeRobot's own PI0 against ours"
Options = InferenceConfig
ALIASES = {"num_threads": "threads"}
RESULT = "inference.json"
COLUMNS = {
    "case": "case",
    "LeRobot": "peer_seconds",
    "ours": "seconds",
    "ratio": "ratio",
    "95 %": "interval",
    "over bare products": "gemm_ratio",
    "GFLOP": "gflop",
    "GFLOP/s": "gflop_per_second",
    "weights MB": "weight_megabytes",
    "of roofline": "roofline_share",
    "difference": "max_abs_difference",
}


def run(config: InferenceConfig) -> dict[str, Any]:
    """Measure, print the table, write inference.json when a folder was named."""
    written = result_file(config.output_dir, RESULT)
    progress.say("loading LeRobot")
    from pi0fm.bench import inference  # LeRobot's import alone takes many seconds

    result = inference.compare_inference(config)
    if written is not None:
        files.write_json(written, result | {"command": machine.command_line(), "notes": inference.__doc__})
    show(result, COLUMNS)
    return result


def show(result: dict[str, Any], columns: dict[str, str]) -> None:
    """One table a mode, and the machine's limits under them; on standard error."""
    console = Console(stderr=True, highlight=False, width=max(140, Console(stderr=True).width))
    for mode in MODES:
        table = Table(box=None, padding=(0, 2), header_style="", title=mode.replace("_", " "), title_justify="left")
        for heading in columns:
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for case, row in result["figures"][mode].items():
            table.add_row(case, *(_cell(name, row[name]) for name in columns.values() if name != "case"))
        console.print()
        console.print(table)
    speeds = ", ".join(f"{speed:g} GFLOP/s in {name}" for name, speed in result["roofline"]["gflop_per_second"].items())
    progress.say(f"\nthe machine at best: {speeds}; {result['roofline']['gigabytes_per_second']:g} GB/s")
    progress.say(f"{result['machine']['processor']}; ratio: LeRobot's time over ours, median of pairs")


def _cell(name: str, value: Any) -> str:
    if name == "interval":
        return f"{value[0]:.2f} to {value[1]:.2f}"
    if name.endswith("seconds"):
        return f"{1e3 * value:.1f} ms"
    if name == "roofline_share":
        return f"{100 * value:.0f} %"
    return f"{value:.2g}" if name == "max_abs_difference" else f"{value:.4g}"
