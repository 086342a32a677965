"""Tests of paired statistics: McNemar against scipy, exact coverage of the difference's interval and of the sequential test."""

import functools
import math

import pytest
from scipy.stats import binomtest, false_discovery_control, multinomial

from pi0fm.eval.compare import settle
from pi0fm.eval.statistics import holm, log_evidence, mcnemar, paired_difference


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (1, 9), (17, 4), (0, 30), (600, 700)])
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_disagree(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_in_closed_form():
    assert mcnemar(0, 6) == 2 / 2**6
    assert mcnemar(1, 7) == 2 * (1 + 8) / 2**8


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (2, 7), (40, 40)])
def test_the_evidence_is_the_integral_of_the_likelihood_ratio(b, c):
    """Over a win rate that is uniform on [0, 1], by the midpoint rule."""
    steps = 20_000
    rates = ((k + 0.5) / steps for k in range(steps))
    integral = math.fsum(rate**b * (1 - rate) ** c for rate in rates) / steps * 2 ** (b + c)
    assert log_evidence(b, c) == pytest.approx(math.log(integral), abs=1e-6)


def test_policies_that_are_equal_are_rarely_told_apart_however_often_one_looks():
    """Exactly, over every sequence of 400 pairs that disagree: the chance that the ratio ever reaches 20 is below 1/20."""

    @functools.cache
    def crosses(wins: int, losses: int) -> bool:
        return log_evidence(wins, losses) >= math.log(20)

    alive, crossed = {0: 1.0}, 0.0
    for count in range(1, 401):
        reached: dict[int, float] = {}
        for wins, chance in alive.items():
            for more in (wins, wins + 1):
                if crosses(more, count - more):
                    crossed += chance / 2
                else:
                    reached[more] = reached.get(more, 0.0) + chance / 2
        alive = reached
    assert 0.01 < crossed < 0.05
    assert crossed + sum(alive.values()) == pytest.approx(1)


@pytest.mark.parametrize(("first", "second"), [(0.1, 0.1), (0.25, 0.05), (0.0, 0.2), (0.02, 0.01)])
def test_the_interval_of_the_difference_covers(first, second):
    """Over every outcome of 40 pairs; first, second: chances that one alone succeeds."""
    pairs, covered = 40, 0.0
    law = multinomial(pairs, [first, second, 1 - first - second])
    for b in range(pairs + 1):
        for c in range(pairs + 1 - b):
            chance = float(law.pmf([b, c, pairs - b - c]))
            if chance > 1e-9:
                found = paired_difference(b, c, pairs)
                assert found.low <= found.rate <= found.high
                covered += chance * (found.low <= first - second <= found.high)
    assert covered >= 0.93


@pytest.mark.parametrize("counts", [(-1, 0, 3), (2, 2, 3), (0, 0, 0)])
def test_counts_that_cannot_be(counts):
    with pytest.raises(ValueError, match="expected counts"):
        paired_difference(*counts)


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    values = [0.004, 0.2, 0.03, 0.011]
    assert all(ours >= theirs for ours, theirs in zip(holm(values), false_discovery_control(values), strict=True))


def test_a_difference_is_settled_at_the_first_pair_that_settles_it():
    p, after, more = settle(range(0, 20, 2), [], 20)
    first = next(n for n in range(1, 11) if log_evidence(n, 0) >= math.log(20))
    assert (after, more) == (2 * first - 1, None)
    assert p == pytest.approx(math.exp(-log_evidence(10, 0)))


def test_what_is_missing_is_counted_at_the_shares_that_were_found():
    p, after, more = settle([0, 1, 2, 3], [4], 50)
    assert after is None and p > 0.05
    assert log_evidence((50 + more) * 4 // 50, (50 + more) // 50) >= math.log(20)
    assert settle([0], [1], 50) == (pytest.approx(1), None, None)
