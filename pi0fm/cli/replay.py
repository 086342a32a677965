"""`pi0fm replay`: infer a server's log of requests again, and compare two bundles on it.

Owns: the printed lines. Does not know: how the figures are found.
"""

from typing import Any

from pi0fm.cli.bench import rounded, show
from pi0fm.progress import say
from pi0fm.serve.records.config import ReplayConfig

HELP = "repeat a server's request log bit for bit, and compare two bundles on it"
Options = ReplayConfig
ALIASES: dict[str, str] = {}
POSITIONAL = "log"


def run(options: ReplayConfig) -> dict[str, Any]:
    """Replay, print the comparison, and return the figures."""
    from pi0fm.serve.records.replay import replay  # torch: seconds, which --help need not wait for

    found: dict[str, Any] = rounded(replay(options))
    if "other" in found:
        dims = range(len(found["other"]))
        show({"root mean square": {str(dim): {name: found[name][dim] for name in ("other", "another_seed")} for dim in dims}})
    same = f"{found['identical']} of {found['requests']} answers are the log's, bit for bit"
    say(same if not found["differs"] else f"{same}; here another {', '.join(found['differs'])}")
    return found
