"""Comparison of evaluations on the same start positions: success by task, paired tests, whether a difference is settled.

Owns: reading their folders, the pairs, the statements. Does not know: how episodes ran, the page (report/compare).

    A/episodes.json   (task, seed) -> outcome   --.
    B/episodes.json   (task, seed) -> outcome   --+-- pairs in the order of seeds, without crashes --> b, c --> p, interval, settled?
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from pi0fm.eval.recipes import Recipe, TrainedPolicy, recipes
from pi0fm.eval.report.page import JOURNAL
from pi0fm.eval.rollouts.episode import Outcome
from pi0fm.eval.statistics import Interval, holm, log_evidence, mcnemar, mean_over_tasks, paired_difference, wilson
from pi0fm.files import missing
from pi0fm.options import option, required
from pi0fm_client.errors import ConfigError

LEVEL = 0.05
MOST_PAIRS = 100_000
POLICY_SETTINGS = ("flow steps", "solver", "execution horizon", "scores")  # a comparison may be about them

OUTCOMES = get_args(Outcome)


@dataclass(frozen=True)
class CompareConfig:
    """Options of `pi0fm compare`."""

    baseline: Path = required("folder of the evaluation (pi0fm eval --output_dir) to compare the others with")
    others: tuple[Path, ...] = option((), "folders of one or more evaluations of the same tasks and seeds")
    output_dir: Path = option(Path("outputs/compare"), "folder for compare.html and compare.json; an earlier comparison there is replaced")

    def __post_init__(self) -> None:
        folders = [folder.resolve() for folder in (self.baseline, *self.others)]
        if len(folders) < 2:
            raise ConfigError(f"a comparison needs two evaluations or more, found {self.baseline}; type pi0fm compare A B")
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        if twice is not None:
            raise ConfigError(f"an evaluation can be compared with another one only, found {twice} twice; leave one out")


@dataclass(frozen=True)
class EndedEvaluation:
    """Evaluation that has ended. outcomes: by (task, seed). settings, policy: of summary.json. videos: files by (task, seed)."""

    name: str
    outcomes: Mapping[tuple[str, int], str]
    settings: Mapping[str, str]
    policy: Mapping[str, str] = field(default_factory=dict)
    videos: Mapping[tuple[str, int], Path] = field(default_factory=dict)

    def interval(self, task: str) -> Interval | None:
        """Return the success rate of one task; None where every episode crashed."""
        successes, trials = self._counts(task)
        return wilson(successes, trials) if trials else None

    def mean(self, tasks: Sequence[str]) -> Interval | None:
        """Return the mean over tasks; None where every episode of a task crashed."""
        counts = [self._counts(task) for task in tasks]
        return mean_over_tasks(counts) if all(trials for _, trials in counts) else None

    def _counts(self, task: str) -> tuple[int, int]:
        ended = [outcome for (other, _), outcome in self.outcomes.items() if other == task and outcome != "crash"]
        return ended.count("success"), len(ended)


@dataclass(frozen=True)
class PairedComparison:
    """Evaluation against the baseline, over the episodes that crashed in neither.

    difference: success of this one minus the baseline's. p: McNemar's, p_holm: adjusted for the number of comparisons.
    p_any_time: valid for any number of earlier comparisons. settled_after: pairs after which it fell to LEVEL, or None.
    more_pairs: further pairs that this would need at the shares found so far, or None.
    """

    name: str
    pairs: int
    both: int
    neither: int
    only_baseline: int
    only_this: int
    difference: Interval
    p: float
    p_holm: float
    p_any_time: float
    settled_after: int | None
    more_pairs: int | None

    @property
    def statement(self) -> str:
        """State the result in a sentence."""
        better = "better" if self.only_this > self.only_baseline else "worse"
        if self.settled_after is not None:
            return f"{self.name} is {better}: settled after {self.settled_after} of {self.pairs} pairs, whenever one looks"
        if self.more_pairs is None:
            return f"{self.name}: no difference to settle, {self.only_this} against {self.only_baseline} pairs that disagree"
        return f"{self.name} looks {better}, not settled: about {self.more_pairs} more pairs, if the shares stay as they are"


@dataclass(frozen=True)
class ComparedEvaluations:
    """All evaluations, the baseline first, and the others compared with it. warnings: settings that differ, unpaired episodes."""

    evaluations: tuple[EndedEvaluation, ...]
    tasks: tuple[str, ...]
    paired: tuple[PairedComparison, ...]
    warnings: tuple[str, ...]
    recipes: tuple[Recipe, ...] = ()

    def filmed(self) -> list[tuple[str, int]]:
        """Episodes that two or more evaluations filmed, those with different outcomes first."""
        counts = Counter(key for each in self.evaluations for key in each.videos)
        shared = [key for key, count in counts.items() if count > 1]
        return sorted(shared, key=lambda key: (len({each.outcomes.get(key) for each in self.evaluations}) == 1, key))

    def json(self) -> dict[str, Any]:
        """Return the figures of compare.json and of the command's last line."""
        evaluations = {
            each.name: {
                "mean": _plain(each.mean(self.tasks)),
                "success": {task: _plain(each.interval(task)) for task in self.tasks},
            }
            for each in self.evaluations
        }
        paired = [asdict(each) | {"statement": each.statement} for each in self.paired]
        told = {"baseline": self.evaluations[0].name, "evaluations": evaluations, "paired": paired, "warnings": list(self.warnings)}
        return told | {"recipes": {each.name: [point.json() for point in each.points] for each in self.recipes}}


