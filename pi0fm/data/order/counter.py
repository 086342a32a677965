"""Order of samples and their random numbers: pure functions of (seed, epoch, sample index, draw).

Owns: the keyed permutation, the stream of global batches, the counter-based noise. Does not know: what a sample holds, how many
workers there are beyond the slice it is asked for. Nothing here has state, so nothing is lost at a restart.

    position in the stream:   0 ........ N-1 | N ........ 2N-1 | ...          one epoch is one permutation of 0..N-1
    step s takes positions    s G .. s G + G - 1                              G = global batch; a batch may span two epochs
    rank r of W takes         s G + r G/W .. s G + (r+1) G/W - 1              so the union over ranks is the same for every W

Shape letters: B samples asked for, H horizon, A action dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Slots:
    """Slots of the stream: epoch and sample, int64 [B] each."""

    epoch: NDArray[np.int64]
    index: NDArray[np.int64]


def slots(seed: int, num_samples: int, first: int, count: int) -> Slots:
    """Samples at stream positions first .. first + count - 1 of a data set with num_samples."""
    positions = np.arange(first, first + count, dtype=np.int64)
    epoch, offset = np.divmod(positions, num_samples)
    index = np.empty_like(offset)
    for value in np.unique(epoch):
        here = epoch == value
        index[here] = permute(offset[here], num_samples, seed, int(value))
    return Slots(epoch, index)


def permute(offsets: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of 0..size-1 keyed by (seed, epoch), evaluated at `offsets` with O(1) memory.

    A balanced Feistel network on the next even power of two, walked until the image falls below `size` (format-preserving
    encryption's cycle walking, Black and Rogaway 2002).
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _philox(seed, epoch, (0, 0, 0, 1)).random_raw(ROUNDS)
    values = offsets.astype(np.uint64)
    pending: NDArray[np.bool_] = np.ones(len(values), dtype=bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[pending] = (left << half) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


def draw(seed: int, epoch: int, index: int, number: int, shape: tuple[int, int]) -> tuple[NDArray[np.float32], np.float32]:
    """Draw `number` of one sample in one epoch: noise [H, A] ~ N(0, I), and a uniform number in [0, 1) for its flow time."""
    generator = np.random.Generator(_philox(seed, epoch, (0, index, number, 2)))
    return generator.standard_normal(shape, dtype=np.float32), np.float32(generator.random(dtype=np.float32))


def draws(seed: int, at: Slots, number: int, shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`draw` for every slot: noise [B, H, A] and uniform [B]."""
    noise = np.empty((len(at.index), *shape), dtype=np.float32)
    uniform = np.empty(len(at.index), dtype=np.float32)
    for row, generator in enumerate(_generators(seed, at, number, 2)):
        generator.standard_normal(dtype=np.float32, out=noise[row])
        uniform[row] = generator.random(dtype=np.float32)
    return noise, uniform


def uniforms(seed: int, at: Slots, purpose: int, count: int) -> NDArray[np.float32]:
    """float32 [B, count] in [0, 1) for every slot. purpose: 3 or more, one random stream per use; 1 is the order, 2 the noise."""
    return np.stack([generator.random(count, dtype=np.float32) for generator in _generators(seed, at, 0, purpose)])


def _generators(seed: int, at: Slots, number: int, purpose: int) -> Iterator[np.random.Generator]:
    """Yield the `_philox` generator of each slot: one object, reset each time, since making one reads entropy from the system."""
    bits = _philox(seed, 0, (0, 0, 0, 0))
    generator, state = np.random.Generator(bits), bits.state
    for epoch, index in zip(at.epoch.tolist(), at.index.tolist(), strict=True):
        state["state"]["key"][1] = epoch
        state["state"]["counter"][:] = (0, index, number, purpose)
        bits.state = state
        yield generator


def _philox(seed: int, epoch: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    # from a list numpy would turn a key of 2^63 or more into float64, where neighbouring seeds are equal
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit changes every output bit half of the time."""
    values = values + _MIX
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
