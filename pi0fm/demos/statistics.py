"""Statistics of a data set's columns, by the names that LeRobot gives them.

Owns: min, max, mean, std, count and five quantiles of columns and of pictures, and their union. Does not know: files.
A quantile is the smallest value that at least that share of the values does not exceed; LeRobot takes the same from a histogram of
5000 bins. Shape letters: N frames, D numbers per frame, L a picture's shape.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
_LARGE_PICTURE, _SAMPLED_PICTURE = 300, 150  # LeRobot takes every n-th pixel of larger pictures, to about 150 on the longer side

Statistics = Mapping[str, NDArray[Any]]
"""Statistics by name: float64 [D] or [3, 1, 1], and `count` int64 [1]."""


def of_columns(values: NDArray[Any]) -> Statistics:
    """Compute exact statistics of values [N, D], N >= 1, each float64 [D]."""
    count = len(values)
    columns = np.ascontiguousarray(values.T)
    ranks = {name: max(int(np.ceil(share * count - 1e-9)) - 1, 0) for name, share in QUANTILES.items()}
    ordered = np.partition(columns, sorted(set(ranks.values())), axis=1)
    found = {
        "min": columns.min(axis=1),
        "max": columns.max(axis=1),
        "mean": columns.mean(axis=1, dtype=np.float64),
        "std": columns.std(axis=1, dtype=np.float64),
        **{name: ordered[:, rank] for name, rank in ranks.items()},
    }
    return {name: np.array([count]) if name == "count" else found[name].astype(np.float64) for name in NAMES}


def of_pictures(pictures: NDArray[np.uint8]) -> Statistics:
    """Compute statistics by colour, each float64 [3, 1, 1] in [0, 1]; `count` is pixels. pictures: uint8 [N, height, width, 3].

    Every pixel of every picture counts, through a histogram of the 256 levels; from 300 pixels on, pictures are subsampled as LeRobot does.
    """
    longest = max(pictures.shape[1:3])
    step = longest // _SAMPLED_PICTURE if longest >= _LARGE_PICTURE else 1
    levels = np.zeros((3, 256), np.int64)
    for picture in pictures:  # one at a time: bincount takes 8 bytes per value
        for colour in range(3):
            levels[colour] += np.bincount(picture[::step, ::step, colour].reshape(-1), minlength=256)
    count = int(levels[0].sum())
    level = np.arange(256.0)
    mean = levels @ level / count
    below = levels.cumsum(axis=1)
    found = {
        "min": (levels > 0).argmax(axis=1),
        "max": 255 - (levels[:, ::-1] > 0).argmax(axis=1),
        "mean": mean,
        "std": np.sqrt((levels * (level - mean[:, None]) ** 2).sum(axis=1) / count),
        **{name: (below >= share * count - 1e-6).argmax(axis=1) for name, share in QUANTILES.items()},
    }
    return {name: np.array([count]) if name == "count" else (found[name] / 255).reshape(3, 1, 1) for name in NAMES}


def union(one: Statistics, other: Statistics) -> Statistics:
    """Join two statistics. Exact except for the quantiles, which are means weighted by count, as in LeRobot."""
    first, second = float(one["count"][0]), float(other["count"][0])
    total = first + second

    def weighted(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray((left * first + right * second) / total, np.float64)

    mean = weighted(one["mean"], other["mean"])
    variance = weighted(one["std"] ** 2 + (one["mean"] - mean) ** 2, other["std"] ** 2 + (other["mean"] - mean) ** 2)
    found = {
        "min": np.minimum(one["min"], other["min"]),
        "max": np.maximum(one["max"], other["max"]),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": one["count"] + other["count"],
    }
    return found | {name: weighted(one[name], other[name]) for name in QUANTILES}