def compare(config: CompareConfig) -> ComparedEvaluations:
    """Compare evaluations. Raises ConfigError for a folder without a complete evaluation, and for evaluations without a common episode."""
    folders = (config.baseline, *config.others)
    short = len({folder.resolve().name for folder in folders}) == len(folders)
    first, *others = evaluations = [read(folder, folder.resolve().name if short else str(folder)) for folder in folders]
    tasks = tuple(dict.fromkeys(task for each in evaluations for task, _ in each.outcomes))
    found = [pair(first, each) for each in others]
    adjusted = holm([mcnemar(len(b), len(c)) for _, b, c in found])
    warnings = [line for each, (pairs, _, _) in zip(others, found, strict=True) for line in _warnings(first, each, len(pairs))]
    paired = [_paired(each, *parts, p_holm) for each, parts, p_holm in zip(others, found, adjusted, strict=True)]
    trained = [TrainedPolicy(each.name, each.policy, each.mean(tasks)) for each in evaluations]
    return ComparedEvaluations(tuple(evaluations), tasks, tuple(paired), tuple(warnings), tuple(recipes(trained)))


def read(folder: Path, name: str) -> EndedEvaluation:
    """Read the evaluation in `folder`. Raises ConfigError where there is none, one that has not ended, or one of recorded episodes."""
    if not (folder / "episodes.json").is_file():
        remedy = "name the --output_dir of pi0fm eval"
        if (folder / JOURNAL).is_file():
            remedy = "it has not ended: type its command again"
        elif (folder / "summary.json").is_file():
            remedy = "that is an evaluation on recorded episodes or in real time, which have other figures: name one in simulation"
        elif not folder.exists():
            remedy = missing(folder)
        raise ConfigError(f"an evaluation holds episodes.json, found none in {folder}; {remedy}")
    try:
        rows = json.loads((folder / "episodes.json").read_text())
        outcomes: dict[tuple[str, int], str] = {}
        videos: dict[tuple[str, int], Path] = {}
        for row in rows:
            key = str(row["task"]), int(row["seed"])
            if row["outcome"] not in OUTCOMES or key in outcomes:
                also = ", a second time" if key in outcomes else ""
                raise ValueError(f"{key[0]}, seed {key[1]}: {row['outcome']!r:.40}{also}; each seed has one of {', '.join(OUTCOMES)}")
            outcomes[key] = row["outcome"]
            film = folder / str(row.get("video"))
            if row.get("video") and film.resolve().is_relative_to(folder.resolve()) and film.is_file():
                videos[key] = film
        facts = json.loads((folder / "summary.json").read_text())["facts"]
        settings, policy = ({str(key): str(value) for key, value in tree.items()} for tree in (facts["settings"], facts.get("policy", {})))
        return EndedEvaluation(name, outcomes, settings, policy, videos)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ConfigError(
            f"{folder} must hold an evaluation in simulation, found another or a damaged one ({found}); type another"
        ) from None


