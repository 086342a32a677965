"""`pi0fm calibrate BUNDLE`: set the threshold of its alarm from held-out episodes.

Owns: the printed line. Does not know: how it is found (eval/calibrate).
"""

from typing import Any

from pi0fm.cli.bench import rounded
from pi0fm.eval.recorded_config import CalibrateConfig
from pi0fm.progress import say

HELP = "set the threshold of a bundle's alarm from held-out episodes, at a chosen rate of false alarms"
POSITIONAL = "bundle"
Options = CalibrateConfig
ALIASES: dict[str, str] = {"policy.path": "bundle"}


def run(options: CalibrateConfig) -> dict[str, Any]:
    """Calibrate, print the threshold, return the figures."""
    from pi0fm.eval.calibrate import calibrate  # torch: seconds, which --help need not wait for

    found: dict[str, Any] = rounded(calibrate(options))
    of_episodes = f"{100 * found['false_alarm_rate']:g} % of episodes like these {found['episodes']}"
    say(f"{options.bundle}: a chunk with a spread above {found['threshold']:g} raises an alarm, at most in {of_episodes}")
    return found
