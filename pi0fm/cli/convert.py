"""`pi0fm convert`: weights of openpi and LeRobot to a bundle, and back.

Owns: the command's result. Does not know: any format.
"""

from dataclasses import asdict
from typing import Any

from pi0fm.convert.config import ConvertConfig

HELP = "convert openpi's or LeRobot's weights to a bundle, or a bundle to theirs"
Options = ConvertConfig
ALIASES: dict[str, str] = {}
POSITIONAL = "source"


def run(options: ConvertConfig) -> dict[str, Any]:
    """Convert; the result names the directory."""
    from pi0fm.convert.conversion import convert  # imports torch, which help does not need

    result = convert(options)
    return {**asdict(result), "path": str(result.path)}
