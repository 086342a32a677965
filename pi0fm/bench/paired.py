"""Two pieces of work side by side: how many times longer the first takes.

Owns: the order of the runs, the ratio of neighbours, its interval. Does not know: what is run.

    round      0        1        2        3             the one that begins changes every round, so that neither always follows
    runs    first,   second,  first,   second,          a warm cache; a neighbour on the machine slows both of a round alike,
            second   first    second   first            and their ratio stays
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pi0fm_client.errors import ConfigError

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Time of the first by time of the second: the median over rounds, with its bootstrap interval.

    first_seconds, second_seconds: median of one run.
    """

    median: float
    low: float
    high: float
    first_seconds: float
    second_seconds: float


def paired_ratio(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    *,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    after: Callable[[], object] = lambda: None,
) -> Ratio:
    """Run both `rounds` times, interleaved in this process, after `warm_up` rounds that are not counted.

    after: called behind each of them, outside the clock; it removes what they leave.
    Raises ConfigError for less than one round.
    """
    if rounds < 1:
        raise ConfigError(f"a comparison needs 1 round or more, found {rounds}; try 30")
    for _ in range(warm_up):
        first()
        after()
        second()
        after()
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            then = _seconds(second, clock, after)
            pairs.append((_seconds(first, clock, after), then))
        else:
            before = _seconds(first, clock, after)
            pairs.append((before, _seconds(second, clock, after)))
    return ratio_of(pairs)


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """The ratio of paired seconds; its 95 % interval by the percentiles of resampled medians, from a fixed seed."""
    seconds = np.array(pairs, dtype=np.float64)
    ratios = seconds[:, 0] / seconds[:, 1]
    chosen = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    medians = np.median(seconds, axis=0)
    return Ratio(float(np.median(ratios)), float(low), float(high), float(medians[0]), float(medians[1]))


def _seconds(work: Callable[[], object], clock: Callable[[], float], after: Callable[[], object]) -> float:
    began = clock()
    work()
    seconds = clock() - began
    after()
    return seconds
