"""What a comparison of learning is asked to be.

Owns: `LearningConfig` and its ranges, what of a training configuration has no place in it. Does not know: how anything is trained or
judged; it imports nothing heavy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0fm.data.columns.lerobot_source import DatasetConfig
from pi0fm.options import option
from pi0fm.sim import catalog
from pi0fm_client.errors import ConfigError

SIDES = ("pi0fm", "lerobot")

# Of pi0fm's training configuration: what both sides' training from scratch, on all of one task's demonstrations, would pass over.
PASSED_OVER = (
    *("validation", "mixture", "pretrained", "pretrained_norm_stats", "train_only", "lora", "frozen_bfloat16"),
    *("activation_checkpointing", "augment", "augmentation", "resume"),
)


@dataclass(frozen=True)
class LearningConfig:
    """Options of `pi0fm bench learning`. Raises ConfigError for a value out of range."""

    task: str = option("button-press-topdown-v3", f"task that both sides learn, {catalog.TASK_FORM}")
    cpu_seconds: float = option(240.0, "processor seconds of each training, of all its threads and processes")
    lerobot_cpu_seconds: float | None = option(None, "of LeRobot's trainings; empty takes cpu_seconds, 0 leaves them out")
    steps: int | None = option(
        None, "optimiser steps of each training, instead of processor seconds: the same policies however busy the machine is"
    )
    seeds: int = option(3, "trainings of each side, with seeds 0 to K - 1")
    demonstrations: int = option(50, "episodes to record when no data set is named")
    episodes: int = option(20, "start positions that judge each policy; none of them was demonstrated")
    first_seed: int = option(1, "seed of the first start position; the others follow one by one")
    max_steps: int = option(400, "an episode that has not succeeded by then is a failure")
    threads: int = option(1, "torch's CPU threads, of both sides")
    config: Path | None = option(None, "training configuration of pi0fm's side; configs/quickstart.yaml when not given")
    dataset: DatasetConfig = option(DatasetConfig, "")
    output_dir: Path = option(Path("outputs/bench-learning"), "folder of learning.json, and of the recorded data set")

    def __post_init__(self) -> None:
        catalog.find(self.task)
        object.__setattr__(self, "task", catalog.report_name(self.task))
        if not 0 < self.cpu_seconds < float("inf"):
            raise ConfigError(f"cpu_seconds must be above 0, found {self.cpu_seconds:g}; type --cpu_seconds 240")
        if self.lerobot_cpu_seconds is not None and not 0 <= self.lerobot_cpu_seconds < float("inf"):
            raise ConfigError(
                f"lerobot_cpu_seconds must be 0 or more, found {self.lerobot_cpu_seconds:g}; leave it out for cpu_seconds, "
                "or type 0 to train pi0fm's side only"
            )
        least_of = {"steps": 1, "seeds": 1, "demonstrations": 1, "episodes": 1, "first_seed": 0, "max_steps": 1, "threads": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be {least} or more, found {value}; type --{name} {least} or leave it out")
        if self.steps is not None and (self.cpu_seconds != LearningConfig.cpu_seconds or self.lerobot_cpu_seconds not in {None, 0}):
            raise ConfigError(
                f"steps or processor seconds end a training: found --steps {self.steps} beside --cpu_seconds {self.cpu_seconds:g} and "
                f"--lerobot_cpu_seconds {self.lerobot_cpu_seconds}; leave one out (--lerobot_cpu_seconds 0 may stay)"
            )

    def budget(self, side: str) -> float:
        """CPU-seconds of one training of `side`, pi0fm or lerobot; infinite where its steps are counted."""
        if self.steps is not None:
            return float("inf")
        return self.lerobot_cpu_seconds if side == "lerobot" and self.lerobot_cpu_seconds is not None else self.cpu_seconds

    @property
    def sides(self) -> tuple[str, ...]:
        """Who trains: both, or pi0fm's side alone."""
        return SIDES[:1] if self.lerobot_cpu_seconds == 0 else SIDES

    @property
    def recorded(self) -> bool:
        """Whether the demonstrations are this command's own."""
        return self.dataset.root is None and not self.dataset.repo_id


def refuse_passed_over(run: Any) -> None:
    """Raise ConfigError for options of the training configuration `run` that a comparison would not honour."""
    usual = type(run)()
    given = [name for name in PASSED_OVER if getattr(run, name) != getattr(usual, name)]
    if given:
        raise ConfigError(
            f"a comparison trains both sides from scratch on all of one task's demonstrations, and judges them in the simulator: "
            f"found {', '.join(given)} in --config; leave {'it' if len(given) == 1 else 'them'} out"
        )
