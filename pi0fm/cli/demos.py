"""`pi0fm demos`: record scripted experts into a LeRobot data set.

Owns: the command's options and aliases. Does not know: how recording works.
"""

from typing import Any

from pi0fm.demos.config import DemosConfig

HELP = "record scripted experts into a LeRobot data set; the same command continues after an interruption"
Options = DemosConfig
ALIASES = {"task": "tasks", "repo_id": "dataset.repo_id", "root": "dataset.root"}


def run(options: DemosConfig) -> dict[str, Any]:
    """Record, and return episodes, frames, seconds, root and the expert's success by task."""
    from pi0fm.cluster.recording import record_demonstrations  # pyarrow and av, which --help need not wait for

    return record_demonstrations(options)
