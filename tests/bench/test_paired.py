"""Ratios of paired runs, by a clock that the work itself turns."""

import numpy as np
import pytest

from pi0fm.bench.paired import paired_ratio, ratio_of
from pi0fm_client.errors import ConfigError


class Stopwatch:
    """Time passes only when something works; `slow(k)` is how a neighbour slows the k-th round."""

    def __init__(self, slow=lambda round_: 1.0):
        self.now, self.slow, self.order, self.runs = 0.0, slow, "", 0

    def work(self, name, seconds):
        def run():
            self.now += seconds * self.slow(self.runs // 2)
            self.runs += 1
            self.order += name

        return run

    def __call__(self):
        return self.now


def test_a_neighbour_that_slows_a_round_leaves_its_ratio():
    watch = Stopwatch(slow=lambda round_: 1 + 9 * (round_ % 3 == 0))
    found = paired_ratio(watch.work("a", 3.0), watch.work("b", 2.0), 9, clock=watch)
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.first_seconds == pytest.approx(1.5 * found.second_seconds)


def test_the_one_that_begins_changes_every_round():
    watch = Stopwatch()
    paired_ratio(watch.work("a", 1.0), watch.work("b", 1.0), 4, warm_up=1, clock=watch)
    assert watch.order == "ab" + "abbaabba"


def test_the_interval_holds_the_median_and_shrinks_with_rounds():
    random = np.random.default_rng(2)

    def pairs(num):
        return [(2 * float(x), 1.0) for x in random.lognormal(0, 0.3, num)]

    few, many = ratio_of(pairs(10)), ratio_of(pairs(1000))
    assert few.low < few.median < few.high
    assert many.low < 2 < many.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    assert ratio_of([(3.0, 2.0)]) == ratio_of([(3.0, 2.0)] * 5)


def test_no_round_is_refused():
    with pytest.raises(ConfigError, match="1 round or more, found 0"):
        paired_ratio(lambda: None, lambda: None, 0)


def test_what_is_left_behind_is_removed_outside_the_clock():
    clock, removed = [0.0], []

    def spend(seconds):
        clock[0] += seconds

    def after():
        removed.append(clock[0])
        spend(100)

    found = paired_ratio(lambda: spend(3), lambda: spend(1), 3, warm_up=1, clock=lambda: clock[0], after=after)
    assert (found.median, found.first_seconds, found.second_seconds) == (3.0, 3.0, 1.0)
    assert len(removed) == 8
