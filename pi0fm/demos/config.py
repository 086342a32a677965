"""Options of a recording of demonstrations.

Owns: `DemosConfig` and its checks. Does not know: how anything is recorded.
"""

from dataclasses import dataclass, field
from pathlib import Path

from pi0fm.machine import cores
from pi0fm.options import option
from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec, parse_cameras
from pi0fm.sim.suite import Suite
from pi0fm_client.errors import ConfigError


@dataclass(frozen=True)
class DatasetName:
    """Name and folder of the data set, by LeRobot's option names."""

    repo_id: str | None = option(None, "name of the data set, USER/NAME; local/SUITE when it is left out")
    root: str | None = option(None, "folder of the data set; outputs/datasets/REPO_ID when it is left out")

    def __post_init__(self) -> None:
        parts = ["local", "x"] if self.repo_id is None else self.repo_id.split("/")
        if len(parts) != 2 or not all(parts) or any(part in (".", "..") for part in parts):
            raise ConfigError(f"dataset.repo_id is USER/NAME, such as local/buttons, found {self.repo_id!r}")


@dataclass(frozen=True)
class DemosConfig:
    """Options of `pi0fm demos`. Raises ConfigError for a value out of range, and for tasks without a scripted expert."""

    tasks: str | tuple[str, ...] = option("button-press-topdown-v3", f"tasks separated by commas, each {catalog.TASK_FORM}")
    episodes: int = option(50, "successful episodes per task; a larger number later continues the recording")
    cameras: str | tuple[str, ...] = option((), "NAME=SOURCE:WIDTHxHEIGHT,... to record; the simulator's default when not given")
    dataset: DatasetName = field(default_factory=DatasetName)
    noise: float | None = option(
        None, "standard deviation of the noise on the executed action; the clean action is stored; the simulator's when not given"
    )
    first_seed: int = option(1000, "each task's first seed; the following ones are taken in order, failures are skipped")
    max_steps: int | None = option(None, "steps after which an episode counts as failed; the tasks' own limit when not given")
    num_workers: int = option(cores, "Ray tasks that simulate at the same time; 0 simulates in the calling process")
    fps: int | None = option(None, "frames per second that the data set states; the simulator's control rate when not given")
    ray_address: str | None = option(None, "address of a running Ray cluster; a local Ray is started when it is left out")

    def __post_init__(self) -> None:
        if not self.task_names or len(set(self.task_names)) != len(self.task_names):
            raise ConfigError(f"tasks must name at least one task, each of them once, found {self.tasks!r}")
        if not self.suite.has_expert:
            raise ConfigError(f"{self.suite.title} has no scripted expert to record; name tasks of another simulator")
        for name, value, least in (
            ("episodes", self.episodes, 1),
            ("first_seed", self.first_seed, 0),
            ("num_workers", self.num_workers, 0),
            ("fps", self.control_rate, 1),
            ("noise", self.noise_level, 0),
        ):
            if not least <= value < 2**31:
                raise ConfigError(f"{name} must be at least {least:g}, found {value}")
        for task in self.task_names:
            self.suite.check(catalog.find(task)[1], self.camera_specs, self.max_steps)

    @property
    def task_names(self) -> tuple[str, ...]:
        """List the tasks by their names in reports."""
        words = self.tasks.split(",") if isinstance(self.tasks, str) else [word for text in self.tasks for word in text.split(",")]
        return tuple(catalog.report_name(task) for task in catalog.expand([word.strip() for word in words if word.strip()]))

    @property
    def suite(self) -> Suite:
        """Simulator of all tasks."""
        return catalog.shared_suite(self.task_names)

    @property
    def camera_specs(self) -> tuple[CameraSpec, ...]:
        """Parse the cameras; the suite's default where none is given."""
        return parse_cameras(self.cameras) if self.cameras else self.suite.default_cameras

    @property
    def noise_level(self) -> float:
        """Standard deviation of the noise on the executed action."""
        return self.suite.expert_noise if self.noise is None else self.noise

    @property
    def control_rate(self) -> int:
        """Frames per second of the data set."""
        return self.suite.fps if self.fps is None else self.fps

    @property
    def step_limit(self) -> int:
        """Steps after which an episode counts as failed."""
        return self.max_steps or max(self.suite.tasks[catalog.find(task)[1]].max_steps for task in self.task_names)

    @property
    def folder(self) -> Path:
        """`dataset.root`, or outputs/datasets/REPO_ID."""
        if self.dataset.root:
            return Path(self.dataset.root).expanduser()
        return Path("outputs/datasets") / (self.dataset.repo_id or f"local/{self.suite.name}")
