"""A run of ten steps on the tiny data set, which takes 1 to 2 s."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded_curve
import tiny_dataset

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig
from pi0fm.train.components import OptimizerConfig
from pi0fm.train.config import TrainConfig


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """The data set of tests/support/tiny_dataset.py; copy it before changing it."""
    return tiny_dataset.written(tmp_path_factory)


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> Path:
    """One frame cache for all runs."""
    return tmp_path_factory.mktemp("frames")


@pytest.fixture(scope="session")
def configure(tiny_root, frames) -> Callable[..., TrainConfig]:
    """`configure(folder, steps=3, ...)`: the configuration of a run in `folder`."""

    def configured(folder: Path, **change: Any) -> TrainConfig:
        options = {
            "steps": 10,
            "global_batch_size": 8,
            "dataset": DatasetConfig(root=tiny_root, cache_dir=frames, video_decoder="pyav"),
            "embodiment": Embodiment(cameras={"base": "observation.images.base"}),
            "model": tiny_dataset.NETWORK,
            "optimizer": OptimizerConfig(learning_rate=2e-3, warmup_steps=1),
            "ema_decay": 0.9,
            "precision": "float32",
            "execution_horizon": 2,
            "log_every": 1,
            "checkpoint_every": 5,
            "threads": 1,
        }
        return TrainConfig(output_dir=folder, **(options | change))

    return configured


@pytest.fixture
def run(configure, tmp_path) -> Callable[..., TrainConfig]:
    """`run("name", steps=3, ...)`: the configuration of a run in `tmp_path/name`."""
    return lambda name, **change: configure(tmp_path / name, **change)


@pytest.fixture(scope="session")
def curve() -> Callable[[Path], list[dict[str, float]]]:
    """The lines of a run's metrics, without what depends on the machine."""
    return recorded_curve.curve
