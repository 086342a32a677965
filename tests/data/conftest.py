"""The tiny data set on disk, and one in memory that needs no file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset

from pi0fm.data.chain import make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import LeRobotSource, open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.loading.loader import Collator
from pi0fm.data.pictures.frame_cache import FrameCache
from pi0fm.data.prompt import PromptTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """The data set of tests/support/tiny_dataset.py; copy it before changing it."""
    return tiny_dataset.written(tmp_path_factory)


@pytest.fixture
def tiny_config(tiny_root, tmp_path) -> DatasetConfig:
    """The tiny data set with a cache of this test's own."""
    return DatasetConfig(root=tiny_root, cache_dir=tmp_path / "cache", video_decoder="pyav")


@pytest.fixture
def tiny_source(tiny_config) -> LeRobotSource:
    """The tiny data set, both cameras."""
    return open_source(tiny_config, Embodiment())


LENGTHS = (6, 3, 8)


@pytest.fixture
def memory_source() -> LeRobotSource:
    """Three episodes; action[k] = (k, -k) at frame k, so that a chunk tells where it comes from."""
    total = sum(LENGTHS)
    episode = np.repeat(np.arange(3), LENGTHS)
    random = np.random.default_rng(0)
    return LeRobotSource(
        root=Path("nowhere"),
        repo_id="",
        fps=10.0,
        embodiment=Embodiment(cameras={"base": "observation.images.base"}, state_dim=3, robot_action_dim=2),
        state=random.normal(size=(total, 3)).astype(np.float32),
        action=np.stack([np.arange(total), -np.arange(total)], axis=1).astype(np.float32),
        episode=episode,
        task=episode % 2,
        end=np.cumsum(LENGTHS)[episode],
        frames=np.arange(total),
        tasks=("press it", "open it wide"),
        clips={},
        stored_pictures=(),
        demonstration_seeds={},
        camera_sources={},
        fingerprint="",
        rows=np.arange(total),
        time=np.concatenate([np.arange(length) / 10 for length in LENGTHS]),
    )


@pytest.fixture
def collator(memory_source) -> Collator:
    """Horizon 4, widths 4 (state) and 5 (action); picture k is filled with k."""
    pictures = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None], (17, 8, 8, 3)).copy()
    chain = make_chain(
        memory_source.embodiment,
        memory_source.norm_stats(4),
        PromptTokenizer(load_tokenizer("byt5", 384), 32),
        normalization="z_score",
        floor=1e-3,
        image_size=8,
        padded_state_dim=4,
        padded_action_dim=5,
    )
    return Collator(memory_source, FrameCache((pictures,)), chain, action_horizon=4, action_dim=5, seed=7)


@pytest.fixture
def broken_collator(collator) -> Collator:
    """Its pictures end after frame 8."""
    return replace(collator, cache=FrameCache((collator.cache.cameras[0][:9],)))
