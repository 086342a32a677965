"""Evaluations of one recipe: a learning curve over training steps, and intervals over training seeds.

Owns: which evaluations belong together, the figures over seeds. Does not know: folders, pages.

    recipe    a bundle's description of its training, except steps, seed and identity
    point     the evaluations of a recipe at one number of steps, one per training seed
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pi0fm.eval.statistics import Interval

VARIES = ("steps", "seed", "identity")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t of 0.975 at 1 to 9 degrees of freedom
NORMAL = 1.96


@dataclass(frozen=True)
class TrainedPolicy:
    """Evaluation by its name, with its bundle's description of the training and its mean over tasks."""

    name: str
    facts: Mapping[str, str]
    mean: Interval | None


@dataclass(frozen=True)
class CurvePoint:
    """Point of a learning curve. interval: for one seed Wilson's over its episodes; for several Student's over their means."""

    steps: int
    seeds: tuple[str, ...]
    rates: tuple[float, ...]
    interval: Interval

    def json(self) -> dict[str, Any]:
        """Return the figures of compare.json."""
        ends = [round(end, 6) for end in (self.interval.low, self.interval.high)]
        return {
            "steps": self.steps,
            "seeds": list(self.seeds),
            "rates": list(self.rates),
            "mean": round(self.interval.rate, 6),
            "interval": ends,
        }


@dataclass(frozen=True)
class Recipe:
    """Recipe with two or more evaluations; points by steps."""

    name: str
    points: tuple[CurvePoint, ...]


def recipes(evaluations: Sequence[TrainedPolicy]) -> list[Recipe]:
    """Group evaluations whose policies differ in VARIES only; single ones are left out."""
    groups: dict[tuple[tuple[str, str], ...], list[TrainedPolicy]] = {}
    for each in evaluations:
        if each.mean is not None and each.facts.get("steps", "").isdigit():
            key = tuple(sorted((name, value) for name, value in each.facts.items() if name not in VARIES))
            groups.setdefault(key, []).append(each)
    return [Recipe(group[0].name, _points(group)) for group in groups.values() if len(group) > 1]


def _points(group: Sequence[TrainedPolicy]) -> tuple[CurvePoint, ...]:
    found = []
    for steps in sorted({int(each.facts["steps"]) for each in group}):
        same_steps = [each for each in group if int(each.facts["steps"]) == steps]
        means = [each.mean for each in same_steps if each.mean is not None]
        rates = tuple(mean.rate for mean in means)
        seeds = tuple(each.facts.get("seed", "unknown") for each in same_steps)
        found.append(CurvePoint(steps, seeds, rates, over_seeds(rates) if len(set(seeds)) == len(seeds) > 1 else _envelope(means)))
    return tuple(found)


def over_seeds(rates: Sequence[float]) -> Interval:
    """Average two or more seeds' rates, with Student's 95 % interval within [0, 1]."""
    mean, count = statistics.fmean(rates), len(rates)
    half = (STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL) * statistics.stdev(rates) / math.sqrt(count)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _envelope(means: Sequence[Interval]) -> Interval:
    """Join evaluations of one policy, such as with other flow steps: the mean, and the outermost ends."""
    return Interval(statistics.fmean(each.rate for each in means), min(each.low for each in means), max(each.high for each in means))
