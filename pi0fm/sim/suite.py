"""Interface of a simulator: its tasks, its robot, the opening of an environment.

Owns: `Suite`, `Task`, the checks of a task's name, cameras and step limit. Does not know: any simulator, the list of suites.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import numpy as np
from numpy.typing import NDArray

from pi0fm.options import nearest
from pi0fm.sim.environment import CameraSpec, Environment
from pi0fm_client.errors import ConfigError, SimulationError


@dataclass(frozen=True)
class Task:
    """Task of a suite. prompt: the sentence that a policy reads. max_steps: steps after which an episode without success is a failure."""

    prompt: str
    max_steps: int


@dataclass(frozen=True)
class Suite:
    """Tasks of one simulated robot.

    name: as in `NAME/TASK`. title: for messages. cameras: the sources of pictures. default_cameras: where none are given.
    fps: control steps per simulated second. state_names, action_names: of the robot's numbers. longest_episode: steps.
    has_expert: whether `Environment.expert_action` works. packages: distributions that `build` imports; install: the command for them.
    action_low, action_high: limits to which an action is clipped, one number or one per dimension.
    expert_noise: standard deviation of the noise on a demonstration's actions, with which the expert still succeeds.
    increments: dimensions that are displacements, 0 at a standstill; the others are targets, which a standstill keeps.
    groups: tasks that are published together, by the group's name; `all` always exists.
    build: (name of the task, cameras, max_steps) -> Environment, whose `task` is the name that reports use.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    cameras: tuple[str, ...]
    default_cameras: tuple[CameraSpec, ...]
    fps: int
    robot_type: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    longest_episode: int
    has_expert: bool
    packages: tuple[str, ...]
    install: str
    build: Callable[[str, tuple[CameraSpec, ...], int], Environment]
    expert_noise: float = 0.3
    action_low: float | tuple[float, ...] = -1.0
    action_high: float | tuple[float, ...] = 1.0
    increments: tuple[int, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def open(self, task: str, cameras: tuple[CameraSpec, ...] = (), max_steps: int | None = None) -> Environment:
        """Open the environment of `task`; rendering starts with the first picture.

        Raises ConfigError as `check` does, SimulationError when the simulator is not installed or the machine cannot render.
        """
        self.check(task, cameras, max_steps)
        for package in self.packages:
            try:
                metadata.version(package)
            except metadata.PackageNotFoundError:
                raise SimulationError(
                    f"{self.title} needs the package {package}, which is not installed here; type {self.install}"
                ) from None
        return self.build(task, cameras or self.default_cameras, max_steps or self.tasks[task].max_steps)

    def range_of_actions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (low, high) of every action dimension."""
        width = len(self.action_names)
        low, high = (np.broadcast_to(np.asarray(end, np.float64), width) for end in (self.action_low, self.action_high))
        return low, high

    def check(self, task: str, cameras: tuple[CameraSpec, ...] = (), max_steps: int | None = None) -> None:
        """Raise ConfigError, with the nearest name, for an unknown task or camera, or a step limit out of range."""
        if task not in self.tasks:
            raise ConfigError(f"unknown {self.title} task {task!r}: {nearest(task, list(self.tasks))}")
        for camera in cameras:
            if camera.source not in self.cameras:
                raise ConfigError(f"{self.title} has no camera {camera.source!r}: {nearest(camera.source, self.cameras)}")
        if max_steps is not None and not 1 <= max_steps <= self.longest_episode:
            raise ConfigError(f"max_steps must be from 1 to {self.longest_episode} in {self.title}, found {max_steps}")
