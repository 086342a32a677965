import io
from pathlib import Path

import av
import numpy as np
import pytest
from demos_help import episode
from numpy.typing import NDArray

from pi0fm.data.pictures.video import decode
from pi0fm.demos.encoding import CODEC, encode, encode_pictures, join_videos
from pi0fm_client.errors import OutputError

FPS = 80


def frames(path: Path, fps: int = FPS) -> tuple[list[int], NDArray[np.uint8]]:
    times, pictures = zip(*decode(path, "pyav"), strict=True)
    return [round(time * fps) for time in times], np.stack(pictures)


def slow_film(length: int) -> NDArray[np.uint8]:
    """A grey ramp that grows brighter by 5 a frame: nothing that an encoder would take for a cut."""
    ramp = np.linspace(0, 200, 48 * 32).reshape(48, 32, 1)
    return np.stack([ramp + 5 * number for number in range(length)]).astype(np.uint8).repeat(3, axis=3)


@pytest.mark.parametrize("lengths", [(1,), (8, 2, 1, 30, 3), (2, 9, 1), (1, 1, 2)])
def test_joined_videos_hold_the_same_pictures_one_after_the_other(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    alone = [encode_pictures(episode("reach-v3", seed, length).images["base"], FPS) for seed, length in enumerate(lengths)]
    join_videos(tmp_path / "joined.mp4", alone, FPS)
    numbers, pictures = frames(tmp_path / "joined.mp4")
    assert numbers == list(range(sum(lengths)))
    expected = []
    for content in alone:
        (tmp_path / "one.mp4").write_bytes(content)
        expected.append(frames(tmp_path / "one.mp4")[1])
    assert np.array_equal(pictures, np.concatenate(expected))


@pytest.mark.parametrize("fps", [10, 30, 80, 11])
def test_times_are_exact_and_the_codec_is_the_one_that_is_promised(tmp_path: Path, fps: int) -> None:
    pictures = slow_film(9)
    join_videos(tmp_path / "joined.mp4", [encode_pictures(pictures, fps)] * 2, fps)
    with av.open(str(tmp_path / "joined.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec.canonical_name == CODEC["vcodec"] and stream.pix_fmt == CODEC["pix_fmt"] and stream.base_rate == fps
        found = [(frame.pts * stream.time_base * fps, frame.key_frame) for frame in container.decode(stream)]
    assert [time for time, _ in found] == list(range(18))
    keys = [number for number, (_, key) in enumerate(found) if key]
    assert keys[0] == 0 and 9 in keys  # where an episode begins
    assert max(np.diff([*keys, 18])) <= CODEC["g"]


def test_encoding_is_a_function_of_the_pictures() -> None:
    random = np.random.default_rng(0)
    found = set()
    for _ in range(20):
        # blocks of all sizes that lately held something: x264 once read what was left in them
        for dirty in [np.full(int(2 ** random.uniform(6, 17)), random.integers(256), np.uint8) for _ in range(400)]:
            del dirty
        found.add(encode(episode("reach-v3", 5), FPS).images["base"].content)
    assert len(found) == 1


def test_pictures_survive(tmp_path: Path) -> None:
    pictures = slow_film(9)
    (tmp_path / "one.mp4").write_bytes(encode_pictures(pictures, FPS))
    assert np.abs(frames(tmp_path / "one.mp4")[1].astype(int) - pictures).mean() < 1.5  # neighbours in time are 5 apart


def test_videos_of_two_sizes_are_not_joined(tmp_path: Path) -> None:
    pictures = episode("reach-v3", 3).images["base"]
    with pytest.raises(OutputError, match="same release of PyAV"):
        join_videos(tmp_path / "joined.mp4", [encode_pictures(pictures, FPS), encode_pictures(pictures[:, :32], FPS)], FPS)


def test_an_mp4_is_bytes_that_start_like_one() -> None:
    content = encode_pictures(episode("reach-v3", 3).images["base"], FPS)
    assert content[4:8] == b"ftyp" and len(av.open(io.BytesIO(content)).streams.video) == 1
