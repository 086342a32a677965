"""One file with the pictures of one camera over a stretch of a data set, and the check that it is whole.

Owns: the file's layout, its checksum, reading a picture from its memory map. Does not know: data sets, videos, who asks.

    uint8    picture 0 | picture 1 | ... | trailer              size^2 * 3 bytes each: a picture is a slice of the memory map
    JPEG     picture 0 | picture 1 | ... | offsets | trailer    offsets: int64 [count + 1]
    trailer  magic, bytes before it, checksum of those, count

A file appears whole or not at all (written aside, fsynced, renamed), so a torn one comes from a crashed machine or a full disk.
"""

import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pi0fm import files

CacheFormat = Literal["uint8", "jpeg"]
SUFFIX = {"uint8": "u8", "jpeg": "jpegs"}
JPEG_QUALITY = 95
_MAGIC = b"pi0fm-01"
_TRAILER = struct.Struct("<8sQII")
_BLOCK = 4096
_BUFFERED = 16  # pictures summed and written together: few enough to stay in the processor's cache until written


class JpegShard:
    """The pictures uint8 [size, size, 3] of one file that holds them as JPEG; indices count from 0 inside it."""

    def __init__(self, payload: NDArray[np.uint8], count: int) -> None:
        self._payload = payload
        self._offsets = payload[len(payload) - 8 * (count + 1) :].view(np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        from PIL import Image

        encoded = self._payload[self._offsets[index] : self._offsets[index + 1]]
        with Image.open(io.BytesIO(encoded.tobytes())) as picture:
            return np.asarray(picture)


def write_shard(path: Path, pictures: Iterable[NDArray[np.uint8]], size: int, form: CacheFormat) -> None:
    """Write pictures uint8 [size, size, 3] as they come; a reader of `path` sees all of them or nothing."""
    with files.new_file(path) as file:
        length, check, count = (_write_raw if form == "uint8" else _write_jpegs)(file, pictures, size)
        file.write(_TRAILER.pack(_MAGIC, length, check, count))


def _write_raw(file: BinaryIO, pictures: Iterable[NDArray[np.uint8]], size: int) -> tuple[int, int, int]:
    """(bytes, checksum, pictures) written."""
    buffer = np.empty((_BUFFERED, size, size, 3), np.uint8)
    length = check = count = filled = 0

    def flush() -> None:
        nonlocal length, check
        content = buffer[:filled].reshape(-1)
        file.write(content.data)
        length, check = length + len(content), checksum(content, check)

    for picture in pictures:
        buffer[filled] = picture
        filled, count = filled + 1, count + 1
        if filled == _BUFFERED:
            flush()
            filled = 0
    if filled:
        flush()
    return length, check, count


def _write_jpegs(file: BinaryIO, pictures: Iterable[NDArray[np.uint8]], size: int) -> tuple[int, int, int]:
    del size
    encoded = [_jpeg(picture) for picture in pictures]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    padding = b"\0" * (-int(offsets[-1]) % 8)  # a view of int64 must be aligned
    payload = np.frombuffer(b"".join([*encoded, padding, offsets.tobytes()]), np.uint8)
    file.write(payload.data)
    return len(payload), checksum(payload), len(encoded)


def open_shard(path: Path, size: int, form: CacheFormat) -> NDArray[np.uint8] | JpegShard:
    """Open a file that `is_whole` accepted: an array uint8 [n, size, size, 3] for uint8, a `JpegShard` for JPEG."""
    content = _map(path)
    count = _trailer(content)[3]
    payload = content[: -_TRAILER.size]
    return payload.reshape(count, size, size, 3) if form == "uint8" else JpegShard(payload, count)


def is_whole(path: Path, count: int, size: int, form: CacheFormat, *, sums: bool) -> bool:
    """Whether the file is there with `count` pictures and its full length; with `sums`, whether its bytes are those written, too."""
    if not path.is_file() or path.stat().st_size < _TRAILER.size:
        return False
    content = _map(path)
    magic, length, check, found = _trailer(content)
    if (magic, length + _TRAILER.size, found) != (_MAGIC, len(content), count):
        return False
    if form == "uint8" and length != count * size * size * 3:
        return False
    if not sums:
        return True
    step = _BUFFERED * size * size * 3 if form == "uint8" else length
    summed = 0
    for first in range(0, length, max(step, 1)):
        summed = checksum(content[first : min(first + step, length)], summed)
    return summed == check


def checksum(payload: NDArray[np.uint8], before: int = 0) -> int:
    """CRC-32 of the 64-bit sums of blocks of 4 KiB: as fast as memory, where a CRC of all bytes costs a fifth of decoding.

    before: the checksum of the piece before this one.
    """
    whole = len(payload) // _BLOCK * _BLOCK
    sums = payload[:whole].view(np.uint64).reshape(-1, _BLOCK // 8).sum(axis=1, dtype=np.uint64)
    return zlib.crc32(payload[whole:].tobytes(), zlib.crc32(sums.tobytes(), before))


class ShardedFrames:
    """Pictures of one camera over a whole data set, indexed as one array uint8 [N, size, size, 3]."""

    def __init__(self, firsts: Sequence[int], shards: Sequence[NDArray[np.uint8] | JpegShard], size: int) -> None:
        self._firsts, self._shards = np.asarray(firsts, dtype=np.int64), tuple(shards)
        self.shape = (int(self._firsts[-1]) + len(self._shards[-1]), size, size, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        number = int(index)
        if not 0 <= number < len(self):
            raise IndexError(f"frame {number} of {len(self)}")
        place = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._shards[place][number - int(self._firsts[place])]

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.uint8]:
        everything = np.empty(self.shape, np.uint8)
        self.read(np.arange(len(self)), everything)
        return everything

    def read(self, frames: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write the given frames into `out`, uint8 [B, size, size, 3] with any strides. Raises IndexError for one that is not there."""
        if len(frames) and not 0 <= int(frames.min()) <= int(frames.max()) < len(self):
            raise IndexError(f"frames {frames.min()}..{frames.max()} of {len(self)}")
        places = np.searchsorted(self._firsts, frames, side="right") - 1
        inside = frames - self._firsts[places]
        # a loop over large rows is as fast as numpy's indexing, and writes directly into the batch
        for row, (place, index) in enumerate(zip(places.tolist(), inside.tolist(), strict=True)):
            out[row] = self._shards[place][index]


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _map(path: Path) -> NDArray[np.uint8]:
    # np.memmap's own class costs microseconds at every slice
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _trailer(content: NDArray[np.uint8]) -> tuple[bytes, int, int, int]:
    magic, length, check, count = _TRAILER.unpack(content[-_TRAILER.size :].tobytes())
    return magic, length, check, count
