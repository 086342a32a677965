"""Statistics of state and action, from the data set's columns; no video is read.

Owns: `ColumnStats`, `NormStats`, their computation and their JSON form. Does not know: which normalisation uses them.
Shape letters: N frames, H horizon, S state dim, A action dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import BundleError, DatasetError


@dataclass(frozen=True)
class ColumnStats:
    """Per-dimension statistics, each float32 [dim]."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    q01: NDArray[np.float32]
    q99: NDArray[np.float32]
    min: NDArray[np.float32]
    max: NDArray[np.float32]


@dataclass(frozen=True)
class NormStats:
    """Statistics of the state [S] and of the action [A] as the network sees it (a difference, where the embodiment says so)."""

    state: ColumnStats
    action: ColumnStats
    num_frames: int

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        columns = {
            name: {f.name: getattr(getattr(self, name), f.name).tolist() for f in fields(ColumnStats)} for name in ("state", "action")
        }
        return {**columns, "num_frames": self.num_frames}


def norm_stats_from_json(tree: Mapping[str, Any], where: str) -> NormStats:
    """The inverse of `to_json`. Raises BundleError that names a missing or mis-shaped statistic."""
    columns = {}
    for name in ("state", "action"):
        group = tree.get(name)
        if not isinstance(group, Mapping):
            raise BundleError(f"{where} must hold statistics of {name!r}, found {sorted(tree)}")
        arrays = {}
        for field in fields(ColumnStats):
            if field.name not in group:
                raise BundleError(f"{where} lacks {name}.{field.name}; a missing statistic is never guessed")
            arrays[field.name] = np.asarray(group[field.name], dtype=np.float32)
        if len({array.shape for array in arrays.values()}) != 1 or arrays["mean"].ndim != 1:
            raise BundleError(f"{where}: the statistics of {name} differ in shape: { {k: list(a.shape) for k, a in arrays.items()} }")
        columns[name] = ColumnStats(**arrays)
    return NormStats(columns["state"], columns["action"], int(tree.get("num_frames", 0)))


def column_stats(values: NDArray[np.float32], name: str) -> ColumnStats:
    """Statistics over the first axis of [n, dim], accumulated in float64. Raises DatasetError on a non-finite entry."""
    if len(values) == 0:
        raise DatasetError(f"column {name!r} has no rows, so it has no statistics")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise DatasetError(f"column {name!r} must be finite, found {values[row].tolist()} in row {row}")
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    arrays = (
        values.mean(axis=0, dtype=np.float64),
        values.std(axis=0, dtype=np.float64),
        low,
        high,
        values.min(axis=0),
        values.max(axis=0),
    )
    return ColumnStats(*(np.asarray(array, dtype=np.float32) for array in arrays))


def compute_norm_stats(
    state: NDArray[np.float32],
    action: NDArray[np.float32],
    episode_end: NDArray[np.int64],
    delta_actions: tuple[int, ...],
    action_horizon: int,
) -> NormStats:
    """Statistics of state [N, S] and action [N, A]; episode_end [N] is the index behind each frame's episode.

    Differences are taken as the network sees them: action at step k of the chunk minus the state at its start, for every k that lies
    inside the episode.
    """
    values = action
    if delta_actions:
        starts = np.arange(len(action))
        parts = []
        for offset in range(action_horizon):
            inside = starts[starts + offset < episode_end]
            chunk = action[inside + offset].copy()
            chunk[:, list(delta_actions)] -= state[inside][:, list(delta_actions)]
            parts.append(chunk)
        values = np.concatenate(parts)
    return NormStats(column_stats(state, "state"), column_stats(values, "action"), len(state))