def pair(baseline: EndedEvaluation, other: EndedEvaluation) -> tuple[list[tuple[str, int]], list[int], list[int]]:
    """Return the episodes that crashed in neither, seed by seed, and the places where the other alone, and the baseline alone, succeeded.

    Raises ConfigError where there is no such episode.
    """
    alike = [key for key in baseline.outcomes if "crash" not in (baseline.outcomes[key], other.outcomes.get(key, "crash"))]
    if not alike:
        raise ConfigError(
            f"evaluations are compared on the same tasks and seeds, {baseline.name} and {other.name} share none that did not crash; "
            "evaluate both with the same --tasks, --first_seed and --episodes"
        )
    alike.sort(key=lambda key: key[1])  # all tasks grow at the same pace, as in evaluations that are still running
    wins = [(other.outcomes[key] == "success") - (baseline.outcomes[key] == "success") for key in alike]
    return alike, [k for k, win in enumerate(wins) if win > 0], [k for k, win in enumerate(wins) if win < 0]


def settle(b: Sequence[int], c: Sequence[int], pairs: int) -> tuple[float, int | None, int | None]:
    """Return the p-value valid at any time, the number of pairs after which it fell to LEVEL, and the pairs still missing.

    b, c: places, of `pairs`, where one of the two alone succeeded.
    """
    won, wins, losses = set(b), 0, 0
    largest, settled = 0.0, None
    for place in sorted([*b, *c]):
        wins, losses = wins + (place in won), losses + (place not in won)
        largest = max(largest, log_evidence(wins, losses))
        if settled is None and largest >= -math.log(LEVEL):
            settled = place + 1
    more = None
    if settled is None and len(b) != len(c):
        needed = (n for n in range(pairs + 1, MOST_PAIRS) if log_evidence(n * len(b) // pairs, n * len(c) // pairs) >= -math.log(LEVEL))
        more = next((n - pairs for n in needed), None)
    return math.exp(-largest), settled, more


def _paired(
    other: EndedEvaluation, alike: Sequence[tuple[str, int]], b: Sequence[int], c: Sequence[int], p_holm: float
) -> PairedComparison:
    p_any_time, settled, more = settle(b, c, len(alike))
    differ = {*b, *c}
    agree = [other.outcomes[key] for place, key in enumerate(alike) if place not in differ]
    return PairedComparison(
        name=other.name,
        pairs=len(alike),
        both=agree.count("success"),
        neither=agree.count("failure"),
        only_baseline=len(c),
        only_this=len(b),
        difference=paired_difference(len(b), len(c), len(alike)),
        p=mcnemar(len(b), len(c)),
        p_holm=p_holm,
        p_any_time=p_any_time,
        settled_after=settled,
        more_pairs=more,
    )


def _warnings(baseline: EndedEvaluation, other: EndedEvaluation, pairs: int) -> list[str]:
    lines = []
    for name in {**baseline.settings, **other.settings}:
        ours, theirs = (each.settings.get(name, "unknown") for each in (baseline, other))
        if ours != theirs and name not in POLICY_SETTINGS:
            lines.append(f"{baseline.name} and {other.name} differ in {name}: {ours} and {theirs}")
    alone = max(len(baseline.outcomes), len(other.outcomes)) - pairs
    if alone:
        lines.append(f"{baseline.name} and {other.name}: {alone} episodes crashed in one, or are missing there, and have no pair")
    return lines


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {name: round(value, 6) for name, value in asdict(interval).items()}
