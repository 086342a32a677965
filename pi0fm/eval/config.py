"""Options of an evaluation.

Owns: `StartsConfig`, `EvalConfig`, `FollowConfig`, their ranges, the list of episodes, the refusal of demonstrated seeds.
Does not know: how episodes run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pi0fm.eval.policy import PolicyChoice
from pi0fm.eval.rollouts.episode import Episode, Filming
from pi0fm.options import option, refuse_words, required
from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec, parse_cameras
from pi0fm.sim.suite import Suite
from pi0fm_client.errors import ConfigError

DEFAULT_EXECUTION_HORIZON = 8
SAMPLE = 10  # episodes of a task, of which one is filmed for any outcome
LEAST = {
    "episodes": 1,
    "first_seed": 0,
    "max_steps": 1,
    "execution_horizon": 1,
    "num_workers": 0,
    "environments_per_worker": 1,
    "videos_per_task": 0,
    "score_probes": 0,
    "gpus_per_worker": 0,
    "seed": 0,
}
CHANGES = ("none", "frozen_image", "swapped_prompt")


@dataclass(frozen=True, kw_only=True)
class StartsConfig(PolicyChoice):
    """Options of every evaluation in a simulator: the policy, the tasks and their start positions.

    After construction `tasks` and `cameras` are tuples, and tasks have their names in reports.
    """

    tasks: str | tuple[str, ...] = required(f"tasks separated by commas, each {catalog.TASK_FORM}")
    episodes: int = option(20, "episodes of each task, one seed each")
    first_seed: int = option(1, "seed of the first episode; the others follow one by one")
    allow_seen_seeds: bool = option(False, "accept start positions that the policy saw in its demonstrations")
    cameras: str | tuple[str, ...] = option((), "NAME=SOURCE:WIDTHxHEIGHT,...; the policy's when not given, else the simulator's")
    max_steps: int | None = option(None, "steps after which an episode without success is a failure; the task's limit when not given")
    execution_horizon: int | None = option(None, "actions executed of each chunk; the policy's when not given, else 8")
    output_dir: str = option("outputs/eval", "folder for report.html, summary.json, episodes.json and videos/")
    seed: int = option(0, "seed of the policy's noise")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", tuple(catalog.report_name(task) for task in catalog.expand(_names(self.tasks))))
        object.__setattr__(self, "cameras", _names(self.cameras))
        if not self.tasks:
            raise ConfigError("an evaluation needs one task or more; type --tasks button-press-topdown-v3,drawer-open-v3")
        doubled = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if doubled:
            raise ConfigError(f"each task can be named once, found {doubled[0]} more than once; use --episodes for more episodes")
        for name, bound in LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < bound:
                raise ConfigError(f"{name} must be {bound} or more, found {value}; type --{name} {bound} or leave it out")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(StartsConfig):
    """Options of an evaluation whose simulator waits for the policy."""

    num_workers: int | None = option(None, "Ray actors; every core of the cluster when not given, 0 runs in this process")
    gpus_per_worker: float = option(0.0, "share of a GPU for each actor's policy, such as 0.25; 0 infers on the CPU")
    environments_per_worker: int = option(10, "environments that step together; also the policy's batch size")
    videos: Literal["failures", "all", "none"] = option(
        "failures", f"episodes filmed from the policy's input pictures: failures and every {SAMPLE}th episode, all, or none"
    )
    videos_per_task: int | None = option(
        None, "first episodes of each task filmed larger and smoother, at the cost of rendering; 1 when not given"
    )
    scores: bool = option(
        False, "log-likelihood and noise-space norm of every chunk, in the report and episodes.json; outcomes stay the same"
    )
    score_probes: int = option(1, "random probes of each log-likelihood; 0 computes it exactly, at the cost of one product per entry")
    metrics: str | None = option(None, "a run's metrics.jsonl, whose loss curve the report shows")
    observation_change: str = option("none", "ablation: none, frozen_image (of another seed) or swapped_prompt (of the next task)")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_words(self, observation_change=CHANGES)
        if self.num_workers == 0 and self.gpus_per_worker:
            raise ConfigError(
                f"gpus_per_worker is for Ray actors, found {self.gpus_per_worker:g} with --num_workers 0, which takes what it finds"
            )
        if self.videos == "none" and self.videos_per_task:
            raise ConfigError(f"--videos none films nothing, found videos_per_task {self.videos_per_task}; leave one of the two out")
        if self.score_probes != 1 and not self.scores:
            raise ConfigError(f"score_probes belongs to --scores, found {self.score_probes} without it; type --scores, or leave it out")
        if self.scores and self.compile != "off":
            raise ConfigError(f"scores need a policy that is not compiled, found compile {self.compile}; leave one of them out")
        if self.remote and self.scores:
            raise ConfigError(
                f"scores need the derivatives of the network, and {self.policy} sends actions only; give --policy the bundle's directory"
            )


@dataclass(frozen=True)
class FollowOptions:
    """Run to follow. Raises ConfigError for a number out of range."""

    run: Path = required("output_dir of pi0fm train --bundle_every N, which may be running, about to start, or finished")
    patience: int = option(0, "number of evaluations in a row without a better one, after which the run is asked to stop; 0 for never")
    keep: Literal["best", "all"] = option("best", "which of RUN/bundles to keep once they are evaluated; the newest is always kept")

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise ConfigError(f"follow.patience must be 0 or more, found {self.patience}; leave it out")


@dataclass(frozen=True, kw_only=True)
class FollowConfig(EvalConfig):
    """Options of an evaluation of every bundle of a run. Raises ConfigError if a policy is given."""

    policy: str = option("", "not to be given: the bundles of the run are evaluated")
    follow: FollowOptions = required("")
    output_dir: str = option("", "folder for the evaluations; RUN/evaluations when not given")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy:
            raise ConfigError(f"--follow.run evaluates the bundles of the run, found --policy {self.policy}; leave one of the two out")


def plan(config: EvalConfig) -> list[Episode]:
    """List the episodes, seed after seed of one task after the other, each with how it is filmed."""

    def film(number: int) -> Filming:
        if config.videos == "none":
            return "no"
        if number < (1 if config.videos_per_task is None else config.videos_per_task):
            return "large"
        return "always" if config.videos == "all" or number % SAMPLE == 0 else "failure"

    return [Episode(task, config.first_seed + k, film(k)) for task in config.tasks for k in range(config.episodes)]


def camera_specs(config: StartsConfig, metadata: Mapping[str, Any], suite: Suite) -> tuple[CameraSpec, ...]:
    """Parse the cameras: those given, else the policy's `camera_sources` (name -> SOURCE:WIDTHxHEIGHT), else the simulator's default.

    Raises ConfigError for a text of another form.
    """
    sources = metadata.get("camera_sources") or {}
    texts = config.cameras or [f"{name}={source}" for name, source in sources.items()]
    return parse_cameras(texts) if texts else suite.default_cameras


def checked_cameras(config: StartsConfig, metadata: Mapping[str, Any]) -> tuple[CameraSpec, ...]:
    """Return `camera_specs`, which must be equal for every suite of the tasks.

    Also raises ConfigError for a camera, task or step limit that a suite lacks, and for suites of different robots.
    """
    suites = catalog.suites_of(config.tasks)
    first, cameras = suites[0], camera_specs(config, metadata, suites[0])
    for suite in suites[1:]:
        for what, ours, other in (
            ("cameras", cameras, camera_specs(config, metadata, suite)),
            ("state", first.state_names, suite.state_names),
            ("actions", first.action_names, suite.action_names),
        ):
            if ours != other:
                raise ConfigError(
                    f"suites that one policy is judged on together have the same robot and cameras, found other {what} in {suite.name} "
                    f"than in {first.name}; evaluate each by itself" + (", or type --cameras" if what == "cameras" else "")
                )
    for task in config.tasks:
        suite, name = catalog.find(task)
        suite.check(name, cameras, config.max_steps)
    return cameras


def resolve_execution_horizon(config: StartsConfig, metadata: Mapping[str, Any]) -> int:
    """Return the execution horizon: the one given, else the policy's, else DEFAULT_EXECUTION_HORIZON within its chunk."""
    longest: int = metadata.get("action_horizon", DEFAULT_EXECUTION_HORIZON)
    return config.execution_horizon or metadata.get("execution_horizon") or min(DEFAULT_EXECUTION_HORIZON, longest)


def refuse_seen_seeds(config: StartsConfig, metadata: Mapping[str, Any]) -> None:
    """Raise ConfigError when an episode's seed is in the policy's `demonstration_seeds` (task -> [lowest, highest])."""
    if config.allow_seen_seeds:
        return
    last = config.first_seed + config.episodes - 1
    seen: Mapping[str, Sequence[int]] = metadata.get("demonstration_seeds") or {}
    for task in config.tasks:
        if task not in seen:
            continue
        low, high = seen[task]
        if config.first_seed <= high and low <= last:
            raise ConfigError(
                f"an evaluation must use start positions that no demonstration used: {task} was demonstrated with seeds {low} to {high}, "
                f"asked for {config.first_seed} to {last}; type --first_seed {high + 1}, or --allow_seen_seeds"
            )


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("["):
        value = yaml.safe_load(value)
    names = value.split(",") if isinstance(value, str) else value
    return tuple(str(name).strip() for name in names if str(name).strip())
