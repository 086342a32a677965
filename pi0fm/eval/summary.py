"""Figures of an evaluation: success by task and over tasks, with intervals; crashes are counted separately.

Owns: `Summary`. Does not know: its presentation.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pi0fm.eval.rollouts.episode import SCORES, EpisodeResult
from pi0fm.eval.statistics import Interval, mean_over_tasks, wilson


@dataclass(frozen=True)
class MeanScores:
    """Scores of one task's episodes of one outcome: the mean over episodes of each episode's mean over its policy calls."""

    outcome: str
    episodes: int
    calls: int
    log_prob: float
    noise_norm: float

    def json(self) -> dict[str, Any]:
        """Return the counts and the means."""
        means = {name: round(getattr(self, name), 4) for name in SCORES}
        return {"episodes": self.episodes, "calls": self.calls, **means}


@dataclass(frozen=True)
class TaskSummary:
    """Figures of one task. interval: None when every episode crashed. scores: of successes and of failures, where there are any.

    alarmed: by outcome, (episodes with an alarm, episodes), for a calibrated policy.
    """

    task: str
    successes: int
    failures: int
    crashes: int
    interval: Interval | None
    mean_steps: float | None
    scores: tuple[MeanScores, ...] = ()
    alarmed: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """Number of episodes without a crash, which says nothing about the policy."""
        return self.successes + self.failures


@dataclass(frozen=True)
class Summary:
    """Figures of all tasks. `mean` is None when every episode of a task crashed: a mean over the others would be biased."""

    tasks: tuple[TaskSummary, ...]
    mean: Interval | None
    crashes: int
    episodes: int

    @property
    def has_scores(self) -> bool:
        """Tell whether any task has scores."""
        return any(task.scores for task in self.tasks)

    def for_tasks(self, tasks: Collection[str]) -> "Summary":
        """Return the figures of a subset of the tasks."""
        return _over(tuple(row for row in self.tasks if row.task in tasks))

    def json(self) -> dict[str, Any]:
        """Return the figures of summary.json and of the command's last line, with `scores` and `alarmed` where there are any."""
        scores = {task.task: {each.outcome: each.json() for each in task.scores} for task in self.tasks if task.scores}
        figures = {
            "mean_success": self.mean and round(self.mean.rate, 6),
            "mean_interval": _ends(self.mean),
            "success": {task.task: task.interval and round(task.interval.rate, 6) for task in self.tasks},
            "interval": {task.task: _ends(task.interval) for task in self.tasks},
            "crashes": self.crashes,
            "episodes": self.episodes,
        }
        alarmed = {task.task: {outcome: list(counts) for outcome, counts in task.alarmed.items()} for task in self.tasks if task.alarmed}
        return figures | ({"scores": scores} if scores else {}) | ({"alarmed": alarmed} if alarmed else {})

    def warnings(self) -> list[str]:
        """Return a warning for each task with crashes."""
        lines = []
        for task in self.tasks:
            if task.crashes and task.trials:
                lines.append(
                    f"{task.task}: {task.crashes} of {task.trials + task.crashes} episodes crashed and are not in its success rate"
                )
            elif task.crashes:
                lines.append(f"{task.task}: every episode crashed; its success rate, and the mean over tasks, are not known")
        return lines


def summarize(results: Sequence[EpisodeResult], tasks: Sequence[str]) -> Summary:
    """Count `results` by task, in the order of `tasks`; each task must have a result."""
    return _over(tuple(_task(task, [result for result in results if result.task == task]) for task in tasks))


def _over(rows: tuple[TaskSummary, ...]) -> Summary:
    mean = mean_over_tasks([(row.successes, row.trials) for row in rows]) if all(row.trials for row in rows) else None
    crashes = sum(row.crashes for row in rows)
    return Summary(rows, mean, crashes, crashes + sum(row.trials for row in rows))


def _task(task: str, results: Sequence[EpisodeResult]) -> TaskSummary:
    if not results:
        raise ValueError(f"no result for the task {task}")
    count = Counter(result.outcome for result in results)
    trials = count["success"] + count["failure"]
    steps = [result.steps for result in results if result.outcome == "success"]
    return TaskSummary(
        task,
        count["success"],
        count["failure"],
        count["crash"],
        wilson(count["success"], trials) if trials else None,
        sum(steps) / len(steps) if steps else None,
        tuple(each for outcome in ("success", "failure") for each in _scores(outcome, results)),
        {outcome: counts for outcome in ("success", "failure") if (counts := _alarmed(outcome, results))[1]},
    )


def _alarmed(outcome: str, results: Sequence[EpisodeResult]) -> tuple[int, int]:
    watched = [result.alarms for result in results if result.outcome == outcome and result.alarms is not None]
    return sum(alarms > 0 for alarms in watched), len(watched)


def _scores(outcome: str, results: Sequence[EpisodeResult]) -> list[MeanScores]:
    scored = [result for result in results if result.outcome == outcome and result.scores]
    if not scored:
        return []
    means = {name: sum(result.mean_score(name) for result in scored) / len(scored) for name in SCORES}
    return [MeanScores(outcome, len(scored), sum(len(result.scores) for result in scored), means["log_prob"], means["noise_norm"])]


def _ends(interval: Interval | None) -> list[float] | None:
    return [round(interval.low, 6), round(interval.high, 6)] if interval is not None else None
