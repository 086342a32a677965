"""Statistics of state and action, computed from the data set's columns; no video is read.

Owns: `ColumnStats`, `NormStats`, their computation and their JSON form. Does not know: which normalisation uses them.
Shape letters: N frames, H horizon, S state dim, A action dim.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import BundleError, DatasetError

QUANTILES = (0.01, 0.99)
BINS = 2**13
BLOCK = 2**14  # rows


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
    """Statistics of the state [S] and of the action [A] as the network sees it (a difference in the embodiment's delta dimensions)."""

    state: ColumnStats
    action: ColumnStats
    num_frames: int

    def to_json(self) -> dict[str, Any]:
        """Convert to plain lists."""
        columns = {
            name: {f.name: getattr(getattr(self, name), f.name).tolist() for f in fields(ColumnStats)} for name in ("state", "action")
        }
        return {**columns, "num_frames": self.num_frames}


def norm_stats_from_json(tree: Mapping[str, Any], where: str) -> NormStats:
    """Inverse of `to_json`. Raises BundleError for a missing or mis-shaped statistic, with its name."""
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
    _refuse_unusable(values, name)
    low, high = np.quantile(values, QUANTILES, axis=0)
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
    starts: NDArray[np.int64] | None = None,
) -> NormStats:
    """Statistics of state [N, S] and action [N, A]; episode_end [N] is the index after the last row of each row's episode.

    starts: the rows that are trained on, all when None. Differences are taken as the network sees them: action at step k of the chunk
    minus the state at its start, for every k inside the episode.
    """
    whole = starts is None or len(starts) == len(state)
    chosen = np.arange(len(state)) if starts is None else starts
    seen = column_stats(state if whole else state[chosen], "state")
    if not delta_actions:
        return NormStats(seen, column_stats(action if whole else action[chosen], "action"), len(chosen))
    _refuse_unusable(action, "action")
    return NormStats(seen, _chunk_stats(state, action, episode_end, delta_actions, action_horizon, chosen), len(chosen))


def _refuse_unusable(values: NDArray[np.float32], name: str) -> None:
    if len(values) == 0:
        raise DatasetError(f"column {name!r} has no rows, so it has no statistics")
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DatasetError(f"column {name!r} must be finite, found {values[row].tolist()} in row {row}")


def _chunk_stats(
    state: NDArray[np.float32],
    action: NDArray[np.float32],
    end: NDArray[np.int64],
    delta: tuple[int, ...],
    horizon: int,
    starts: NDArray[np.int64],
) -> ColumnStats:
    """Statistics of every step of every chunk, in memory independent of rows and horizon: sums and two histograms.

    The first histogram covers the whole range of differences and finds the bins with the numbers around each quantile; the second
    resolves those bins to 2^-26 of the range. A quantile is interpolated between two numbers, as numpy does.
    """
    dims, listed = action.shape[1], list(delta)

    def blocks() -> Iterator[NDArray[np.float64]]:
        for first in range(0, len(starts), BLOCK):
            block = starts[first : first + BLOCK]
            base = state[block][:, listed]
            for offset in range(horizon):
                inside = block + offset < end[block]
                if inside.any():
                    chunk = action[(block + offset)[inside]]
                    chunk[:, listed] -= base[inside]
                    yield chunk.astype(np.float64)

    origin, top = action.min(axis=0).astype(np.float64), action.max(axis=0).astype(np.float64)
    origin[listed] -= state.max(axis=0)[listed]
    top[listed] -= state.min(axis=0)[listed]
    per_bin = np.maximum(top - origin, np.finfo(np.float32).tiny) / BINS
    low, high = np.full(dims, np.inf), np.full(dims, -np.inf)
    pivot = (origin + top) / 2
    count, total, square, coarse = 0, np.zeros(dims), np.zeros(dims), np.zeros((dims, BINS), dtype=np.int64)
    for values in blocks():
        low, high = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0))
        count, total, square = count + len(values), total + (values - pivot).sum(axis=0), square + ((values - pivot) ** 2).sum(axis=0)
        place = np.clip((values - origin) / per_bin, 0, BINS - 1).astype(np.int64) + np.arange(dims) * BINS
        coarse += np.bincount(place.ravel(), minlength=dims * BINS).reshape(dims, BINS)
    ranks = [(count - 1) * quantile for quantile in QUANTILES]
    wanted = [int(edge(rank)) for rank in ranks for edge in (np.floor, np.ceil)]
    below = np.concatenate([np.zeros((dims, 1), dtype=np.int64), np.cumsum(coarse, axis=1)], axis=1)
    bins = np.array([np.searchsorted(below[dim], wanted, side="right") - 1 for dim in range(dims)])  # [dims, 4]
    fine = np.zeros((len(wanted), dims * BINS), dtype=np.int64)
    least = np.full((len(wanted), dims * BINS), np.inf)
    for values in blocks():
        exact = np.clip((values - origin) / per_bin, 0, BINS - 1e-9)
        for number in range(len(wanted)):
            rows, columns = np.nonzero(exact.astype(np.int64) == bins[:, number])
            inner = ((exact[rows, columns] - bins[columns, number]) * BINS).astype(np.int64) + columns * BINS
            fine[number] += np.bincount(inner, minlength=dims * BINS)
            np.minimum.at(least[number], inner, values[rows, columns])
    found = np.empty((len(wanted), dims))
    for number, rank in enumerate(wanted):
        for dim in range(dims):
            sums = np.cumsum(fine[number, dim * BINS : (dim + 1) * BINS])
            found[number, dim] = least[number, dim * BINS + np.searchsorted(sums, rank - below[dim, bins[dim, number]], side="right")]
    low_q, high_q = (found[2 * k] + (rank - np.floor(rank)) * (found[2 * k + 1] - found[2 * k]) for k, rank in enumerate(ranks))
    variance = np.maximum(square / count - (total / count) ** 2, 0)
    arrays = (pivot + total / count, np.sqrt(variance), low_q, high_q, low, high)
    return ColumnStats(*(np.asarray(array, dtype=np.float32) for array in arrays))
