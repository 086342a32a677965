"""Environments and a policy in numpy: a point on a line that must reach a goal shown only in the image.

The chunk holds the policy's noise, so the number of steps of an episode tells whether its noise was the same.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pi0fm.eval.evaluate import WorkerSetup
from pi0fm.eval.rollouts.episode import RolloutSettings
from pi0fm.sim.environment import CameraSpec, Environment, StepResult
from pi0fm_client.errors import SimulationError
from pi0fm_client.types import ActionChunk, Observation, Policy

HORIZON = 8
FRONT = (CameraSpec("base", "front", 8, 8),)
Fault = Callable[[str, int, int], None]


def no_fault(_where: str, _seed: int, _step: int) -> None:
    """An environment that never breaks."""


class FakeEnvironment(Environment):
    """Counts its steps, which are its state and the grey of its pictures; ends after `max_steps`, without success."""

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...] = FRONT, max_steps: int = 10, dims: int = 4) -> None:
        self.task, self.prompt, self.cameras, self.max_steps = task, f"do {task}", cameras, max_steps
        self.fps, self.action_dim, self.state_dim = 20, dims, dims
        self.resets: list[int] = []
        self.executed: list[np.ndarray] = []
        self.closed = 0

    def reset(self, seed: int) -> None:
        self.resets.append(seed)
        self.executed = []

    def succeeds(self) -> bool:
        return False

    def step(self, action: np.ndarray) -> StepResult:
        assert action.shape == (self.action_dim,)
        self.executed.append(action)
        success = self.succeeds()
        return StepResult(success, success or len(self.executed) >= self.max_steps)

    def observe(self) -> Observation:
        images = {camera.name: self.picture(camera.height, camera.width) for camera in self.cameras}
        return Observation(images, np.full(self.state_dim, len(self.executed), np.float32), self.prompt)

    def picture(self, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), len(self.executed), np.uint8)

    def expert_action(self) -> np.ndarray:
        raise SimulationError(f"{self.task} has no expert")

    def close(self) -> None:
        self.closed += 1


class PointEnvironment(FakeEnvironment):
    """State [position], action [velocity], image of one grey that tells the goal; `fault(where, seed, step)` may raise."""

    def __init__(self, task: str, fault: Fault = no_fault, max_steps: int = 20, cameras: tuple[CameraSpec, ...] = FRONT) -> None:
        super().__init__(task, cameras, max_steps, dims=1)
        self._fault = fault

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._position = 0.0
        self._fault("reset", seed, 0)
        self._goal = int(np.random.default_rng(seed).integers(60, 200))

    def step(self, action: np.ndarray) -> StepResult:
        self._fault("step", self.resets[-1], len(self.executed) + 1)
        self._position += float(action[0])
        return super().step(action)

    def succeeds(self) -> bool:
        return abs(self._position - self._goal) < 2.0

    def observe(self) -> Observation:
        self._fault("observe", self.resets[-1], len(self.executed))
        image = np.full((8, 8, 3), self._goal, np.uint8)
        return Observation(images={"base": image}, state=np.array([self._position], np.float32), prompt=self.prompt)

    def picture(self, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), min(255, max(0, int(self._position))), np.uint8)


class PointPolicy:
    """Goes a fifth of the way with noise; remembers the batches that it was asked for."""

    def __init__(self, **metadata: Any) -> None:
        self._metadata = {"action_horizon": HORIZON, "robot_action_dim": 1, "state_dim": 1, "cameras": {"base": "image"}} | metadata
        self.batches: list[list[Observation]] = []
        self.seeds: list[list[int]] = []

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        assert noise_seeds is not None
        self.batches.append(list(observations))
        self.seeds.append(list(noise_seeds))
        return [self._chunk(observation, seed) for observation, seed in zip(observations, noise_seeds, strict=True)]

    @staticmethod
    def _chunk(observation: Observation, seed: int) -> ActionChunk:
        distance = float(observation.images["base"][0, 0, 0]) - float(observation.state[0])
        noise = np.random.default_rng(seed).normal(0.0, 6.0, (HORIZON, 1))
        return ActionChunk(actions=(distance / 5 + noise).astype(np.float32))


def point_setup(fault: Fault = no_fault, environments: int = 3, policy: Callable[[], Policy] = PointPolicy) -> WorkerSetup:
    """A WorkerSetup that can travel to another process."""
    return WorkerSetup(policy, partial(_open, fault), RolloutSettings(execution_horizon=4), environments)


def _open(fault: Fault, task: str) -> PointEnvironment:
    return PointEnvironment(task, fault)
