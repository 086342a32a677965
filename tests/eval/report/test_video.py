"""The mp4: codec, size, count, speed, index in front."""

import io

import av
import numpy as np
import pytest

from pi0fm.eval.report import video


def frames(count, height=64, width=48):
    return [np.full((height, width, 3), (40 * k % 256, 90, 200 - 10 * k), np.uint8) for k in range(count)]


def test_every_frame_comes_back_in_its_colour():
    sent = frames(7)
    with av.open(io.BytesIO(video.encode(sent, 10.0))) as container:
        stream = container.streams.video[0]
        received = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 10.0
    assert len(received) == 7
    for before, after in zip(sent, received, strict=True):
        assert np.abs(before.astype(int) - after.astype(int)).mean() < 4


def test_odd_sizes_become_even_and_a_fast_robot_is_slowed():
    with av.open(io.BytesIO(video.encode(frames(3, 65, 49), 80.0))) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, float(stream.average_rate)) == (64, 48, 20.0)


def test_the_index_stands_before_the_pictures():
    content = video.encode(frames(5), 20.0)
    assert content.index(b"moov") < content.index(b"mdat")


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="one frame or more"):
        video.encode([], 20.0)
