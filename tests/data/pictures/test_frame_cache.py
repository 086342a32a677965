"""Tests of decoded frames: built once, completely or not at all, and never used for another data set or camera."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_dataset

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.pictures import decoding, frame_cache
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.pictures.video import choose_decoder, decode
from pi0fm_client.errors import ConfigError, DatasetError, OutputError, Pi0fmError

SIZE = 16
FRAMES = np.arange(sum(tiny_dataset.LENGTHS))


def folders(config) -> list[Path]:
    return sorted(path for path in config.cache_dir.iterdir() if path.is_dir())


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The folders that were built, in order."""
    built: list[Path] = []
    build = frame_cache._ShardBuilder.build

    def counted(folder, config, missing):
        built.append(folder.directory)
        return build(folder, config, missing)

    monkeypatch.setattr(frame_cache._ShardBuilder, "build", counted)
    return built


@pytest.fixture
def broken(tiny_config, tmp_path):
    """(its configuration, its video) of a copy that may be damaged."""
    root = Path(shutil.copytree(tiny_config.root, tmp_path / "broken"))
    return replace(tiny_config, root=root), next(iter(root.rglob("*.mp4")))


def test_the_second_opening_reads_what_the_first_built(tiny_source, tiny_config, builds):
    first, second = (open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES) for _ in range(2))
    assert np.array_equal(first, second)
    assert len(builds) == 1
    (folder,) = folders(tiny_config)
    shards = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.u8"))
    assert shards == ["observation.images.base/00000.u8", "observation.images.wrist/00000.u8"]
    with pytest.raises(ValueError, match="read-only"):
        open_cache(tiny_source, tiny_config, SIZE).cameras[0][0][:] = 0


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """One shard an episode."""
    monkeypatch.setattr(frame_cache, "SHARD_BYTES", 1)


def shards_of(config) -> list[Path]:
    (folder,) = folders(config)
    return sorted(folder.rglob("*.u8"))


def test_shards_are_whole_episodes_and_change_nothing(tiny_source, tiny_config, tmp_path, small_shards, monkeypatch):
    several = open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES)
    assert len(shards_of(tiny_config)) == 2 * len(tiny_dataset.LENGTHS)
    monkeypatch.undo()
    one = open_cache(tiny_source, replace(tiny_config, cache_dir=tmp_path / "other"), SIZE).gather(FRAMES)
    assert np.array_equal(several, one)


def test_a_build_goes_on_where_it_was_interrupted(tiny_source, tiny_config, builds, small_shards):
    whole = open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES)
    lost, *others = shards_of(tiny_config)
    before = {path: path.stat().st_mtime_ns for path in others}
    lost.unlink()
    assert np.array_equal(open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES), whole)
    assert len(builds) == 2
    assert {path: path.stat().st_mtime_ns for path in others} == before


@pytest.mark.parametrize("damage", ["cut", "zeroed", "grown"])
def test_a_torn_shard_is_named_and_rebuilt(tiny_source, tiny_config, small_shards, capsys, damage):
    whole = open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES)
    torn = shards_of(tiny_config)[1]
    content = torn.read_bytes()
    torn.write_bytes({"cut": content[:-100], "zeroed": bytes(4096) + content[4096:], "grown": content + b"more"}[damage])
    assert np.array_equal(open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES), whole)
    assert torn.read_bytes() == content
    assert f"{torn} is torn or was changed" in capsys.readouterr().err


def test_after_a_restart_of_the_machine_all_sums_are_checked(tiny_source, tiny_config, builds, monkeypatch):
    """A crash may tear a file without giving it another size or time."""
    open_cache(tiny_source, tiny_config, SIZE)
    torn = shards_of(tiny_config)[0]
    status, content = torn.stat(), torn.read_bytes()
    torn.write_bytes(bytes(512) + content[512:])
    os.utime(torn, ns=(status.st_atime_ns, status.st_mtime_ns))
    open_cache(tiny_source, tiny_config, SIZE)
    assert len(builds) == 1
    monkeypatch.setattr(frame_cache, "_boot", lambda: "another")
    open_cache(tiny_source, tiny_config, SIZE)
    assert len(builds) == 2 and torn.read_bytes() == content


def test_jpeg_is_smaller_and_close(tiny_source, tiny_config):
    exact, close = (open_cache(tiny_source, tiny_config, 48, form).gather(FRAMES) for form in ("uint8", "jpeg"))
    assert close.shape == exact.shape and close.dtype == np.uint8
    base = np.abs(exact[:, 0].astype(int) - close[:, 0]).mean()
    assert 0 < base < 10  # blocks of random colours are JPEG's worst case
    raw, jpeg = (sum(path.stat().st_size for path in tiny_config.cache_dir.rglob(f"*base/*.{end}")) for end in ("u8", "jpegs"))
    assert jpeg < 0.6 * raw


def test_helpers_decode_what_this_process_does(tiny_source, tiny_config, tmp_path, small_shards, monkeypatch):
    alone = open_cache(tiny_source, tiny_config, 64).gather(FRAMES)
    monkeypatch.setattr(decoding, "FRAMES_WORTH_HELPERS", 0)
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    helped = open_cache(tiny_source, replace(tiny_config, cache_dir=tmp_path / "other"), 64).gather(FRAMES)
    assert np.array_equal(alone, helped)


