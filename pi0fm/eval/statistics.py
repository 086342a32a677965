"""Intervals for success rates, and tests of two policies on the same start positions.

Owns: Wilson's interval, one for the mean over tasks, one for a paired difference; McNemar's exact test, one valid at any time.
Does not know: episodes.

                        second succeeds   second fails
    first succeeds      both              b                McNemar's test and the evidence need b and c only: pairs that agree
    first fails         c                 neither          say nothing about which of the two is better
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """Rate in [0, 1], or a difference of two, and its confidence interval."""

    rate: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Compute Wilson's score interval: the rates p with |k/n - p| <= z sqrt(p (1 - p) / n), E. B. Wilson, JASA 22 (1927).

    Raises ValueError unless 0 <= successes <= trials and trials >= 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and 1 <= trials, found {successes} of {trials}")
    return _score(successes / trials, trials, confidence)


def mean_over_tasks(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> Interval:
    """Compute the unweighted mean of the tasks' rates. The tasks are fixed (stratified): nothing is claimed about other tasks.

    counts: (successes, trials) of each of T tasks. The variance of the mean is sum p_i (1 - p_i) / n_i / T^2; it is replaced by
    m (1 - m) / n with the mean m and n = T^2 / sum 1 / n_i, and Wilson's inequality is solved for m. With equal trials that can only
    widen the interval, because p (1 - p) is concave; it is then Wilson's interval of all episodes together, and does not shrink to a
    point when every episode succeeds. Near 1 it covers better than the tasks' joined intervals (0.92 against 0.86 at worst for
    three tasks of 20 episodes with rates of 0.95 to 0.99).
    """
    if not counts:
        raise ValueError("expected one task or more, found none")
    each = [wilson(successes, trials, confidence) for successes, trials in counts]
    mean = math.fsum(interval.rate for interval in each) / len(each)
    trials = len(counts) ** 2 / math.fsum(1 / trials for _, trials in counts)
    return _score(mean, trials, confidence)


def paired_difference(b: int, c: int, pairs: int, confidence: float = 0.95) -> Interval:
    """Compute the first rate minus the second, with Bonett and Price's interval: Wald's with one more pair in b and in c.

    Statist. Med. 31 (2012), doi 10.1002/sim.4406. Raises ValueError unless 0 <= b, 0 <= c and 1 <= pairs >= b + c.
    """
    if min(b, c) < 0 or not 1 <= pairs >= b + c:
        raise ValueError(f"expected counts of at most 1 or more pairs in all, found {b} and {c} of {pairs}")
    first, second = (b + 1) / (pairs + 2), (c + 1) / (pairs + 2)
    half = _z(confidence) * math.sqrt((first + second - (first - second) ** 2) / (pairs + 2))
    return Interval((b - c) / pairs, max(-1.0, first - second - half), min(1.0, first - second + half))


def mcnemar(b: int, c: int) -> float:
    """Compute the exact two-sided p-value of b against c: P(|X - n/2| >= |b - n/2|), X ~ Bin(n, 1/2), n = b + c. McNemar (1947).

    Holds for a number of pairs that was fixed before the first of them.
    """
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


def log_evidence(b: int, c: int) -> float:
    """Compute the log of the likelihood ratio of a win rate that is uniform on [0, 1] to one of 1/2: 2^n b! c! / (n + 1)!, n = b + c.

    It may be computed after every pair: where the policies are equal, the ratio ever reaches 1 / alpha with probability alpha or less
    (Ville 1939), so exp(-max) over all moments is a valid p-value at any moment.
    """
    return (b + c) * math.log(2) + math.lgamma(b + 1) + math.lgamma(c + 1) - math.lgamma(b + c + 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's method (1979): the chance of any false one is then at most the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _score(rate: float, trials: float, confidence: float) -> Interval:
    """Compute (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z = _z(confidence)
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    # at rates of 0 and 1 the ends are 0 and 1 exactly, where the subtraction leaves 1e-17
    low = 0.0 if rate == 0 else max(0.0, centre - half)
    high = 1.0 if rate == 1 else min(1.0, centre + half)
    return Interval(rate, low, high)
