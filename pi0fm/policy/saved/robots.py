"""The robots of a policy that was trained on several data sets, in the bundle's robots.json.

Owns: `Robot`, the file's content, the choice of a robot by its name. Does not know: the rest of a bundle, the network.

    config.json, norm_stats.json   the first robot, so that a reader of one robot finds a whole policy
    robots.json                    NAME -> embodiment, fps, seeds that were demonstrated, camera sources, training; norm stats
    model.safetensors              one network for all of them
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pi0fm import options
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, norm_stats_from_json
from pi0fm_client.errors import BundleError, ConfigError

FILE = "robots.json"


@dataclass(frozen=True)
class Robot:
    """The fields of a `PolicyConfig` that belong to one robot, by the same names."""

    embodiment: Embodiment
    fps: float = 0.0
    demonstration_seeds: dict[str, list[int]] = options.option(dict, "")
    camera_sources: dict[str, str] = options.option(dict, "")
    training: dict[str, str] = options.option(dict, "")


Robots = Mapping[str, tuple[Robot, NormStats]]
"""By name, in the order of the mixture; the first is the one that is taken where none is named."""


def to_json(robots: Robots) -> dict[str, Any]:
    """Plain mappings and lists."""
    return {name: {"policy": options.encode(robot), "norm_stats": stats.to_json()} for name, (robot, stats) in robots.items()}


def from_json(tree: Mapping[str, Any], where: str) -> dict[str, tuple[Robot, NormStats]]:
    """The inverse of `to_json`. Raises BundleError for another content."""
    found = {}
    for name, group in tree.items():
        if not isinstance(group, Mapping) or not {"policy", "norm_stats"} <= group.keys():
            raise BundleError(f"{where} must hold policy and norm_stats of each robot, {name!r} lacks them; copy the bundle again")
        try:
            robot = options.decode(Robot, group["policy"])
        except ConfigError as error:
            raise BundleError(f"{where} does not fit this version of pi0fm: {name}: {error}") from None
        found[name] = (robot, norm_stats_from_json(group["norm_stats"], f"{where}, {name}"))
    if not found:
        raise BundleError(f"{where} must hold one robot or more, found none; copy the bundle again")
    return found


def demonstrated(robots: Robots) -> dict[str, list[int]]:
    """By task, the lowest and highest seed that any robot's data set holds: the one network was trained on all of them."""
    found: dict[str, list[int]] = {}
    for robot, _ in robots.values():
        for task, (low, high) in robot.demonstration_seeds.items():
            known = found.get(task, [low, high])
            found[task] = [min(known[0], low), max(known[1], high)]
    return found


def refuse_unknown(name: str, known: Sequence[str], where: str) -> None:
    """Raise ConfigError for a robot that the bundle does not serve, with the nearest that it does."""
    if name not in known:
        raise ConfigError(f"--robot must be a robot of the bundle {where}, found {name!r}: {options.nearest(name, known)}")
