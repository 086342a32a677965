"""`pi0fm bench loading` from a drawn data set to its last line, LeRobot's loader included; and a cache built by a task of Ray."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset

from pi0fm.cli.main import main
from pi0fm.cluster.caching import cache_everywhere
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import DatasetConfig, open_source
from pi0fm.data.loading.mixture import MixtureEntry
from pi0fm.data.pictures import frame_cache
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm_client.errors import DatasetError

pytestmark = [pytest.mark.journey, pytest.mark.long]
RATIOS = ("cached_ratio", "cached_of_memcpy", "streaming_of_decode", "build_of_decode")
SMALL = ("--frames", "1400", "--size", "64", "--action_horizon", "8", "--batch_size", "8", "--rounds", "1", "--memory_batches", "40")


def test_the_last_line_has_every_figure(capsys):
    assert main(["bench", "loading", *SMALL]) == 0
    out, err = capsys.readouterr()
    last = json.loads(out.strip().splitlines()[-1])
    for name in RATIOS:
        low, high = last["intervals"][name]
        assert math.isfinite(last[name]) and 0 < low <= last[name] <= high
    assert last["cached_ratio"] > 5  # a smoke test of the order of magnitude: the claim itself is 30, at the full size
    assert last["norm_stats_seconds_per_million_frames"] > 0
    assert (last["frames"], last["action_horizon"], last["lerobot_workers"]) == (1400, 8, 0)
    memory = last["memory_mib"]
    assert 0 < memory["start"] <= memory["peak"] and 0 < memory["end"] <= memory["peak"]
    assert last["streamed_batch_of_decode"] > 0 and 0.5 < last["streamed_frames_a_sample"] < 2
    assert "cached ratio" in err and "memory mib end" in err


def test_lerobot_may_have_worker_processes(capsys):
    assert main(["bench", "loading", *SMALL, "--lerobot_workers", "2"]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["lerobot_workers"] == 2
    assert last["cached_ratio"] > 0 and last["memory_mib"]["peak"] > 0


def test_a_task_of_ray_builds_what_workers_then_open(tmp_path_factory, tmp_path, monkeypatch):
    root = tiny_dataset.written(tmp_path_factory)
    config = DatasetConfig(root=root, cache_dir=tmp_path / "cache", video_decoder="pyav")
    (seconds,) = cache_everywhere([MixtureEntry(config)], 64).values()
    assert seconds > 0
    monkeypatch.setattr(frame_cache._Folder, "build", lambda *_: pytest.fail("built again"))
    cache = open_cache(open_source(config, Embodiment()), config, 64)
    assert cache.gather(np.arange(sum(tiny_dataset.LENGTHS))).any()
    with pytest.raises(DatasetError, match="must be a LeRobot data set"):
        cache_everywhere([MixtureEntry(DatasetConfig(root=Path("/nowhere")))], 64)
