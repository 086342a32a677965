"""Rollout of environments that step together, with one batched policy call for each chunk of actions.

Owns: the advance, the verdict `crash`, the reuse of environments. Does not know: simulators, networks, processes, files.

    advance             1                2                3                execution_horizon = 4
    environment 0     ?aaaa            ?aaS             ?dddd         ?  its observation in the batched policy call, here of 3
    environment 1     ?bbbb            ?bbbb            ?bF           a  one action of episode a; S success, F failure, X crash
    environment 2     ?cX              ?eeee            ?eeee

An environment whose episode ended waits for the end of the advance, then begins the next. The wait costs nothing, because the environments
of one process step one after the other; in return all need a chunk at the same time, and the batch stays full.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.eval.report import video
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult, Outcome, RolloutSettings, noise_seed, one_line, other_seed
from pi0fm.sim.environment import Environment
from pi0fm_client.errors import BundleError, ConfigError, Pi0fmError, SimulationError
from pi0fm_client.types import ActionChunk, Observation, Policy

OpenEnvironment = Callable[[str], Environment]


def run_all(episodes: Sequence[Episode], batch: "BatchedRollout") -> Iterator[EpisodeResult]:
    """Run a queue of episodes through `batch`; yield results as they end, in any order."""
    waiting = list(reversed(episodes))
    while waiting or batch.active:
        yield from batch.advance([waiting.pop() for _ in range(min(batch.free, len(waiting)))])


@dataclass
class _RunningEpisode:
    """Episode that has begun."""

    episode: Episode
    environment: Environment | None = None
    prompt: str | None = None
    frozen: Mapping[str, NDArray[np.uint8]] | None = None
    observation: Observation | None = None
    outcome: Outcome | None = None
    steps: int = 0
    seconds: float = 0.0
    error: str | None = None
    film: video.VideoFrames = field(default_factory=video.VideoFrames)
    scores: list[Mapping[str, float]] = field(default_factory=list)
    alarms: int | None = None

    @contextmanager
    def guard(self, *pass_on: type[Exception]) -> Iterator[None]:
        """Turn a fault of the environment into this episode's crash, and count the time; faults in `pass_on` are raised."""
        began = time.perf_counter()
        try:
            yield
        except pass_on:
            raise
        except Exception as error:  # noqa: BLE001  a simulator may raise anything, and the other episodes must run
            self.outcome, self.error = "crash", one_line(error)
        finally:
            self.seconds += time.perf_counter() - began


