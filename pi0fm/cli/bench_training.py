"""`pi0fm bench training`: an optimiser step of LeRobot's own PI0 and of ours, one after the other; memory; the cost of 8 flow draws.

Owns: the tables, training.json. Does not know: what is timed.
"""

from typing import Any

from pi0fm import files, machine, progress
from pi0fm.bench.peer_config import TrainingBenchConfig, result_file
from pi0fm.cli.bench_inference import COLUMNS, show

HELP = "one optimiser step on the same batch: LeRobot's own PI0 against ours"
Options = TrainingBenchConfig
ALIASES = {"num_threads": "threads"}
RESULT = "training.json"


def run(config: TrainingBenchConfig) -> dict[str, Any]:
    """Measure, print the tables, write training.json when a folder was named."""
    written = result_file(config.output_dir, RESULT)
    from pi0fm.bench import training_step  # torch and transformers take seconds

    result = training_step.compare_training(config)
    if written is not None:
        files.write_json(written, result | {"command": machine.command_line(), "notes": training_step.__doc__})
    show(result, COLUMNS)
    for case, gain in result["peer_bfloat16"].items():
        low, high = result["figures"]["as_shipped"][case]["peer_bfloat16_interval"]
        progress.say(f"LeRobot's own time over its time under bfloat16 autocast, {case}: {gain:.2f} ({low:.2f} to {high:.2f})")
    _show_memory(result)
    return result


def _show_memory(result: dict[str, Any]) -> None:
    for case, sides in result["memory"].items():
        for side, peak in sides.items():
            whole, above = f"{peak['whole_megabytes']:.0f} MB", f"{peak['above_imports_megabytes']:.0f} MB above its imports"
            progress.say(f"memory of {case}, {side}: {whole} ({peak['whole_ratio']:.2f}), {above} ({peak['above_imports_ratio']:.2f})")
    for case, ratio in result["flow_draws_8"].items():
        low, high = result["flow_draws_8_intervals"][case]
        predicted = result["flow_draws_8_predicted"][case]
        progress.say(f"8 flow draws over 1, {case}: {ratio:.3f} ({low:.3f} to {high:.3f}); operations predict {predicted:.3f}")
