"""`pi0fm train`: train a bundle from a row of configuration files.

Owns: the command's result. Does not know: how training runs.
"""

from dataclasses import fields
from typing import Any

from pi0fm.cli import lerobot
from pi0fm.cluster.training_run import TrainingRun, refuse_at_once
from pi0fm.models.config import Pi0Config
from pi0fm.train.parallel.context import context_from_environment
from pi0fm.train.start.defaults import defaults

HELP = "train a policy on a LeRobot data set, or on a mixture of them"
Options = TrainingRun
NAMED_BY_ROW = "output_dir"
ALIASES = lerobot.TRAIN
DEFAULTS = defaults
NETWORK = Pi0Config
OFTEN = frozenset(
    (
        *("dataset.repo_id", "dataset.root", "dataset.episodes", "embodiment.cameras", "embodiment.delta_actions"),
        *("output_dir", "resume", "steps", "seed", "global_batch_size", "micro_batch_size", "log_every", "checkpoint_every", "tracker"),
        *("model", "pretrained", "train_only", "lora.rank", "tokenizer", "augment", "execution_horizon", "rtc.max_delay"),
        *("activation_checkpointing", "compile", "precision", "threads", "parallel.shard", "num_workers", "gpus_per_worker", "ray_address"),
        *("optimizer.learning_rate", "optimizer.warmup_steps", "ema_decay", "validation.every", "validation.episodes"),
    )
)


def short_help_options(cls: type) -> frozenset[str]:
    """Return OFTEN and the options that `cls` adds to a training run's."""
    return OFTEN | {field.name for field in fields(cls)} - {field.name for field in fields(Options)}


def run(options: TrainingRun) -> dict[str, Any] | None:
    """Train; the result names the bundle. Under torchrun only the first process returns it."""
    refuse_at_once(options)
    from pi0fm.cluster.training import run_training  # imports torch, which takes seconds: a wrong path is reported before

    result = run_training(options)
    if options.workers == (0, 0) and not context_from_environment().is_first:
        return None
    return {"bundle": str(result.bundle), "steps": result.steps, "loss": result.loss, "seconds": round(result.seconds, 3)}
