"""The interface of a simulated robot.

Owns: `Environment`, `RenderedEnvironment`, `StepResult`, `CameraSpec` and its text form `NAME=SOURCE:WIDTHxHEIGHT`.
Does not know: any simulator.
Shape letters: A robot action dim, S state dim.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import ConfigError, SimulationError
from pi0fm_client.types import Observation

_CAMERA_TEXT = re.compile(r"(?P<name>[A-Za-z0-9_]+)=(?P<source>[^=:,]+):(?P<width>\d{1,4})x(?P<height>\d{1,4})")
LARGEST_PICTURE = 2048


@dataclass(frozen=True)
class StepResult:
    """Result of a step. success: this step solved the task. done: the episode is over, by success or by its last step."""

    success: bool
    done: bool


@dataclass(frozen=True)
class CameraSpec:
    """Camera of an observation.

    name: the embodiment's. source: the simulator's name of the camera.
    height, width: pixels, 8 to 2048, even because video needs it.
    Raises ConfigError for a size out of range.
    """

    name: str
    source: str
    height: int
    width: int

    def __post_init__(self) -> None:
        for side in (self.height, self.width):
            if not 8 <= side <= LARGEST_PICTURE or side % 2:
                raise ConfigError(
                    f"camera {self.name!r}: width and height are even numbers from 8 to {LARGEST_PICTURE}, found {self.width}x{self.height}"
                )

    def __str__(self) -> str:
        return f"{self.name}={self.source}:{self.width}x{self.height}"


def parse_camera(text: str) -> CameraSpec:
    """Parse `base=corner2:96x96`. Raises ConfigError that shows the form."""
    found = _CAMERA_TEXT.fullmatch(str(text).strip())
    if found is None:
        raise ConfigError(f"a camera is NAME=SOURCE:WIDTHxHEIGHT, such as base=corner2:96x96, found {text!r}")
    return CameraSpec(found["name"], found["source"], height=int(found["height"]), width=int(found["width"]))


def parse_cameras(texts: str | Iterable[str]) -> tuple[CameraSpec, ...]:
    """Parse the cameras of several texts, or of one text with commas. Raises ConfigError for no camera, or two of one name."""
    words = texts.split(",") if isinstance(texts, str) else [word for text in texts for word in str(text).split(",")]
    cameras = tuple(parse_camera(word) for word in words if word.strip())
    names = [camera.name for camera in cameras]
    if not cameras:
        raise ConfigError("at least one camera is needed, such as base=corner2:96x96")
    if len(set(names)) != len(names):
        raise ConfigError(f"every camera needs a different name, found {', '.join(names)}")
    return cameras


def checked_action(environment: "Environment", action: NDArray[np.float32], over: bool) -> NDArray[np.float32]:
    """Return an action [A]. Raises SimulationError for another shape, a number that is not finite, and after the episode's end."""
    if over:
        raise SimulationError(f"{environment.task}: the episode is over; call reset(seed) before the next step")
    if np.shape(action) != (environment.action_dim,) or not np.isfinite(action).all():
        raise SimulationError(f"{environment.task}: an action is {environment.action_dim} finite numbers, found {np.array(action)!r}")
    return np.asarray(action, np.float32)


class Environment(ABC):
    """Task in a simulator, run in the calling process and thread.

    reset(seed) -> observe() -> step(action) -> step(action) -> ... -> done
                      '- renders at the call, so a policy with chunks of 8 steps costs one picture in 8
    """

    task: str  # the name that reports use
    prompt: str
    fps: int  # control steps per simulated second
    action_dim: int
    state_dim: int
    max_steps: int
    cameras: tuple[CameraSpec, ...]

    @abstractmethod
    def reset(self, seed: int) -> None:
        """Begin an episode; the start is a function of the seed alone."""

    @abstractmethod
    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Execute one action, float32 [A]; values are clipped to the suite's limits. Raises SimulationError after `done`."""

    @abstractmethod
    def observe(self) -> Observation:
        """Render every camera now and read the state, float32 [S]."""

    @abstractmethod
    def picture(self, height: int, width: int) -> NDArray[np.uint8]:
        """Render the first camera for a video, uint8 [height, width, 3]."""

    def expert_action(self) -> NDArray[np.float32]:
        """Return the scripted expert's action in this state, float32 [A] within the limits. Raises SimulationError without an expert."""
        raise SimulationError(f"{self.task} has no scripted expert")

    def still_action(self) -> NDArray[np.float32]:
        """Return the action that keeps the robot where it is, float32 [A]; zeros where actions are displacements."""
        return np.zeros(self.action_dim, np.float32)

    @abstractmethod
    def close(self) -> None:
        """Free the simulator's memory; only a second `close` may follow."""


class RenderedEnvironment(Environment):
    """Environment whose pictures all come from the simulator's cameras, at any size."""

    @abstractmethod
    def _render(self, source: str, height: int, width: int) -> NDArray[np.uint8]:
        """Render a camera now, uint8 [height, width, 3]."""

    @abstractmethod
    def _robot_state(self) -> NDArray[np.float32]:
        """Read the state, float32 [S]."""

    def observe(self) -> Observation:
        """Render every camera now, then read the state."""
        images = {camera.name: self._render(camera.source, camera.height, camera.width) for camera in self.cameras}
        return Observation(images, self._robot_state(), self.prompt)

    def picture(self, height: int, width: int) -> NDArray[np.uint8]:
        """Render the first camera at another size."""
        return self._render(self.cameras[0].source, height, width)

    def _largest(self, height: int = 0, width: int = 0) -> tuple[int, int]:
        """Return the smallest height and width that hold every camera's picture and one of the given size."""
        return max(height, *(camera.height for camera in self.cameras)), max(width, *(camera.width for camera in self.cameras))