@final
class BatchedRollout:
    """Rollout of up to `num_environments` episodes that advance together; the caller adds new ones between advances.

    open_environment: makes the environment of a task. Its Pi0fmError (an unknown camera), and a SimulationError of the first picture
    (no renderer), are raised, because every episode would fail. Any other fault of an environment is a crash of its episode.
    At most `num_environments` are open at a time; one whose episode did not crash is reused for the next episode of its task.
    """

    def __init__(self, open_environment: OpenEnvironment, policy: Policy, settings: RolloutSettings, num_environments: int) -> None:
        self._open, self._policy, self._settings, self._num_environments = open_environment, policy, settings, num_environments
        self._running: list[_RunningEpisode] = []
        self._idle: list[Environment] = []
        self._prompts: dict[str, str] = {}

    @property
    def active(self) -> int:
        """Number of episodes that are running."""
        return len(self._running)

    @property
    def free(self) -> int:
        """Number of episodes that can begin with the next advance."""
        return self._num_environments - len(self._running)

    def advance(self, episodes: Sequence[Episode]) -> list[EpisodeResult]:
        """Begin `episodes` (at most `free`), call the policy once for all, execute `execution_horizon` actions; return ended episodes."""
        for episode in episodes:
            self._begin(episode)
        for run in self._running:
            self._observe(run)
        live = [run for run in self._running if run.outcome is None]
        if live:
            chunks = self._infer(live)
            for k in range(self._settings.execution_horizon):
                for run, actions in zip(live, chunks, strict=True):
                    if run.outcome is None:
                        self._step(run, actions[k])
        return self._collect()

    def close(self) -> None:
        """Close every environment; running episodes are dropped."""
        for run in self._running:
            self._discard(run)
        for environment in self._idle:
            environment.close()
        self._running, self._idle = [], []

    def _begin(self, episode: Episode) -> None:
        run = _RunningEpisode(episode)
        with run.guard(Pi0fmError):
            run.prompt = self._changed_prompt(episode.task)
            run.environment = self._environment(episode.task)
        self._running.append(run)
        with run.guard(SimulationError):
            if run.environment is not None:
                if self._settings.observation_change == "frozen_image":
                    run.environment.reset(other_seed(episode.seed))
                    # a copy, because a renderer may return the same buffer again
                    run.frozen = {name: image.copy() for name, image in run.environment.observe().images.items()}
                run.environment.reset(episode.seed)
                self._film_large(run)

    def _environment(self, task: str) -> Environment:
        for environment in self._idle:
            if environment.task == task:
                self._idle.remove(environment)
                return environment
        while self._idle and len(self._running) + len(self._idle) >= self._num_environments:
            self._idle.pop(0).close()
        return self._open(task)

    def _changed_prompt(self, task: str) -> str | None:
        """Return the sentence of another task when prompts are swapped; its environment is opened once for it."""
        shown = self._settings.prompt_task(task)
        if shown == task:
            return None
        if shown not in self._prompts:
            environment = self._open(shown)
            self._prompts[shown] = environment.prompt
            environment.close()
        return self._prompts[shown]

    def _observe(self, run: _RunningEpisode) -> None:
        if run.outcome is not None or run.environment is None:
            return
        # a machine that cannot render fails at the first picture, which is no crash of this episode
        with run.guard(*((SimulationError,) if run.steps == 0 else ())):
            seen = run.environment.observe()
            images = seen.images if run.frozen is None else run.frozen
            prompt = seen.prompt if run.prompt is None else run.prompt
            run.observation = Observation(images=images, state=seen.state, prompt=prompt)
            if run.episode.film in ("failure", "always"):
                run.film.add(seen.images[run.environment.cameras[0].name])
        if run.outcome is None and run.steps == 0 and run.observation is not None:
            check_fit(run.environment, run.observation, self._policy.metadata, self._settings.execution_horizon)

    def _infer(self, live: Sequence[_RunningEpisode]) -> list[NDArray[np.float32]]:
        observations = [run.observation for run in live if run.observation is not None]
        seeds = [noise_seed(self._settings.seed, run.episode.task, run.episode.seed, run.steps) for run in live]
        chunks = self._policy.infer_batch(observations, seeds)
        if len(chunks) != len(live):
            raise BundleError(f"a policy answers one chunk for each observation: {len(live)} observations, {len(chunks)} chunks")
        return [self._checked_actions(run, chunk) for run, chunk in zip(live, chunks, strict=True)]

    def _checked_actions(self, run: _RunningEpisode, chunk: ActionChunk) -> NDArray[np.float32]:
        horizon = self._settings.execution_horizon
        dim = run.environment.action_dim if run.environment is not None else 0
        actions = np.asarray(chunk.actions)
        where = f"{run.episode.task}, seed {run.episode.seed}, step {run.steps}"
        if actions.ndim != 2 or actions.shape[0] < horizon or actions.shape[1] != dim:
            raise BundleError(
                f"the policy must answer actions [>= {horizon}, {dim}], found {list(actions.shape)} at {where}; "
                "evaluate a policy that was trained for this robot"
            )
        finite = np.isfinite(actions[:horizon])
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise BundleError(
                f"the policy must answer finite actions, found {actions[row, column]} in row {row}, column {column} at {where}; "
                "look at its training loss and its norm stats"
            )
        if "log_prob" in chunk.scores:
            run.scores.append(chunk.scores)
        if "alarm" in chunk.scores:
            run.alarms = (run.alarms or 0) + int(chunk.scores["alarm"])
        return np.ascontiguousarray(actions[:horizon], dtype=np.float32)

    def _step(self, run: _RunningEpisode, action: NDArray[np.float32]) -> None:
        with run.guard():
            assert run.environment is not None
            result = run.environment.step(action)
            run.steps += 1
            if result.success:
                run.outcome = "success"
            elif result.done or run.steps >= run.environment.max_steps:
                run.outcome = "failure"
            if run.outcome is not None or run.steps % self._settings.video_every == 0:
                self._film_large(run)
            if run.outcome is not None and run.episode.film != "large" and run.episode.filmed(run.outcome):
                camera = run.environment.cameras[0]
                run.film.add(run.environment.picture(camera.height, camera.width), last=True)

    def _film_large(self, run: _RunningEpisode) -> None:
        if run.episode.film == "large" and run.environment is not None:
            side = self._settings.video_side
            run.film.frames.append(run.environment.picture(side, side).copy())

    def _collect(self) -> list[EpisodeResult]:
        ended = [run for run in self._running if run.outcome is not None]
        self._running = [run for run in self._running if run.outcome is None]
        return [self._result(run) for run in ended]

    def _result(self, run: _RunningEpisode) -> EpisodeResult:
        assert run.outcome is not None
        movie = None
        if run.environment is not None and run.outcome != "crash":
            self._idle.append(run.environment)
            if run.episode.filmed(run.outcome):
                every = self._settings.video_every if run.episode.film == "large" else self._settings.execution_horizon * run.film.every
                movie = video.encode(run.film.frames, run.environment.fps / every)
        else:
            self._discard(run)
        scores = tuple(run.scores)
        episode = run.episode
        return EpisodeResult(episode.task, episode.seed, run.outcome, run.steps, run.seconds, run.error, movie, scores, alarms=run.alarms)

    @staticmethod
    def _discard(run: _RunningEpisode) -> None:
        environment, run.environment = run.environment, None
        crash = run.error
        with run.guard():
            if environment is not None:
                environment.close()
        run.error = crash  # report the first fault


def check_fit(environment: Environment, observation: Observation, metadata: Mapping[str, Any], execution_horizon: int) -> None:
    """Raise ConfigError when a policy cannot drive an environment.

    Facts that its metadata lack (those of another server) are not compared; its actions are checked at each call.
    """
    horizon = metadata.get("action_horizon", execution_horizon)
    if execution_horizon > horizon:
        rule = f"execution_horizon must be at most the policy's action_horizon {horizon}, found {execution_horizon}"
        raise ConfigError(f"{rule}; type --execution_horizon {horizon}")
    for name, trained, found in (
        ("robot_action_dim", metadata.get("robot_action_dim"), environment.action_dim),
        ("state_dim", metadata.get("state_dim"), int(observation.state.shape[-1])),
    ):
        if trained is not None and trained != found:
            rule = f"the policy was trained for {name} {trained}, but the task {environment.task} has {found}"
            raise ConfigError(f"{rule}; evaluate it on tasks of its robot")
    missing = sorted(set(metadata.get("cameras") or ()) - set(observation.images))
    if missing:
        rule = f"the policy needs the camera {missing[0]!r}, the environment shows {sorted(observation.images)}"
        raise ConfigError(f"{rule}; type --cameras {missing[0]}=SOURCE:WIDTHxHEIGHT")
