"""Scale of each dimension from its statistics, by the rule that a policy's weights were trained with.

Owns: the rules, the notice of a dimension that is not scaled by its deviation or quantiles. Does not know: bundles (policy/saved/bundle
keeps the rule's name), where statistics come from.

    network = (x - offset) / scale - shift      robot = (network + shift) * scale + offset

               z_score                                   quantile
    relative   (mean, max(std, floor * range), 0)        (q01, (q99 - q01) / 2, 1); (min, range / 2, 1) where q99 - q01 < floor * range
    absolute   (mean, max(std + epsilon, floor), 0)      (q01, max((q99 - q01 + epsilon) / 2, floor), 1): openpi's and LeRobot's
    centred    (mean, max(std + epsilon, floor), 0)      ((q01 + q99) / 2, max((q99 - q01) / 2, floor), 0): bundles of format 2

A dimension that never moves has no range: under `relative` its scale is 1, so that a value next to it is not blown up.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.columns.norm_stats import ColumnStats
from pi0fm_client.errors import ConfigError

NormRule = Literal["relative", "absolute", "centred"]
RELATIVE: NormRule = "relative"
STILL = 1e-6  # relative: rounding of one number in float32


@dataclass(frozen=True)
class Scaling:
    """Affine scaling. offset, scale: float32 [dim]; shift: 1 where q01 maps to -1, else 0."""

    offset: NDArray[np.float32]
    scale: NDArray[np.float32]
    shift: float

    def forward(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map to the network's units."""
        found = (values - self.offset) / self.scale
        return found - np.float32(self.shift) if self.shift else found

    def inverse(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map to the robot's units."""
        return (values + np.float32(self.shift) if self.shift else values) * self.scale + self.offset


def scaling(stats: ColumnStats, kind: str, floor: float, epsilon: float = 0.0, rule: str = RELATIVE) -> Scaling:
    """Make the scaling of `kind` (z_score, quantile) under a rule. floor: a share of the range under `relative`, else in robot units.

    epsilon: openpi's addition to a deviation, or to the range of two quantiles. Raises ConfigError for an unknown kind or rule.
    """
    if kind not in ("z_score", "quantile"):
        raise ConfigError(f"normalization must be 'z_score' or 'quantile', found {kind!r}")
    if rule not in get_args(NormRule):
        raise ConfigError(f"norm_rule must be one of {', '.join(get_args(NormRule))}, found {rule!r}")
    width = stats.q99 - stats.q01
    if rule == RELATIVE:
        span, still = stats.max - stats.min, constant_dimensions(stats)
        if kind == "z_score":
            return Scaling(stats.mean, np.where(still, np.float32(1), np.maximum(stats.std, np.float32(floor) * span)), 0)
        narrow = width < np.float32(floor) * span
        half = np.where(still, np.float32(1), np.where(narrow, span, width) / np.float32(2))
        return Scaling(np.where(narrow, stats.min, stats.q01), half, 1)
    if kind == "z_score":
        return Scaling(stats.mean, np.maximum((stats.std.astype(np.float64) + epsilon).astype(np.float32), np.float32(floor)), 0)
    if epsilon:
        width = (stats.q99.astype(np.float64) - stats.q01 + epsilon).astype(np.float32)
    half = np.maximum(width / np.float32(2), np.float32(floor))
    if rule == "centred":
        return Scaling((stats.q99 + stats.q01) / np.float32(2), half, 0)
    return Scaling(stats.q01, half, 1)


def constant_dimensions(stats: ColumnStats) -> NDArray[np.bool_]:
    """[dim] True for dimensions that never move beyond rounding."""
    return np.asarray(stats.max - stats.min <= STILL * np.maximum(np.abs(stats.min), np.abs(stats.max)))


def scale_notices(stats: ColumnStats, kind: str, floor: float, name: str) -> list[str]:
    """Describe the dimensions that `relative` does not scale by deviation or quantiles; empty where all move enough."""
    span, still = stats.max - stats.min, constant_dimensions(stats)
    notices = []
    if still.any():
        notices.append(f"{name} {_listed(still)} never moves")
    if kind == "quantile":
        narrow = (stats.q99 - stats.q01 < np.float32(floor) * span) & ~still
        if narrow.any():
            notices.append(f"{name} {_listed(narrow)} has quantiles q01 and q99 together, scaled from its minimum to its maximum")
    else:
        rare = (stats.std < np.float32(floor) * span) & ~still
        if rare.any():
            notices.append(f"{name} {_listed(rare)} moves rarely, scaled by {floor:g} of its range")
    return notices


def _listed(dims: NDArray[np.bool_]) -> str:
    numbers = np.flatnonzero(dims).tolist()
    return ("dimension " if len(numbers) == 1 else "dimensions ") + ", ".join(map(str, numbers))
