"""The drawn data set is a data set, and the options of the measurement are checked; the measurement itself is a journey."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pi0fm.bench import loading
from pi0fm.bench.loading_config import LoadingConfig, make_collator
from pi0fm.bench.loading_data import EPISODE_FRAMES, FPS, draw_episode, write_dataset
from pi0fm.bench.loading_memory import memory_over
from pi0fm.bench.loading_sides import compare_building, compare_streaming, one_processor, scaled
from pi0fm.bench.paired import Ratio
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import DatasetConfig, open_source
from pi0fm.data.pictures.decoding import cores
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm_client.errors import ConfigError

SIZE = 32


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> DatasetConfig:
    folder = tmp_path_factory.mktemp("drawn")
    write_dataset(folder / "set", 2 * EPISODE_FRAMES - 1, SIZE)
    return DatasetConfig(root=folder / "set", cache_dir=folder / "cache", video_decoder="pyav")


def test_a_drawn_data_set_holds_the_episodes_that_were_drawn(drawn):
    source = open_source(drawn, Embodiment())
    assert (len(source.state), source.fps, source.embodiment.dims()) == (2 * EPISODE_FRAMES, FPS, (4, 4))
    pictures = np.asarray(open_cache(source, drawn, SIZE).cameras[0])
    for seed in range(2):
        own = slice(seed * EPISODE_FRAMES, (seed + 1) * EPISODE_FRAMES)
        episode = draw_episode(seed, SIZE)
        assert np.array_equal(source.state[own], episode.state) and np.array_equal(source.action[own], episode.action)
        assert np.abs(pictures[own].astype(int) - episode.images["base"]).mean() < 6  # what the codec costs


def test_episodes_differ_and_move(drawn):
    first, second = (draw_episode(seed, SIZE).images["base"] for seed in range(2))
    assert not np.array_equal(first[0], second[0])
    assert (first[0] != first[-1]).any()


def test_batches_have_the_width_of_pi0(drawn):
    config = LoadingConfig(size=SIZE, batch_size=4, action_horizon=50)
    source = open_source(drawn, Embodiment())
    batch = make_collator(source, open_cache(source, drawn, SIZE), config)(0, 4)
    assert batch.actions.shape == batch.noise[:, 0].shape == (4, 50, 32)
    assert batch.observation.images.shape == (4, 1, SIZE, SIZE, 3)


def test_a_ratio_of_unequal_work_is_scaled():
    """Ten seconds for 4 samples against five seconds for 80."""
    ratio = scaled(Ratio(2.0, 1.0, 3.0, 10.0, 5.0), 4, 80)
    assert (ratio.median, ratio.low, ratio.high) == (40.0, 20.0, 60.0)
    assert (ratio.first_seconds, ratio.second_seconds) == (2.5, 0.0625)


def test_memory_is_looked_at_from_a_tenth_to_the_end(drawn, monkeypatch):
    source = open_source(drawn, Embodiment())
    config = LoadingConfig(size=SIZE, batch_size=4, action_horizon=4, memory_batches=20)
    found = iter([5.0, 9.0, *[6.0] * 16, 7.0])
    monkeypatch.setattr("pi0fm.bench.loading_memory.anonymous_memory_of_tree", lambda: next(found) * 2**20)
    use = memory_over(make_collator(source, open_cache(source, drawn, SIZE), config), config)
    assert (use.start, use.end, use.peak) == (5.0, 7.0, 9.0)
    assert next(found, None) is None


def test_a_stream_is_measured_in_the_middle_of_an_epoch(drawn, monkeypatch, shapes_unchecked):
    """Every frame is decoded about once there, although the buffer holds half of the data set and several epochs are read."""
    source = open_source(drawn, Embodiment())
    monkeypatch.setattr("pi0fm.data.pictures.streaming.SHORTEST_GROUP", 2)
    config = LoadingConfig(size=SIZE, batch_size=4, action_horizon=4, rounds=1)
    found = compare_streaming(source, drawn, config)
    assert found.pictures.median > 0 and found.batches.median > 0
    assert (
        0.7 < found.frames_a_sample < 1.7
    )  # 200 frames in groups of some 6: a few more or less at either end, and a cut decodes one twice
    with pytest.raises(ConfigError, match="raise --frames"):
        compare_streaming(source, drawn, replace(config, batch_size=64))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system keeps no thread on a processor")
def test_one_processor_holds_for_the_threads_that_are_begun_meanwhile_and_ends():
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), one_processor():
        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(os.sched_getaffinity, 0).result() for _ in range(4)]
        assert found == [{min(before)}] * 4 and cores() == 1
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_building_is_measured_on_one_processor_and_on_all(drawn, monkeypatch):
    seen = []
    monkeypatch.setattr("pi0fm.bench.loading_sides.decode_all", lambda *given: seen.append(cores()))
    alone, together = compare_building(open_source(drawn, Embodiment()), drawn, LoadingConfig(size=SIZE, rounds=1))
    assert seen == [1, 1, cores(), cores()]
    assert alone.second_seconds > 0 and together.second_seconds > 0


def test_statistics_are_scaled_to_a_million_frames(monkeypatch):
    clock = iter([5.0, 5.5])
    monkeypatch.setattr(loading, "cpu_seconds_of_tree", lambda: next(clock))
    assert loading.norm_stats_seconds(1000) == pytest.approx(500.0)


@pytest.mark.parametrize(("name", "value"), [("frames", 10), ("rounds", 0), ("lerobot_workers", -1), ("processes", -1), ("size", 129)])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"--{name} must be"):
        LoadingConfig(**{name: value})


def test_the_command_is_listed():
    from pi0fm.cli import bench, bench_loading

    assert "loading" in bench.SUBCOMMANDS
    assert bench_loading.Options is LoadingConfig
    assert Path(bench_loading.__file__).name == "bench_loading.py"
