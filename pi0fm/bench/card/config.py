"""What `pi0fm bench card` is asked to measure, and for how long.

Owns: the parts, the options and their ranges. It imports nothing heavy.
"""

from dataclasses import dataclass
from pathlib import Path

from pi0fm.options import nearest, option
from pi0fm_client.errors import ConfigError

PARTS = {"right": 150, "inference": 170, "training": 120, "extras": 40}
"""In order of worth, with the seconds that each may take: eight minutes in all."""


@dataclass(frozen=True)
class CardConfig:
    """Options of `pi0fm bench card`. Raises ConfigError for a part that is not known, or a time out of range."""

    parts: tuple[str, ...] = option(tuple(PARTS), "what is measured, in order; PART=SECONDS gives a part another time")
    output_dir: Path = option(Path("outputs/gpu"), "folder of the results, a file a part")
    device: str = option("cuda", "cuda, or cpu for a try")
    whole: bool = option(True, "full size; false takes the tiny preset, to try every line of it without a GPU")

    def __post_init__(self) -> None:
        self.bounds()
        if self.device not in ("cuda", "cpu"):
            raise ConfigError(f"device must be cuda or cpu, found {self.device!r}")
        if self.whole and self.device == "cpu":
            raise ConfigError("full size takes hours on a CPU; type --whole false, or --device cuda")

    def bounds(self) -> dict[str, float]:
        """Seconds of each part that is asked for, in order."""
        found: dict[str, float] = {}
        for word in self.parts:
            name, _, seconds = word.partition("=")
            if name not in PARTS:
                raise ConfigError(f"unknown part {name!r}: {nearest(name, list(PARTS))}")
            if seconds and not seconds.isdigit():
                raise ConfigError(f"a part's time must be whole seconds, found {word!r}; type {name}={PARTS[name]}")
            found[name] = float(seconds or PARTS[name])
        if not found:
            raise ConfigError(f"parts must name one or more of {', '.join(PARTS)}, found none")
        return found
