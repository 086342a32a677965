"""Test of a frame cache that a Ray task builds and workers open."""

from pathlib import Path

import numpy as np
import pytest
import tiny_dataset

from pi0fm.cluster.caching import cache_everywhere
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig, MixtureEntry
from pi0fm.data.pictures import frame_cache
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm_client.errors import DatasetError

pytestmark = [pytest.mark.journey, pytest.mark.long]


def test_a_task_of_ray_builds_what_workers_then_open(tmp_path_factory, tmp_path, monkeypatch):
    root = tiny_dataset.written(tmp_path_factory)
    config = DatasetConfig(root=root, cache_dir=tmp_path / "cache", video_decoder="pyav")
    (seconds,) = cache_everywhere([MixtureEntry(config)], 64).values()
    assert seconds > 0
    monkeypatch.setattr(frame_cache._ShardBuilder, "build", lambda *_: pytest.fail("built again"))
    cache = open_cache(open_source(config, Embodiment()), config, 64)
    assert cache.gather(np.arange(sum(tiny_dataset.LENGTHS))).any()
    with pytest.raises(DatasetError, match="must be a LeRobot data set"):
        cache_everywhere([MixtureEntry(DatasetConfig(root=Path("/nowhere")))], 64)
