"""`pi0fm train`: a configuration to a bundle.

Owns: the command's result. Does not know: how training runs.
"""

from typing import Any

from pi0fm.cluster import training

HELP = "train a policy on a LeRobot data set, or on a mixture of them"
Options = training.TrainingRun
ALIASES = {"batch_size": "global_batch_size", "policy.type": "model.preset", "policy.path": "pretrained"}


def run(options: training.TrainingRun) -> dict[str, Any]:
    """Train; the result names the bundle."""
    result = training.run_training(options)
    return {"bundle": str(result.bundle), "steps": result.steps, "loss": result.loss, "seconds": round(result.seconds, 3)}
