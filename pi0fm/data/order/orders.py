"""Sample at each position of the stream: pure functions of (seed, position) and the data set.

Owns: `Order`, the orders without a window (uniform, by sample weights), dealing to a mixture. Does not know: pictures, batches, workers.

    Shuffled   epoch e is the permutation keyed by (seed, e)
    Weighted   epoch e draws N samples; sample i comes floor or ceil of N w_i / sum(w) times

        weights   |---- 0 ----|- 1 -|-------- 2 --------|          systematic resampling: N equal steps from an offset that
        draws        ^     ^     ^     ^     ^     ^               the epoch moves, then permuted (Kitagawa 1996)

A sample that comes twice in an epoch must not have the same noise twice: `number` distinguishes its draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.order.counter import draw, permute
from pi0fm_client.errors import ConfigError

BLOCK = 1024


@dataclass(frozen=True)
class StreamSamples:
    """Samples at positions of the stream, int64 [B] each: epoch, sample, and the number that keys the sample's noise in that epoch."""

    epoch: NDArray[np.int64]
    index: NDArray[np.int64]
    number: NDArray[np.int64]


class Order(ABC):
    """Order of the samples 0 .. num_samples - 1."""

    @abstractmethod
    def samples_at(self, seed: int, num_samples: int, positions: NDArray[np.int64]) -> StreamSamples:
        """Samples at these positions of the stream."""


@dataclass(frozen=True)
class Shuffled(Order):
    """Every sample once per epoch, in the order of a keyed permutation; memory O(1)."""

    def samples_at(self, seed: int, num_samples: int, positions: NDArray[np.int64]) -> StreamSamples:
        """Samples by the permutation of each epoch."""
        epoch, offset = np.divmod(positions, num_samples)
        index = by_epoch(seed, num_samples, epoch, offset)
        return StreamSamples(epoch, index, index)


@dataclass(frozen=True, eq=False)
class Weighted(Order):
    """Sample i in proportion to weights[i] >= 0; cumulative: their sums, float64 [N]."""

    cumulative: NDArray[np.float64]

    def samples_at(self, seed: int, num_samples: int, positions: NDArray[np.int64]) -> StreamSamples:
        """Samples by the resampling of each epoch. Raises ConfigError unless there is one weight per sample."""
        if num_samples != len(self.cumulative):
            raise ConfigError(f"sample weights must be one per sample, found {len(self.cumulative)} for {num_samples} samples")
        epoch, offset = np.divmod(positions, num_samples)
        number = by_epoch(seed, num_samples, epoch, offset)
        shift = np.empty(len(positions))
        for value in np.unique(epoch):
            shift[epoch == value] = float(draw(seed, int(value), 2**63, 0, (0, 0))[1])
        targets = (number + shift) / num_samples * self.cumulative[-1]
        index = np.searchsorted(self.cumulative, targets, side="right")
        return StreamSamples(epoch, np.minimum(index, self._last), number)

    @property
    def _last(self) -> int:
        """Last sample with a weight, for a target that rounding puts at the very end."""
        return int(np.searchsorted(self.cumulative, self.cumulative[-1], side="left"))


def weighted(weights: NDArray[np.float64]) -> Weighted:
    """Make the order of weights [N]. Raises ConfigError for a negative or non-finite one, or none above 0."""
    if len(weights) == 0 or not np.isfinite(weights).all() or (weights < 0).any() or not (weights > 0).any():
        raise ConfigError("sample weights must be finite, at least 0, and not all 0; correct the column or the episodes that they name")
    return Weighted(np.cumsum(weights, dtype=np.float64))


def by_epoch(seed: int, size: int, epoch: NDArray[np.int64], offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """Apply `permute` to offsets of several epochs; neighbours are looked up together."""
    index = np.empty_like(offset)
    block, inside = np.divmod(offset, BLOCK)
    keys = block + epoch * (size // BLOCK + 1)
    for key in np.unique(keys).tolist():
        here = keys == key
        index[here] = _block(seed, size, *divmod(key, size // BLOCK + 1))[inside[here]]
    return index


@lru_cache(maxsize=64)
def _block(seed: int, size: int, epoch: int, block: int) -> NDArray[np.int64]:
    """Apply `permute` to BLOCK neighbouring offsets: its numpy calls cost the same for one as for a thousand."""
    first = block * BLOCK
    found = permute(np.arange(first, min(first + BLOCK, size)), size, seed, epoch)
    found.flags.writeable = False
    return found


UNITS = 2**20  # weights are counted in millionths, so that shares are exact at any position


def deal(weights: Sequence[float], positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(data set, position in its stream) of each position of the mixture's stream.

    Of p positions the first data set takes floor(p w / W + 1/2); the others are dealt the rest likewise. Raises ConfigError for a weight
    below a millionth of those that it is dealt against.
    """
    which = np.zeros_like(positions)
    inner = positions.copy()
    undealt = np.ones(len(positions), dtype=bool)
    rest = positions.copy()  # positions among those that earlier data sets left
    for part in range(len(weights) - 1):
        units = round(UNITS * weights[part] / sum(weights[part:]))
        if not 0 < units < UNITS:
            raise ConfigError(f"weights of a mixture must be within a factor of a million, found {list(weights)}; bring them closer")
        taken, after = ((place * units + UNITS // 2) // UNITS for place in (rest, rest + 1))
        here = undealt & (after > taken)
        which[here], inner[here] = part, taken[here]
        undealt &= ~here
        rest = rest - taken
        which[undealt], inner[undealt] = part + 1, rest[undealt]
    return which, inner
