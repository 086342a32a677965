"""Order and noise as pure functions of (seed, epoch, sample, draw)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from pi0fm.data.order.counter import Slots, draw, draws, permute, slots, uniforms

SHAPE = (4, 5)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**31))
def test_one_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 4095, 4097, 100_003])
def test_permutation_at_the_edges_of_the_powers_of_two(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, 3, 5)), np.arange(size))


def test_a_place_does_not_depend_on_what_else_is_asked():
    whole = permute(np.arange(1000), 1000, 1, 2)
    assert [int(permute(np.array([offset]), 1000, 1, 2)[0]) for offset in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


def test_order_differs_by_epoch_and_by_seed_and_is_not_the_files():
    size = 2000
    orders = [permute(np.arange(size), size, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in (*orders, *(a[np.argsort(b)] for a, b in ((orders[0], orders[1]), (orders[0], orders[2])))):
        # A random permutation has one fixed point and half of its steps upwards, on average.
        assert (order == np.arange(size)).sum() < 8
        assert abs((np.diff(order) > 0).mean() - 0.5) < 0.05


def test_where_a_sample_lands_is_uniform():
    """Over many epochs each sample stands first equally often: chi-square with 15 degrees of freedom, 99.9 % below 37.7."""
    counts = np.bincount([int(permute(np.array([0]), 16, 0, epoch)[0]) for epoch in range(1600)], minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 37.7


@settings(max_examples=40, deadline=None)
@given(num_samples=st.integers(1, 40), first=st.integers(0, 200), count=st.integers(1, 60), cut=st.integers(0, 60))
def test_a_stretch_of_the_stream_is_the_sum_of_its_parts(num_samples, first, count, cut):
    cut = min(cut, count)
    whole = slots(5, num_samples, first, count)
    parts = [slots(5, num_samples, start, length) for start, length in ((first, cut), (first + cut, count - cut))]
    assert np.array_equal(whole.index, np.concatenate([part.index for part in parts]))
    assert np.array_equal(whole.epoch, np.arange(first, first + count) // num_samples)


def test_every_sample_once_an_epoch_across_a_boundary():
    at = slots(0, 10, 0, 30)
    for epoch in range(3):
        assert sorted(at.index[at.epoch == epoch]) == list(range(10))


def test_noise_is_standard_normal_and_uniform_is_uniform():
    at = slots(0, 500, 0, 1500)
    noise, uniform = draws(0, at, 0, SHAPE)
    assert noise.dtype == uniform.dtype == np.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.01
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    assert kstest(uniform, "uniform").pvalue > 0.01
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_noise_of_different_samples_epochs_draws_and_seeds_is_independent():
    base = (3, 0, 5, 0)
    others = [(4, 0, 5, 0), (3, 1, 5, 0), (3, 0, 6, 0), (3, 0, 5, 1)]
    shape = (40, 50)
    noise, uniform = draw(*base, shape)
    for other in others:
        found, other_uniform = draw(*other, shape)
        assert other_uniform != uniform
        assert not np.isin(found, noise).any() or np.isin(found, noise).sum() < 5  # float32 values may meet by chance
        assert abs(np.corrcoef(noise.ravel(), found.ravel())[0, 1]) < 0.08  # 3.5 standard errors


def test_the_noise_of_a_sample_does_not_depend_on_its_batch():
    at = slots(0, 20, 0, 20)
    noise, uniform = draws(9, at, 0, SHAPE)
    alone, alone_uniform = draws(9, Slots(at.epoch[7:8], at.index[7:8]), 0, SHAPE)
    assert np.array_equal(noise[7], alone[0])
    assert uniform[7] == alone_uniform[0]


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1, -1])
def test_any_seed_of_64_bits_works(seed):
    noise, uniform = draw(seed, 0, 0, 0, SHAPE)
    assert np.isfinite(noise).all()
    assert 0 <= uniform < 1
    assert not np.isin(draw(seed ^ 1, 0, 0, 0, SHAPE)[0], noise).any()  # its neighbour is another, though float64 cannot tell them apart
    orders = [permute(np.arange(100), 100, neighbour % 2**64, 0) for neighbour in (seed, seed ^ 1)]
    assert not np.array_equal(*orders)


def test_nothing_changes_between_versions():
    """A resumed run on another machine must see the same stream: recorded once, these values may not move."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == GOLDEN_ORDER
    assert slots(42, 100, 98, 4).index.tolist() == GOLDEN_SLOTS
    noise, uniform = draw(1, 2, 3, 4, (1, 3))
    np.testing.assert_allclose(noise[0], GOLDEN_NOISE, rtol=1e-6)
    np.testing.assert_allclose(uniform, GOLDEN_UNIFORM, rtol=1e-6)


GOLDEN_ORDER = [0, 9, 4, 2, 1, 5, 3, 8, 6, 7]
GOLDEN_SLOTS = [52, 87, 38, 11]
GOLDEN_NOISE = [-1.6613995, -0.54550534, 0.78499967]
GOLDEN_UNIFORM = 0.30753356


def test_draws_are_those_of_each_sample_bit_for_bit():
    """One generator that is set back stands for a fresh one a sample, whatever was drawn from it before."""
    at = Slots(np.array([0, 3, 3, 2**31]), np.array([5, 0, 5, 2**40]))
    noise, uniform = draws(2**63 + 1, at, 2, (3, 7))
    for row, (epoch, index) in enumerate(zip(at.epoch.tolist(), at.index.tolist(), strict=True)):
        alone, number = draw(2**63 + 1, epoch, index, 2, (3, 7))
        assert np.array_equal(noise[row], alone) and uniform[row] == number


def test_every_purpose_has_numbers_of_its_own():
    at = Slots(np.zeros(4, np.int64), np.arange(4))
    first, second = (uniforms(1, at, purpose, 5) for purpose in (3, 4))
    assert first.shape == (4, 5) and not np.isin(first, second).any()
    assert np.array_equal(uniforms(1, Slots(at.epoch[2:], at.index[2:]), 3, 5), first[2:])
    assert (first >= 0).all() and (first < 1).all()
