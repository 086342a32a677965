"""Shuffled order of samples in which video files can be read with a bounded window of memory.

Owns: groups, lanes and windows, as pure functions of (seed, position). Does not know: pictures, decoding, how many workers there are.

    epoch    groups (runs of neighbouring frames) in the order of a keyed permutation, end to end:   g7 g2 g9 g0 g4 g1 ...
    lanes    that row is cut into equal stretches, one per lane; lane l fills the l-th part of every global batch
             lane 0 |  g7 g2 g9 ..  |   lane 1 |  g0 g4 ..  |   lane 2 | g1 ...
    windows  a lane is read a window at a time, and the samples of a window come in the order of another permutation
             |  g7 g2 g9 shuffled together  |  g3 g5 g8 shuffled together  | ..

A worker takes a contiguous part of every global batch, so it reads only the lanes of its part: nothing is decoded twice, and the
order is the same for any number of workers. Every sample comes once per epoch. Shape letters: B samples asked for, n groups.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.order.counter import permute
from pi0fm.data.order.orders import Order, Shuffled, StreamSamples

MOST_LANES = 8
_TABLES_KEPT, _WINDOWS_KEPT = 4, 4 * MOST_LANES
# keys that no epoch of `Shuffled` uses
_GROUPS, _WINDOWS = 2**61, 2**62


@dataclass(frozen=True)
class _Epoch:
    """Groups in the order of one epoch. starts: int64 [n + 1], where each begins in the row; cuts: int64 [lanes + 1], lanes' bounds."""

    groups: NDArray[np.int64]
    starts: NDArray[np.int64]
    cuts: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StreamOrder(Order):
    """Order by groups, lanes and windows. ends: int64 [n], the sample after each group; window: samples of a lane shuffled together.

    Any other set of samples, such as the held-out episodes, is ordered by `Shuffled`.
    """

    ends: NDArray[np.int64]
    global_batch_size: int
    lanes: int
    window: int
    _epochs: dict[tuple[int, int], _Epoch] = field(init=False, default_factory=dict, repr=False)
    _windows: dict[tuple[int, int, int, int], NDArray[np.int64]] = field(init=False, default_factory=dict, repr=False)

    def samples_at(self, seed: int, num_samples: int, positions: NDArray[np.int64]) -> StreamSamples:
        """Samples by epoch, lane and window."""
        if num_samples != self.ends[-1]:
            return Shuffled().samples_at(seed, num_samples, positions)
        epoch = positions // num_samples
        lane = positions % self.global_batch_size * self.lanes // self.global_batch_size
        number = self._before(lane, positions) - self._before(lane, epoch * num_samples)
        window, inside = np.divmod(number, self.window)
        index = np.empty_like(positions)
        windows = num_samples // self.window + 1
        keys = (epoch * self.lanes + lane) * windows + window
        for key in np.unique(keys).tolist():
            here = keys == key
            part, which = divmod(key, windows)
            index[here] = self._samples(seed, part // self.lanes, part % self.lanes, which)[inside[here]]
        return StreamSamples(epoch, index, index)

    def _before(self, lane: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of positions before `position` that belong to the lane."""
        part = self.global_batch_size // self.lanes
        batches, rest = np.divmod(position, self.global_batch_size)
        return batches * part + np.clip(rest - lane * part, 0, part)

    def _samples(self, seed: int, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        """Samples of one window, in order."""
        key = (seed, epoch, lane, window)
        known = self._windows.get(key)
        if known is None:
            row = self._epoch(seed, epoch)
            first = int(row.cuts[lane]) + window * self.window
            size = min(self.window, int(row.cuts[lane + 1]) - first)
            keyed = _WINDOWS + (epoch * self.lanes + lane) * (int(self.ends[-1]) // self.window + 2) + window
            bits = np.random.Philox(key=np.array([seed & 0xFFFFFFFFFFFFFFFF, keyed], dtype=np.uint64)).random_raw(size)
            places = first + np.argsort(bits, kind="stable")  # the window is in memory anyway, and sorting beats `permute` there
            which = np.searchsorted(row.starts, places, side="right") - 1
            groups = row.groups[which]
            known = np.where(groups > 0, self.ends[groups - 1], 0) + places - row.starts[which]
            _keep(self._windows, key, known, _WINDOWS_KEPT)
        return known

    def _epoch(self, seed: int, epoch: int) -> _Epoch:
        known = self._epochs.get((seed, epoch))
        if known is None:
            count = len(self.ends)
            groups = permute(np.arange(count), count, seed, _GROUPS + epoch)
            sizes = np.diff(self.ends, prepend=0)[groups]
            bounds = np.array([epoch, epoch + 1]) * self.ends[-1]
            shares = [int(np.diff(self._before(np.array(lane), bounds))[0]) for lane in range(self.lanes)]
            known = _Epoch(groups, np.cumsum([0, *sizes]), np.cumsum([0, *shares]))
            _keep(self._epochs, (seed, epoch), known, _TABLES_KEPT)
        return known


def lanes_of(global_batch_size: int) -> int:
    """Largest number of lanes, up to MOST_LANES, that share a global batch equally."""
    return max(lanes for lanes in range(1, MOST_LANES + 1) if global_batch_size % lanes == 0)


def _keep[K, V](table: dict[K, V], key: K, value: V, most: int) -> None:
    while len(table) >= most:
        table.pop(list(table)[0], None)  # noqa: RUF015  (an iterator would fail when another thread adds an entry)
    table[key] = value