def test_a_helpers_fault_is_the_data_sets_and_a_killed_one_leaves_what_is_done(broken, monkeypatch, small_shards):
    config, video = broken
    monkeypatch.setattr(decoding, "FRAMES_WORTH_HELPERS", 0)
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    monkeypatch.setattr(decoding.sys, "executable", "/bin/false")
    with pytest.raises(Pi0fmError, match=r"\(a decoding process ended with code 1\); what is decoded is kept"):
        open_cache(open_source(config, Embodiment()), config, SIZE)
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "FRAMES_WORTH_HELPERS", 0)
    monkeypatch.setattr(frame_cache, "SHARD_BYTES", 1)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert str(video) in refused(config)


def test_two_that_build_at_once_build_once(tiny_source, tiny_config, builds):
    """flock holds between any two openings of the lock file, in one process or in two."""
    start = threading.Barrier(2)

    def both(_: int) -> np.ndarray:
        start.wait()
        return open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(both, range(2))
    assert np.array_equal(first, second)
    assert len(builds) == 1


def test_names_of_cameras_are_not_mixed_up(tiny_config):
    """The same columns under other names, or swapped names, are other cameras: the second must not read the first one's files."""
    base, wrist = "observation.images.base", "observation.images.wrist"
    found = {}
    for cameras in ({"a": base, "b": wrist}, {"a": wrist, "b": base}, {"left": base, "right": wrist}):
        source = open_source(tiny_config, Embodiment(cameras=cameras))
        pictures = open_cache(source, tiny_config, SIZE).gather(FRAMES)
        for place, column in enumerate(cameras.values()):
            assert np.array_equal(found.setdefault(column, pictures[:, place]), pictures[:, place])
    assert not np.array_equal(found[base], found[wrist])


def test_another_size_is_another_cache(tiny_source, tiny_config, builds):
    assert open_cache(tiny_source, tiny_config, 8).gather(FRAMES).shape[2:] == (8, 8, 3)
    assert open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES).shape[2:] == (SIZE, SIZE, 3)
    assert len(builds) == 2


def refused(config) -> str:
    """The line; no cache may be left behind."""
    with pytest.raises(DatasetError) as caught:
        open_cache(open_source(config, Embodiment()), config, SIZE)
    assert "\n" not in str(caught.value)
    assert folders(config) == []
    return str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_truncated_video(broken, keep):
    config, video = broken
    video.write_bytes(video.read_bytes()[: int(keep * video.stat().st_size)])
    assert str(video) in refused(config)


def test_a_missing_video(broken):
    config, video = broken
    video.unlink()
    with pytest.raises(DatasetError, match="is missing; download or record"):
        open_source(config, Embodiment())


def test_a_video_with_too_few_frames(broken):
    """It decodes without any fault, but ends early."""
    config, video = broken
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=tiny_dataset.FPS, options={"g": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey * 10, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    line = refused(config)
    assert f"video {video} must show row 21 of episode 2, at 2.100 s, within 0.100 s, found no picture in its span 2.1..2.8 s" in line


def test_a_cache_beyond_the_limit_is_refused(tiny_config):
    assert "dataset.cache_limit_gib is 1e-06; raise it" in refused(replace(tiny_config, cache_limit_gib=1e-6))


def test_torchcodec_decodes_the_same_or_says_why_it_cannot(tiny_root):
    video = next(iter(tiny_root.rglob("*.mp4")))
    try:
        decoder = choose_decoder("torchcodec")
    except ConfigError as error:
        assert "install ffmpeg" in str(error)
        assert choose_decoder("auto") == "pyav"
        return
    assert choose_decoder("auto") == "torchcodec"
    pairs = list(zip(decode(video, "pyav"), decode(video, decoder), strict=True))
    assert [round(ours[0] * tiny_dataset.FPS) for ours, _ in pairs] == FRAMES.tolist()
    assert max(abs(ours[0] - theirs[0]) for ours, theirs in pairs) < 1e-6
    assert max(np.abs(ours[1].astype(int) - theirs[1]).max() for ours, theirs in pairs) <= 1


@pytest.mark.parametrize("start", [0, 1, 7, 8, 26])
def test_decoding_may_begin_anywhere(tiny_root, start):
    """At a key frame (every fourth) or between two; what is asked for and all behind it is there."""
    video = next(iter(tiny_root.rglob("*.mp4")))
    everything = dict(decode(video, "pyav"))
    part = dict(decode(video, "pyav", start / tiny_dataset.FPS))
    assert list(part) == list(everything)[-len(part) :]
    assert min(part) <= start / tiny_dataset.FPS + 1e-6
    assert all(np.array_equal(frame, everything[time]) for time, frame in part.items())


def test_a_place_that_cannot_be_written_is_named_with_the_option(tiny_source, tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^decoded frames: .*file.*--dataset\.cache_dir FOLDER$"):
        open_cache(tiny_source, replace(tiny_config, cache_dir=tmp_path / "file/cache"), SIZE)


def test_a_whole_cache_on_a_read_only_disk_is_used(tiny_source, tiny_config, monkeypatch):
    whole = open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES)
    monkeypatch.setattr(frame_cache.os, "access", lambda path, mode: False)
    monkeypatch.setattr(frame_cache, "_locked", lambda directory: pytest.fail("a lock cannot be made there"))
    assert np.array_equal(open_cache(tiny_source, tiny_config, SIZE).gather(FRAMES), whole)
