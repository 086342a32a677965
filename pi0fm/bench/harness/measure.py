"""Common parts of all measurements: options, alternating runs, their ratio, the report.

Owns: common options and their checks, paired runs with the interval of their ratio, `BenchReport`. Does not know: torch, the work that
runs, how a report is shown (cli/bench).

    round      0        1        2        3             the first side changes every round, so that neither always finds a warm
    runs    first,   second,  first,   second,          cache; another program slows both runs of a round equally, which leaves
            second   first    second   first            their ratio unchanged
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi0fm.options import nearest, option
from pi0fm_client.errors import ConfigError

RESAMPLES, CONFIDENCE = 4000, 0.95


def check_least(config: object, **least: int) -> None:
    """Raise ConfigError for an option of `config` below its least value; None is accepted."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ConfigError(f"{name} must be {smallest} or more, found {value}; type --{name} {smallest} or leave it out")


def check_words(name: str, words: Sequence[str], known: Iterable[str]) -> None:
    """Raise ConfigError for an empty list, a repeated word or an unknown one."""
    known = tuple(known)
    if not words or len(set(words)) != len(words):
        raise ConfigError(f"{name} must name one or more, each once, found {', '.join(words) or 'none'}; type --{name} {known[0]}")
    for word in words:
        if word not in known:
            raise ConfigError(f"unknown word in {name}, {word!r}: {nearest(word, known)}")


@dataclass(frozen=True)
class PairedOptions:
    """Options of a measurement with alternating sides. Raises ConfigError for a value out of range."""

    rounds: int = option(20, "runs of both sides of each comparison")
    threads: int = option(1, "torch's CPU threads, of both sides")
    output_dir: Path | None = option(None, "folder of the result's JSON; nothing is written when not given")

    def __post_init__(self) -> None:
        check_least(self, rounds=1, threads=1)


@dataclass(frozen=True)
class BenchReport:
    """Result of a measurement. figures: the last line; shown: contents of the tables, all figures if None; background: only in the file."""

    figures: Mapping[str, Any]
    shown: Mapping[str, Any] | None = None
    background: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PairedRatio:
    """Ratio of the first side's time to the second's: median over rounds, bootstrap interval, and each side's median seconds per run."""

    median: float
    interval: tuple[float, float]
    first_seconds: float
    second_seconds: float

    def per_piece(self, first: float, second: float) -> "PairedRatio":
        """Ratio per piece where a run is `first` pieces of work on one side and `second` on the other; seconds become those of a piece."""
        times, (low, high) = second / first, self.interval
        return PairedRatio(times * self.median, (times * low, times * high), self.first_seconds / first, self.second_seconds / second)

    def json(self) -> dict[str, Any]:
        """Median and interval."""
        return {"ratio": self.median, "interval": self.interval}


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run of `work`."""
    began = clock()
    work()
    return clock() - began


def paired_ratio(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    *,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    after: Callable[[], object] = lambda: None,
) -> PairedRatio:
    """Run both sides `rounds` times, alternating in this process, after `warm_up` rounds that do not count.

    after: called after each run, not timed, to remove the run's files. Raises ConfigError for less than one round.
    """
    if rounds < 1:
        raise ConfigError(f"a comparison needs 1 round or more, found {rounds}; try 30")
    pairs = []
    for number in range(-warm_up, rounds):
        found = [0.0, 0.0]
        for side, work in sorted(enumerate((first, second)), reverse=bool(number % 2)):
            found[side] = seconds_of(work, clock)
            after()
        pairs.append((found[0], found[1]))
    return ratio_of(pairs[warm_up:])


def ratio_of(pairs: Sequence[tuple[float, float]]) -> PairedRatio:
    """Median ratio of paired seconds, and its 95 % interval by percentiles of resampled medians, from a fixed seed."""
    seconds = np.array(pairs, dtype=np.float64)
    ratios = seconds[:, 0] / seconds[:, 1]
    chosen = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairedRatio(float(np.median(ratios)), (float(low), float(high)), *(float(each) for each in np.median(seconds, axis=0)))
