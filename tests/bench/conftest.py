"""A synthetic recording of two tasks, and a small run on it, for comparisons of learning."""

from collections.abc import Callable
from pathlib import Path

import demos_help
import pytest
from learning_help import NETWORK

from pi0fm.data.config import DatasetConfig
from pi0fm.demos.record import record
from pi0fm.train.components import OptimizerConfig
from pi0fm.train.config import TrainConfig


@pytest.fixture(scope="session")
def recorded_root(tmp_path_factory) -> Path:
    """Three episodes of reach-v3 and three of door-open-v3, of eight frames each."""
    root = tmp_path_factory.mktemp("learning") / "set"
    record(demos_help.config(root), demos_help.submit, 1)
    return root


@pytest.fixture(scope="session")
def learning_run(recorded_root, tmp_path_factory) -> Callable[..., TrainConfig]:
    """`learning_run(steps=3, ...)`: a small run on that data set, not yet at LeRobot's shape."""
    cache = tmp_path_factory.mktemp("learning-frames")

    def configured(**change) -> TrainConfig:
        options = {
            "dataset": DatasetConfig(root=recorded_root, cache_dir=cache, video_decoder="pyav"),
            "model": NETWORK,
            "global_batch_size": 4,
            "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            "ema_decay": 0.9,
            "precision": "float32",
            "execution_horizon": 2,
            "threads": 1,
        }
        return TrainConfig(**(options | change))

    return configured
