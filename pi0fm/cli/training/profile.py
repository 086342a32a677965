"""`pi0fm profile`: the time of a run's steps by part, the limits of this machine, and options to change.

Owns: the options. Does not know: how steps are taken or timed, how figures are shown (cli/bench).
"""

from dataclasses import dataclass, replace
from typing import Any

from pi0fm import progress
from pi0fm.bench.config import ProfileSteps
from pi0fm.cli import lerobot
from pi0fm.cli.bench import answer
from pi0fm.cli.training import train
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.options import option
from pi0fm.train.start.defaults import defaults

HELP = "measure the time of a run's steps by part, its share of the limit, and say what to change"
NAMED_BY_ROW = "output_dir"
ALIASES = lerobot.TRAIN
DEFAULTS = defaults
NETWORK = train.NETWORK


@dataclass(frozen=True)
class ProfiledRun(TrainingRun):
    """Options of a run as for `pi0fm train`; one worker's share of some steps is measured. Files are in output_dir/profile."""

    profile: ProfileSteps = option(ProfileSteps, "")


Options = ProfiledRun
OFTEN = train.short_help_options(Options)


def run(options: ProfiledRun) -> dict[str, Any]:
    """Measure, print the table and the advice, return the figures."""
    from pi0fm.bench import profile as profiling  # torch: seconds, which --help need not wait for

    share, folder = options.global_batch_size // max(1, options.workers[1]), options.output_dir / "profile"
    if options.workers[1] > 1:
        progress.say(f"one process takes the {share} samples of one of {options.num_workers} workers, without communication")
    found = profiling.measure(replace(options, global_batch_size=share, num_workers=1), options.profile, folder)
    return answer(found, folder / profiling.RESULT, profiling.__doc__)
