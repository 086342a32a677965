"""`pi0fm flow NAME`: the mathematics under the policies, drawn and measured.

Owns: the list of sub-commands. Does not know: what they do.
"""

import importlib
from typing import Any

from pi0fm.cli.bench import question

HELP = "show and measure the flows that policies are made of"
SUBCOMMANDS = {
    "demo": "flow matching, CNF and diffusion on data in the plane: figures and a comparison",
    "steps": "the error of a chunk against the evaluations of the network, for every solver",
}


def subcommand(name: str) -> Any:
    """Return `cli/flow_demo`, or a measurement of pi0fm/bench."""
    if name == "steps":
        return question("flow_steps", SUBCOMMANDS[name])
    return importlib.import_module(f"pi0fm.cli.flow_{name}")
