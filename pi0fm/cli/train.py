"""`pi0fm train`: a row of configuration files to a bundle.

Owns: the command's result. Does not know: how training runs.
"""

from typing import Any

from pi0fm.cli import lerobot
from pi0fm.cluster import training
from pi0fm.train.parallel.context import context_from_environment
from pi0fm.train.start.defaults import defaults

HELP = "train a policy on a LeRobot data set, or on a mixture of them"
Options = training.TrainingRun
NAMED_BY_ROW = "output_dir"
ALIASES = lerobot.TRAIN
DEFAULTS = defaults


def run(options: training.TrainingRun) -> dict[str, Any] | None:
    """Train; the result names the bundle. Under torchrun it is one line, the first process's."""
    result = training.run_training(options)
    if options.workers == (0, 0) and not context_from_environment().is_first:
        return None
    return {"bundle": str(result.bundle), "steps": result.steps, "loss": result.loss, "seconds": round(result.seconds, 3)}
