"""Orders as pure functions: the permutation of an epoch, and sampling by weights."""

import numpy as np
import pytest

from pi0fm.data.order.counter import slots
from pi0fm.data.order.orders import Shuffled, weighted
from pi0fm_client.errors import ConfigError

SAMPLES, SEED = 50, 11


def test_shuffled_is_the_sampler_s_order():
    at = slots(SEED, SAMPLES, 40, 30)
    places = Shuffled().samples_at(SEED, SAMPLES, np.arange(40, 70))
    assert np.array_equal(places.epoch, at.epoch) and np.array_equal(places.index, at.index) and np.array_equal(places.number, at.index)


def test_positions_may_come_in_any_order():
    positions = np.array([99, 3, 51, 3])
    places = Shuffled().samples_at(SEED, SAMPLES, positions)
    assert places.index.tolist() == [int(slots(SEED, SAMPLES, first, 1).index[0]) for first in positions.tolist()]


def test_each_sample_comes_in_proportion_to_its_weight_in_every_epoch():
    weights = np.random.default_rng(0).random(SAMPLES) * (np.arange(SAMPLES) % 3 > 0)
    order = weighted(weights)
    expected = SAMPLES * weights / weights.sum()
    total = np.zeros(SAMPLES)
    for epoch in range(40):
        counts = np.bincount(order.samples_at(SEED, SAMPLES, epoch * SAMPLES + np.arange(SAMPLES)).index, minlength=SAMPLES)
        assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
        total += counts
    np.testing.assert_allclose(total / 40, expected, atol=0.25)


def test_equal_weights_give_every_sample_once():
    places = weighted(np.full(SAMPLES, 0.3)).samples_at(SEED, SAMPLES, np.arange(SAMPLES))
    assert sorted(places.index) == list(range(SAMPLES))


def test_a_sample_that_comes_twice_has_two_numbers():
    places = weighted(np.array([5.0, 1.0, 0.0])).samples_at(SEED, 3, np.arange(3))
    assert (places.index == 0).sum() >= 2
    assert len(set(places.number.tolist())) == 3


def test_a_sample_without_weight_never_comes():
    places = weighted(np.array([1.0, 0.0, 1.0, 0.0])).samples_at(SEED, 4, np.arange(400))
    assert set(places.index.tolist()) == {0, 2}


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [np.nan, 1.0], [np.inf]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ConfigError, match="sample weights must be finite"):
        weighted(np.array(weights, dtype=np.float64))


def test_as_many_weights_as_samples():
    with pytest.raises(ConfigError, match="found 3 for 4 samples"):
        weighted(np.ones(3)).samples_at(SEED, 4, np.arange(2))
