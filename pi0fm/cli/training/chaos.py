"""`pi0fm chaos`: disturb a training run, and check that it ends with the weights of an undisturbed one.

Owns: the options. Does not know: what is killed, how a run survives.
"""

from dataclasses import dataclass
from typing import Any

from pi0fm.cli import lerobot
from pi0fm.cli.training import train
from pi0fm.cluster import chaos as disturbing
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.options import option
from pi0fm.train.start.defaults import defaults

HELP = "kill parts of a training run every 30 s, and check that its weights equal an undisturbed run's"
NAMED_BY_ROW = "output_dir"
ALIASES = lerobot.TRAIN
DEFAULTS = defaults
NETWORK = train.NETWORK


@dataclass(frozen=True)
class ChaosRun(TrainingRun):
    """Options of a run as for `pi0fm train`; its folders are below output_dir."""

    chaos: disturbing.ChaosConfig = option(disturbing.ChaosConfig, "")


Options = ChaosRun
OFTEN = train.short_help_options(Options)


def run(options: ChaosRun) -> dict[str, Any]:
    """Run undisturbed and disturbed, return the figures."""
    return disturbing.chaos(options, options.chaos)
