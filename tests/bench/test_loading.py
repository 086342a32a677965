"""Tests of the generated data set and of the timed part of each side; the measurement is tested as a journey."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pi0fm.bench import loading
from pi0fm.bench.config import LoadingOptions
from pi0fm.bench.loading import EPISODE_FRAMES, FPS, draw_episode, make_collator, one_processor, write_dataset
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.decoding import cores
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm_client.errors import ConfigError

OPTIONS = LoadingOptions(size=32, batch_size=4, action_horizon=4, rounds=1, memory_batches=20)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> DatasetConfig:
    folder = tmp_path_factory.mktemp("drawn")
    write_dataset(folder / "set", 2 * EPISODE_FRAMES - 1, 32)
    return DatasetConfig(root=folder / "set", cache_dir=folder / "cache", video_decoder="pyav")


@pytest.fixture(scope="module")
def source(drawn):
    return open_source(drawn, Embodiment())


@pytest.fixture(scope="module")
def collator(source, drawn):
    return make_collator(source, open_cache(source, drawn, 32), OPTIONS)


def test_a_drawn_data_set_holds_the_episodes_that_were_drawn(source, collator):
    assert (len(source.state), source.fps, source.embodiment.dims()) == (2 * EPISODE_FRAMES, FPS, (4, 4))
    pictures = np.asarray(collator.cache.cameras[0])
    for seed in range(2):
        own, episode = slice(seed * EPISODE_FRAMES, (seed + 1) * EPISODE_FRAMES), draw_episode(seed, 32)
        assert np.array_equal(source.state[own], episode.state) and np.array_equal(source.action[own], episode.action)
        assert np.abs(pictures[own].astype(int) - episode.images["base"]).mean() < 6  # what the codec costs
    first, second = (draw_episode(seed, 32).images["base"] for seed in range(2))
    assert not np.array_equal(first[0], second[0])
    assert (first[0] != first[-1]).any()


def test_batches_have_the_width_of_pi0(collator):
    batch = collator(0, 4)
    assert batch.actions.shape == batch.noise[:, 0].shape == (4, 4, 32)
    assert batch.observation.images.shape == (4, 1, 32, 32, 3)


def test_memory_is_looked_at_from_a_tenth_to_the_end(collator, monkeypatch):
    found = iter([5.0, 9.0, *[6.0] * 16, 7.0])
    monkeypatch.setattr(loading, "anonymous_memory_of_tree", lambda: next(found) * 2**20)
    assert loading.memory_over(collator, OPTIONS) == {"start": 5.0, "end": 7.0, "peak": 9.0}
    assert next(found, None) is None


def test_a_stream_is_measured_in_the_middle_of_an_epoch(source, drawn, monkeypatch, shapes_unchecked):
    """Every frame is decoded about once there, although the buffer holds half of the data set and several epochs are read."""
    monkeypatch.setattr("pi0fm.data.pictures.streaming.SHORTEST_GROUP", 2)
    pictures, batches, decoded = loading.compare_streaming(source, drawn, OPTIONS)
    assert pictures.median > 0 and batches.median > 0
    assert 0.7 < decoded < 1.7  # 200 frames in groups of some 6: a few more or less at either end, and a cut decodes one twice
    with pytest.raises(ConfigError, match="raise --frames"):
        loading.compare_streaming(source, drawn, replace(OPTIONS, batch_size=64))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system keeps no thread on a processor")
def test_one_processor_holds_for_the_threads_that_are_begun_meanwhile_and_ends():
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), one_processor():
        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(os.sched_getaffinity, 0).result() for _ in range(4)]
        assert found == [{min(before)}] * 4 and cores() == 1
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_building_is_measured_on_one_processor_and_on_all(source, drawn, monkeypatch):
    seen = []
    monkeypatch.setattr(loading, "decode_all", lambda *given: seen.append(cores()))
    alone, together = loading.compare_building(source, drawn, OPTIONS)
    assert seen == [1, 1, cores(), cores()]
    assert alone.second_seconds > 0 and together.second_seconds > 0


def test_statistics_are_scaled_to_a_million_frames(monkeypatch):
    clock = iter([5.0, 5.5])
    monkeypatch.setattr(loading, "cpu_seconds_of_tree", lambda: next(clock))
    assert loading.norm_stats_seconds(1000) == pytest.approx(500.0)
