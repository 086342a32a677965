"""Tests of shares and micro batches: together the global batch, in order, of nearly equal size."""

import pytest

from pi0fm.data.order.split import micro_steps, split


@pytest.mark.parametrize("total", [1, 7, 8, 32])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("micro", [None, 2, 3, 100])
def test_every_sample_is_in_one_part(total, workers, micro):
    if total < workers:
        return
    parts = [split(total, rank, workers, micro) for rank in range(workers)]
    assert [sample for share in parts for start, count in share for sample in range(start, start + count)] == list(range(total))
    assert {len(share) for share in parts} == {micro_steps(total, workers, micro)}
    sizes = [count for share in parts for _, count in share]
    assert min(sizes) >= 1
    assert max(sizes) <= (micro or total)
    shares = [sum(count for _, count in share) for share in parts]
    assert max(shares) - min(shares) <= 1
    assert all(max(each) - min(each) <= 1 for each in ([count for _, count in share] for share in parts))


def test_equal_shares_are_cut_as_ever():
    assert split(8, 1, 2, 2) == ((4, 2), (6, 2))
    assert split(32, 2, 3) == ((21, 11),)
