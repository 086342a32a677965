"""What a recording is asked to be.

Owns: `DemosConfig` and its checks. Does not know: how anything is recorded.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from pi0fm.options import option
from pi0fm.sim.environment import CameraSpec, parse_cameras
from pi0fm.sim.metaworld.environment import FPS, LONGEST_EPISODE, MAX_STEPS, check_task
from pi0fm_client.errors import ConfigError


@dataclass(frozen=True)
class DatasetName:
    """Where the data set lies, in the words of LeRobot's users."""

    repo_id: str = option("local/metaworld", "name of the data set, USER/NAME")
    root: str | None = option(None, "folder of the data set; outputs/datasets/REPO_ID when it is left out")

    def __post_init__(self) -> None:
        parts = self.repo_id.split("/")
        if len(parts) != 2 or not all(parts) or any(part in (".", "..") for part in parts):
            raise ConfigError(f"dataset.repo_id is USER/NAME, such as local/buttons, found {self.repo_id!r}")

    @property
    def folder(self) -> Path:
        """`root`, or outputs/datasets/REPO_ID."""
        return Path(self.root).expanduser() if self.root else Path("outputs/datasets") / self.repo_id


@dataclass(frozen=True)
class DemosConfig:
    """Options of `pi0fm demos`. Raises ConfigError for a value out of range."""

    tasks: str | tuple[str, ...] = option("button-press-topdown-v3", "Meta-World tasks, with commas between them")
    episodes: int = option(50, "successful episodes a task; asking for more later goes on from what is there")
    cameras: str | tuple[str, ...] = option("base=corner2:96x96", "pictures to record, NAME=SOURCE:WIDTHxHEIGHT, with commas between them")
    dataset: DatasetName = field(default_factory=DatasetName)
    noise: float = option(0.3, "standard deviation of the noise on the executed action; the clean action is stored")
    first_seed: int = option(1000, "each task's first seed; the following ones are taken in order, failures are skipped")
    max_steps: int = option(MAX_STEPS, f"steps after which an episode counts as failed, 1 to {LONGEST_EPISODE}")
    num_workers: int = option(lambda: os.cpu_count() or 1, "Ray tasks that simulate at the same time; 0 simulates in the calling process")
    fps: int = option(FPS, "frames a second that the data set claims; the simulator makes 80 control steps a second")
    ray_address: str | None = option(None, "address of a running Ray cluster; a local Ray is started when it is left out")

    def __post_init__(self) -> None:
        for task in self.task_names:
            check_task(task)
        if not self.task_names or len(set(self.task_names)) != len(self.task_names):
            raise ConfigError(f"tasks must name at least one task, each of them once, found {self.tasks!r}")
        parse_cameras(self.cameras)
        low: tuple[tuple[str, float, float], ...] = (("episodes", self.episodes, 1), ("first_seed", self.first_seed, 0))
        low += (("num_workers", self.num_workers, 0), ("fps", self.fps, 1), ("noise", self.noise, 0))
        for name, value, least in low:
            if not least <= value < 2**31:
                raise ConfigError(f"{name} must be at least {least:g}, found {value}")
        if not 1 <= self.max_steps <= LONGEST_EPISODE:
            raise ConfigError(f"max_steps must be from 1 to {LONGEST_EPISODE}, found {self.max_steps}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, whichever way they were typed."""
        words = self.tasks.split(",") if isinstance(self.tasks, str) else [word for text in self.tasks for word in text.split(",")]
        return tuple(word.strip() for word in words if word.strip())

    @property
    def camera_specs(self) -> tuple[CameraSpec, ...]:
        """The cameras, parsed."""
        return parse_cameras(self.cameras)
