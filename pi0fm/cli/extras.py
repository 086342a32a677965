"""The program `pi0fm` where an extra is not installed: one line that names it, in place of a traceback.

Owns: which extra brings which library. Does not know: what any command does.
"""

import sys
from collections.abc import Sequence

# a library of pyproject.toml's extras -> the extra to type; what both bring is named once
BRINGS = {
    **dict.fromkeys(("accelerate", "av", "lerobot", "matplotlib", "peft", "pyarrow", "ray", "tensorboard"), "train"),
    **dict.fromkeys(("gymnasium", "metaworld", "mujoco"), "sim"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """As `cli.main.main`, with exit code 1 where a library of an extra is missing."""
    from pi0fm.cli import main as program

    try:
        return program.main(arguments)
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in BRINGS:
            raise
        print(f"pi0fm: this needs {library}, found none; type pip install 'pi0fm[{BRINGS[library]}]', or pi0fm[all]", file=sys.stderr)
        return 1
