"""Tests that the stream shows the same pictures as the cache, in the stream's order, within its memory."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.pictures import streaming
from pi0fm.data.pictures.frame_cache import FrameCache, open_cache
from pi0fm.data.pictures.streaming import FrameStream, group_ends, open_pictures
from pi0fm_client.errors import ConfigError, DatasetError

SIZE, BATCH = 64, 4
TOTAL = sum(tiny_dataset.LENGTHS)
BYTES = SIZE * SIZE * 3
VIDEO = Embodiment(cameras={"base": "observation.images.base"})


@pytest.fixture
def short_groups(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "SHORTEST_GROUP", 2)
    monkeypatch.setattr(streaming, "LONGEST_GROUP", 2)


@pytest.fixture
def opened(tiny_config, short_groups):
    """`opened(frames)`: a stream with room for `frames` frames; its threads end with the test."""
    streams = []

    def make(frames: int) -> FrameStream:
        streams.append(FrameStream(open_source(tiny_config, VIDEO), tiny_config, SIZE, BATCH, frames * BYTES / 2**30))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pi0fm-stream")]


def test_the_stream_shows_what_the_cache_does(tiny_config, opened):
    source = open_source(tiny_config, VIDEO)
    expected = open_cache(source, tiny_config, SIZE).gather(np.arange(TOTAL))
    stream = opened(48)
    for frames in np.random.default_rng(0).integers(0, TOTAL, (12, BATCH)):
        assert np.array_equal(stream.gather(frames), expected[frames])


def test_memory_is_bounded_whatever_is_asked_and_expected(opened):
    stream = opened(48)
    assert stream.capacity == 48
    for first in range(0, 10 * TOTAL, BATCH):
        frames = stream.order.samples_at(1, TOTAL, np.arange(first, first + BATCH)).index
        stream.gather(frames)
        stream.announce(stream.order.samples_at(1, TOTAL, np.arange(first, first + BATCH) + stream.look_ahead).index)
        assert stream.frames_held <= stream.capacity


def test_in_its_own_order_nothing_is_decoded_twice_an_epoch(tiny_config, opened, monkeypatch):
    """But for the groups that a cut between lanes or windows goes through."""
    stream = opened(48)
    decoded = []
    monkeypatch.setattr(stream, "_decode", lambda group, decode=stream._decode: decoded.append(group) or decode(group))
    for first in range(0, TOTAL, BATCH):
        stream.gather(stream.order.samples_at(1, TOTAL, np.arange(first, first + BATCH)).index)
    assert set(decoded) == set(range(len(group_ends(open_source(tiny_config, VIDEO), 2))))
    assert len(decoded) <= len(set(decoded)) + 4


def test_what_is_expected_is_there_when_it_is_asked_for(opened, monkeypatch):
    stream = opened(48)
    stream.announce(np.array([5, 9]))
    held = dict(stream._held)
    assert len(held) == 2
    monkeypatch.setattr(stream, "_start", lambda *_: pytest.fail("decoded again"))
    stream.gather(np.array([9, 5]))


def test_groups_are_frames_of_neighbouring_episodes(tiny_source):
    assert group_ends(tiny_source, 100).tolist() == [28]
    assert group_ends(tiny_source, 21).tolist() == [21, 28]
    assert group_ends(tiny_source, 12).tolist() == [12, 21, 28]
    assert group_ends(tiny_source, 5).tolist() == [4, 8, 12, 16, 21, 24, 28]


def test_beyond_the_limit_the_run_streams_and_says_so(tiny_config, short_groups, capsys):
    source = open_source(tiny_config, VIDEO)
    assert isinstance(open_pictures(source, tiny_config, SIZE, BATCH), FrameCache)
    stream = open_pictures(source, replace(tiny_config, cache_limit_gib=1e-4), SIZE, BATCH, buffer_gib=48 * BYTES / 2**30)
    assert isinstance(stream, FrameStream)
    stream.close()
    assert "streaming from the videos with a buffer of" in capsys.readouterr().err


def test_pictures_in_parquet_and_small_buffers_are_refused(tiny_source, tiny_config):
    with pytest.raises(DatasetError, match="keeps pictures of wrist in parquet files"):
        FrameStream(tiny_source, tiny_config, SIZE, BATCH, 1.0)
    with pytest.raises(ConfigError, match="needs a buffer of"):
        FrameStream(open_source(tiny_config, VIDEO), tiny_config, SIZE, BATCH, 1e-4)


def test_an_unreadable_video_is_named_when_it_is_reached(tiny_config, opened):
    stream = opened(48)
    later = tuple(replace(clip, begin=clip.begin + 1, end=clip.end + 1) for clip in stream._source.clips["base"])
    stream._source = replace(stream._source, clips={"base": later})
    with pytest.raises(DatasetError, match=r"file-000\.mp4 must show row 2. of episode 2"):
        stream.gather(np.array([TOTAL - 1]))
