"""Tests of a shard's file: it reads back as written, and damaged files are refused."""

import numpy as np
import pytest

from pi0fm.data.pictures.shards import ShardedFrames, checksum, is_whole, open_shard, write_shard

SIZE = 12  # 432 bytes a picture: no whole number of blocks


def pictures(count: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_raw_pictures_come_back_bit_for_bit(tmp_path, count):
    path, written = tmp_path / "a" / "0.u8", pictures(count)
    write_shard(path, iter(written), SIZE, "uint8")
    assert np.array_equal(open_shard(path, SIZE, "uint8"), written)
    assert is_whole(path, count, SIZE, "uint8", sums=True)
    assert [found.name for found in path.parent.iterdir()] == ["0.u8"]


def test_jpegs_come_back_close(tmp_path):
    path, written = tmp_path / "0.jpegs", pictures(5)
    write_shard(path, iter(written), SIZE, "jpeg")
    shard = open_shard(path, SIZE, "jpeg")
    assert len(shard) == 5 and is_whole(path, 5, SIZE, "jpeg", sums=True)
    for number in (4, 0, 2):
        assert shard[number].shape == (SIZE, SIZE, 3)
        assert np.abs(shard[number].astype(int) - written[number]).mean() < 12


@pytest.mark.parametrize("form", ["uint8", "jpeg"])
def test_every_flipped_byte_is_seen(tmp_path, form):
    path = tmp_path / "0"
    write_shard(path, iter(pictures(70)), SIZE, form)
    content = path.read_bytes()
    for place in (0, 100, len(content) // 2, len(content) - 30, len(content) - 10):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_whole(path, 70, SIZE, form, sums=True), place


def test_what_is_cut_empty_missing_or_of_another_number_is_not_whole(tmp_path):
    path = tmp_path / "0.u8"
    assert not is_whole(path, 3, SIZE, "uint8", sums=False)
    write_shard(path, iter(pictures(3)), SIZE, "uint8")
    assert is_whole(path, 3, SIZE, "uint8", sums=False)
    assert not is_whole(path, 4, SIZE, "uint8", sums=False)
    assert not is_whole(path, 3, SIZE + 1, "uint8", sums=False)
    content = path.read_bytes()
    for kept in (0, 10, 500, len(content) - 1):
        path.write_bytes(content[:kept])
        assert not is_whole(path, 3, SIZE, "uint8", sums=False)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield pictures(1)[0]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_shard(tmp_path / "0.u8", failing(), SIZE, "uint8")
    assert not list(tmp_path.iterdir())


def test_blocks_that_change_places_change_the_sum():
    payload = np.random.default_rng(0).integers(0, 256, 3 * 4096, dtype=np.uint8)
    swapped = np.concatenate([payload[4096:8192], payload[:4096], payload[8192:]])
    assert checksum(swapped) != checksum(payload)
    assert checksum(payload[4096:], checksum(payload[:4096])) == checksum(payload)


def test_shards_read_as_one_array():
    whole = pictures(10)
    frames = ShardedFrames([0, 4, 9], [whole[:4], whole[4:9], whole[9:]], SIZE)
    assert len(frames) == 10 and np.array_equal(np.asarray(frames), whole)
    out = np.empty((4, 2, SIZE, SIZE, 3), np.uint8)
    frames.read(np.array([9, 0, 4, 3]), out[:, 1])
    assert np.array_equal(out[:, 1], whole[[9, 0, 4, 3]])
    assert np.array_equal(frames[8], whole[8])
    for wrong in (np.array([10]), np.array([-1])):
        with pytest.raises(IndexError):
            frames.read(wrong, out[:1, 0])
        with pytest.raises(IndexError):
            frames[int(wrong[0])]
