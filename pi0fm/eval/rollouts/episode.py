"""Types of an evaluation: the episode, its settings, its result.

Owns: `Episode`, `EpisodeResult`, `RolloutSettings`, the seed of a policy call. Does not know: environments, policies, processes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pi0fm_client.errors import ConfigError

Outcome = Literal["success", "failure", "crash"]
Filming = Literal["no", "failure", "always", "large"]
OBSERVATION_CHANGES = ("none", "frozen_image", "swapped_prompt")
OTHER_SEED_OFFSET = 500_000
SCORES = ("log_prob", "noise_norm")


@dataclass(frozen=True)
class Episode:
    """Start position of a task.

    film: `large` renders a video in addition to the policy's pictures; `failure` and `always` make one from the policy's pictures, without
    rendering: for an episode that failed, or for any outcome.
    """

    task: str
    seed: int
    film: Filming = "no"

    def filmed(self, outcome: Outcome) -> bool:
        """Tell whether an episode of that outcome has a video."""
        return outcome != "crash" and (self.film in ("large", "always") or (self.film == "failure" and outcome == "failure"))


@dataclass(frozen=True)
class EpisodeResult:
    """Result of an episode.

    steps: executed actions. seconds: wall time of the episode's reset, steps and pictures, without the policy.
    error: one line, for a crash only. video: mp4 bytes, of a filmed episode that did not crash; video_path: their file.
    scores: `ActionChunk.scores` of each policy call, in order; empty without --scores.
    alarms: policy calls that raised one (policy/saved/calibration.py); None for a policy that is not calibrated.
    """

    task: str
    seed: int
    outcome: Outcome
    steps: int
    seconds: float
    error: str | None = None
    video: bytes | None = None
    scores: tuple[Mapping[str, float], ...] = ()
    video_path: str | None = None
    alarms: int | None = None

    def mean_score(self, name: str) -> float:
        """Average one of SCORES over the policy calls, one or more."""
        return sum(each[name] for each in self.scores) / len(self.scores)

    def row(self) -> dict[str, Any]:
        """Return the row of episodes.json."""
        return {
            "task": self.task,
            "seed": self.seed,
            "outcome": self.outcome,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            "video": self.video_path,
            "scores": {name: self._described(name) for name in SCORES} if self.scores else None,
            "alarms": self.alarms,
        }

    def _described(self, name: str) -> dict[str, Any]:
        calls = [round(each[name], 4) for each in self.scores]
        return {"mean": round(self.mean_score(name), 4), "min": min(calls), "calls": calls}


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of all episodes.

    execution_horizon: actions executed of each chunk. seed: of the policy's noise. observation_change: an ablation; `swapped_prompt`
    takes the sentence of the next of `tasks`. video_every: control steps between two pictures of a large video, of video_side pixels.
    """

    execution_horizon: int = 8
    seed: int = 0
    observation_change: str = "none"
    tasks: tuple[str, ...] = ()
    video_every: int = 2
    video_side: int = 256

    def __post_init__(self) -> None:
        if self.execution_horizon < 1:
            raise ConfigError(f"execution_horizon must be 1 or more, found {self.execution_horizon}; type --execution_horizon 8")
        if self.observation_change not in OBSERVATION_CHANGES:
            raise ConfigError(f"observation_change must be one of {', '.join(OBSERVATION_CHANGES)}, found {self.observation_change!r}")
        if self.observation_change == "swapped_prompt" and len(self.tasks) < 2:
            raise ConfigError(
                f"swapped_prompt takes the sentence of another task, found {len(self.tasks)} task; name two or more in --tasks"
            )

    def prompt_task(self, task: str) -> str:
        """Return the task whose sentence the policy reads: `task`, or the next one."""
        if self.observation_change != "swapped_prompt":
            return task
        return self.tasks[(self.tasks.index(task) + 1) % len(self.tasks)]


def other_seed(seed: int) -> int:
    """Return the seed whose start picture replaces every image of a frozen episode."""
    return seed + OTHER_SEED_OFFSET


def noise_seed(evaluation_seed: int, task: str, seed: int, step: int) -> int:
    """Return the noise seed of one policy call, in [0, 2**63), independent of batches, order and workers."""
    text = f"{evaluation_seed}/{task}/{seed}/{step}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def one_line(error: BaseException) -> str:
    """Format a fault as `Class: message` on one line, at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
