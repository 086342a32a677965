"""Conversion of normalisation statistics between pi0fm and its peers' policies and data sets.

Owns: the statistics needed, the substitutes for those that nothing reads. Does not know: weights, configurations.

    ours     {"state": {"mean", ...}, "action": {...}}                    norm_stats.json of a bundle
    openpi   {"norm_stats": {"state": {"mean", ...}, "actions": {...}}}   assets/NAME/norm_stats.json
    LeRobot  {"observation.state": {"mean", ...}, "action": {...}}        meta/stats.json; NAME.STATISTIC in a processor's file
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.columns.norm_stats import ColumnStats, NormStats
from pi0fm.data.normalization import scaling
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.errors import BundleError

NEEDED = {"z_score": ("mean", "std"), "quantile": ("q01", "q99")}
# Substitutes for statistics that the normalisation does not read and the source lacks; a line names them.
STAND_INS = {"q01": "min", "q99": "max", "min": "q01", "max": "q99"}
# our column -> the peers' names
COLUMNS = {"state": ("state", "observation.state"), "action": ("action", "actions")}
# in a bundle's training facts: the statistics that are substitutes, which no export writes
STAND_INS_FACT = "stand_in_statistics"

Columns = Mapping[str, Mapping[str, Any]]


def columns_of(tree: Mapping[str, Any]) -> Columns:
    """Return the columns from any of the three forms above."""
    inner = tree.get("norm_stats", tree)
    return {str(name): group for name, group in inner.items() if isinstance(group, Mapping)} if isinstance(inner, Mapping) else {}


def foreign_stats(columns: Columns, normalization: str, widths: Mapping[str, int | None], where: str) -> tuple[NormStats, tuple[str, ...]]:
    """Return our statistics from a peer's, and the names of the substitutes.

    widths: of `state` and `action`, where known; they remove the padding that openpi's files may have.
    Raises BundleError for a missing column, a missing statistic that the normalisation reads, or one too short or not finite.
    """
    if normalization not in NEEDED:
        raise BundleError(f"normalization must be one of {', '.join(NEEDED)}, found {normalization!r} in {where}; retrain with one of them")
    found: dict[str, ColumnStats] = {}
    missing: set[str] = set()
    for name, words in COLUMNS.items():
        group = next((columns[word] for word in words if word in columns), None)
        if group is None:
            raise BundleError(f"{where} must hold statistics of {' or '.join(words)}, found {', '.join(sorted(columns)) or 'none'}")
        lacking = [statistic for statistic in ("mean", "std", *NEEDED[normalization]) if group.get(statistic) is None]
        if lacking:
            raise BundleError(f"{where} lacks {', '.join(f'{name}.{word}' for word in lacking)}; a missing statistic is never guessed")
        arrays: dict[str, NDArray[np.float32]] = {}
        for field in fields(ColumnStats):
            source = field.name
            if group.get(source) is None:
                source = STAND_INS[field.name]
                missing.add(field.name)
            if group.get(source) is None:
                raise BundleError(f"{where} must hold q01 and q99, or min and max, of {name}, found {', '.join(sorted(group))}")
            arrays[field.name] = _vector(group[source], widths.get(name), f"{name}.{source} of {where}")
        if len({array.shape for array in arrays.values()}) != 1:
            raise BundleError(f"{where}: statistics of {name} differ in length: { {word: len(array) for word, array in arrays.items()} }")
        found[name] = ColumnStats(**arrays)
    return NormStats(found["state"], found["action"], 0), tuple(sorted(missing))


def written_stats(stats: NormStats, config: PolicyConfig, epsilon: float) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Return our statistics for a peer, which adds `epsilon` and has no floor; adjusted where its scale would otherwise differ."""
    stand_ins = config.training.get(STAND_INS_FACT, "").split(",")
    columns: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name in COLUMNS:
        column: ColumnStats = getattr(stats, name)
        arrays = {field.name: getattr(column, field.name) for field in fields(ColumnStats) if field.name not in stand_ins}
        ours = scaling(column, config.normalization, config.norm_floor, config.norm_epsilon, config.norm_rule)
        alike = ours.scale == scaling(column, config.normalization, 0.0, epsilon, "absolute").scale
        if config.normalization == "z_score":
            arrays["std"] = np.where(alike, column.std, ours.scale - np.float32(epsilon))
        else:
            low = ours.offset - np.float32(1 - ours.shift) * ours.scale
            arrays["q01"] = np.where(alike, column.q01, low)
            arrays["q99"] = np.where(alike, column.q99, low + np.float32(2) * ours.scale - np.float32(epsilon))
        columns[name] = arrays
    return columns


def _vector(value: Any, width: int | None, what: str) -> NDArray[np.float32]:
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise BundleError(f"{what} must be a list of numbers, found {value!r:.60}") from None
    if array.ndim != 1 or not np.isfinite(array).all() or (width is not None and len(array) < width):
        raise BundleError(
            f"{what} must be at least {width or 1} finite numbers in a row, found shape {list(array.shape)}: {array.tolist()!s:.80}"
        )
    return array if width is None else array[:width]
