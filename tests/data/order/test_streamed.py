"""Tests of the order of a stream: every sample once per epoch, in windows, each worker in separate lanes."""

import numpy as np
import pytest

from pi0fm.data.order.orders import Shuffled
from pi0fm.data.order.streamed import StreamOrder, lanes_of

SEED, BATCH = 3, 24
ENDS = np.cumsum(np.random.default_rng(0).integers(5, 20, 40))
SAMPLES = int(ENDS[-1])


def fresh(lanes: int = 4, window: int = 30) -> StreamOrder:
    return StreamOrder(ENDS, BATCH, lanes, window)


def index(order: StreamOrder, first: int, count: int) -> np.ndarray:
    return order.samples_at(SEED, SAMPLES, np.arange(first, first + count)).index


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [7, 30, 10_000])
def test_every_sample_comes_once_an_epoch(lanes, window):
    order = fresh(lanes, window)
    for epoch in range(3):
        assert sorted(index(order, epoch * SAMPLES, SAMPLES)) == list(range(SAMPLES))
    assert not np.array_equal(index(order, 0, SAMPLES), index(order, SAMPLES, SAMPLES))


def test_a_position_means_the_same_whoever_asks_and_whenever():
    whole = index(fresh(), 0, 3 * SAMPLES)
    order = fresh()
    for first in np.random.default_rng(1).integers(0, 3 * SAMPLES - 50, 30).tolist():
        assert np.array_equal(index(order, first, 50), whole[first : first + 50])


def test_epochs_and_numbers_tell_draws_apart():
    places = fresh().samples_at(SEED, SAMPLES, np.arange(SAMPLES - 3, SAMPLES + 3))
    assert places.epoch.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(places.number, places.index)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_worker_reads_the_groups_of_its_own_lanes(world_size):
    """Two workers share no group but those that a cut between lanes, or between windows, goes through."""
    order, share = fresh(), BATCH // world_size
    groups = []
    for rank in range(world_size):
        mine = [index(order, step * BATCH + rank * share, share) for step in range(SAMPLES // BATCH)]
        groups.append(set(np.searchsorted(ENDS, np.concatenate(mine), side="right").tolist()))
    shared = sum(len(one) for one in groups) - len(set.union(*groups))
    assert shared <= world_size - 1


def test_a_window_of_memory_is_enough():
    """Of one lane, the groups that a window's samples need are the window's own and those that stick out of it."""
    order = fresh(lanes=1, window=60)
    shortest = int(np.diff(ENDS, prepend=0).min())
    for first in range(0, SAMPLES - 60, 60):
        needed = np.unique(np.searchsorted(ENDS, index(order, first, 60), side="right"))
        assert len(needed) <= 60 // shortest + 2


def test_neighbours_in_a_video_are_not_neighbours_in_the_stream():
    found = index(fresh(lanes=1, window=200), 0, SAMPLES)
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.05


def test_another_seed_is_another_order_and_other_samples_are_shuffled():
    order = fresh()
    assert not np.array_equal(order.samples_at(4, SAMPLES, np.arange(50)).index, index(order, 0, 50))
    held_out = order.samples_at(SEED, 17, np.arange(17)).index
    assert np.array_equal(held_out, Shuffled().samples_at(SEED, 17, np.arange(17)).index)


@pytest.mark.parametrize(("batch", "lanes"), [(32, 8), (24, 8), (6, 6), (7, 7), (13, 1), (1, 1)])
def test_lanes_share_a_batch_equally(batch, lanes):
    assert lanes_of(batch) == lanes
