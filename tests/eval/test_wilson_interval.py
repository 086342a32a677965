"""Wilson against scipy; the interval of the mean against scipy and its exact coverage."""

import itertools
import math

import pytest
from scipy.stats import binom, binomtest

from pi0fm.eval.statistics import mean_over_tasks, wilson


@pytest.mark.parametrize("trials", [1, 2, 7, 20, 500])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_equals_scipy(trials, confidence):
    for successes in range(0, trials + 1, max(1, trials // 7)):
        ours = wilson(successes, trials, confidence)
        theirs = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        assert ours.rate == successes / trials
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_touches_the_ends_and_refuses_nonsense():
    assert wilson(0, 9).low == 0.0
    assert wilson(9, 9).high == 1.0
    for successes, trials in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="0 <= successes <= trials"):
            wilson(successes, trials)


def test_the_mean_of_tasks_with_equal_trials_is_wilsons_of_all_episodes():
    ours = mean_over_tasks([(17, 20), (20, 20), (3, 20)])
    theirs = binomtest(40, 60).proportion_ci(0.95, method="wilson")
    assert (ours.rate, ours.low, ours.high) == pytest.approx((40 / 60, theirs.low, theirs.high), abs=1e-12)
    assert mean_over_tasks([(17, 20)]) == wilson(17, 20)
    assert mean_over_tasks([(20, 20)] * 3).high == 1.0


def test_the_mean_weighs_tasks_not_episodes():
    half = mean_over_tasks([(10, 10), (0, 1000)])
    assert half.rate == 0.5
    # 2^2 / (1/10 + 1/1000) = 39.6 trials: the small task decides.
    assert half.high - half.low == pytest.approx(2 * (0.5 - wilson(20, 40).low), rel=0.01)
    with pytest.raises(ValueError, match="one task or more"):
        mean_over_tasks([])


@pytest.mark.parametrize("rates", [(0.95, 0.98, 0.99), (0.5, 0.8, 0.2), (0.85, 0.95, 0.95)])
def test_the_interval_of_the_mean_covers(rates):
    trials = 12
    truth = sum(rates) / len(rates)
    chances = [binom.pmf(range(trials + 1), trials, rate) for rate in rates]
    covered = 0.0
    for counts in itertools.product(range(trials + 1), repeat=len(rates)):
        chance = math.prod(float(column[count]) for count, column in zip(counts, chances, strict=True))
        if chance > 1e-9:
            interval = mean_over_tasks([(count, trials) for count in counts])
            covered += chance * (interval.low <= truth <= interval.high)
    assert covered >= 0.92
