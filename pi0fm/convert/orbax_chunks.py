"""Arrays of a zarr store, read entry by entry and decoded as a stream: no chunk is ever whole in memory.

Owns: the location of a chunk's bytes on disk, the order of its numbers. Does not know: orbax's names of arrays (convert/orbax).

orbax writes one chunk for each device that held the array, so a chunk may be all layers of a matrix: gigabytes. tensorstore holds the
decoded chunk, its encoded bytes and the requested array at the same time. Here each chunk is a stream:

    chunk 0   layer 0 | layer 1 | layer 2 | ...      entry (1,) of the array: layer 1 of both chunks, side by side
    chunk 1   layer 0 | layer 1 | layer 2 | ...      read in order, each chunk is decoded once, front to back
                      ^ the position of each stream after entry (0,)

A store of plain files has one file per chunk. In OCDBT a chunk is a byte range of a larger file, found through a tree of nodes:

    manifest -> newest version -> node -> ... -> node: key -> value:BASE:FILE:OFFSET:LENGTH
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

PACKED_BYTES = 2**20  # read from a file at a time
ROWS_BYTES = 2**20  # decoded at a time where the rows of a chunk are not contiguous in the array
PACKINGS = {"zstd": "zstd", None: None}

Index = tuple[int, ...]


@dataclass(frozen=True)
class ByteRange:
    """Byte range of a file: `length` bytes from `start`."""

    file: Path
    start: int
    length: int


Find = Callable[[str], ByteRange | None]
"""Key of the store -> its byte range; None where its value is not one, such as a value inside a node."""


def find_in_files(root: Path) -> Find:
    """Return the lookup of a store whose keys are files under `root`."""

    def find(key: str) -> ByteRange | None:
        file = root / key
        return ByteRange(file, 0, file.stat().st_size) if file.is_file() else None

    return find


def find_in_tree(root: Path, store: Any, dump: Callable[..., Any]) -> Find:
    """Return the lookup of an OCDBT store. store: tensorstore's view of the files under `root`; dump: tensorstore.ocdbt.dump.

    Raises ValueError for a tree that is damaged, or that names a file outside `root`.
    """
    places = dict(_values(root, store, dump))
    return lambda key: places.get(key.encode())


def array_stream(array: Any, name: str, find: Find) -> "ArrayStream | None":
    """Return the stream of a tensorstore array with the key `name`; None for a layout that only tensorstore can read."""
    spec = array.spec().to_json()
    layout = spec.get("metadata", {})
    plain = (
        spec.get("driver") == "zarr"
        and layout.get("order") == "C"
        and not layout.get("filters")
        and str(layout.get("dtype")).startswith(("<", "bfloat16"))
        and (layout.get("compressor") or {}).get("id") in PACKINGS
    )
    if not plain:
        return None
    chunk = tuple(layout["chunks"])
    separator = layout.get("dimension_separator", ".")
    byte_ranges: dict[Index, ByteRange] = {}
    for place in itertools.product(*(range(-(-size // step)) for size, step in zip(array.shape, chunk, strict=True))):
        byte_range = find(f"{name}/{separator.join(map(str, place)) or '0'}")
        if byte_range is None:
            return None
        byte_ranges[place] = byte_range
    packing = PACKINGS[(layout.get("compressor") or {}).get("id")]
    return ArrayStream(tuple(array.shape), chunk, array.dtype.numpy_dtype, packing, byte_ranges)


@final
class ArrayStream:
    """Array whose chunks are streams."""

    def __init__(
        self, shape: Index, chunk: Index, dtype: np.dtype[Any], packing: str | None, byte_ranges: Mapping[Index, ByteRange]
    ) -> None:
        self._shape, self._chunk, self._dtype = shape, chunk, dtype
        self._packing, self._byte_ranges = packing, byte_ranges
        self._open: dict[Index, _ChunkStream] = {}

    def read(self, index: Index) -> NDArray[Any]:
        """Read entry `index` of the leading axes. In ascending order every chunk is decoded once; a step back decodes from the start.

        Raises ValueError or OSError for a truncated or damaged chunk.
        """
        leading = len(index)
        place = tuple(at // step for at, step in zip(index, self._chunk, strict=False))
        inside = tuple(at % step for at, step in zip(index, self._chunk, strict=False))
        found: NDArray[Any] = np.empty(self._shape[leading:], self._dtype)
        self._open = {where: stream for where, stream in self._open.items() if where[:leading] == place}
        entry = self._chunk[leading:]
        for where in (where for where in self._byte_ranges if where[:leading] == place):
            first = int(np.ravel_multi_index(inside, self._chunk[:leading])) * math.prod(entry) if leading else 0
            stream = self._open.get(where)
            if stream is None or stream.position > first:
                stream = self._open[where] = _ChunkStream(self._byte_ranges[where], self._packing, self._dtype)
            stream.skip(first - stream.position)
            corner: list[Any] = [slice(at * step, (at + 1) * step) for at, step in zip(where[leading:], entry, strict=True)]
            _fill(found[*corner, ...], entry, stream)  # the slice ends with the array, the chunk may have padding after it
        return found


@final
class _ChunkStream:
    """Numbers of one chunk, front to back."""

    def __init__(self, byte_range: ByteRange, packing: str | None, dtype: np.dtype[Any]) -> None:
        self._byte_range, self._dtype, self.position = byte_range, dtype, 0
        packed = _ByteRangeReader(byte_range)
        if packing:
            import pyarrow  # of the extra jax

            packed = pyarrow.CompressedInputStream(packed, packing)
        self._stream = packed

    def fill(self, into: NDArray[Any]) -> None:
        """Read the next numbers into a contiguous array. Raises ValueError when fewer remain."""
        # numpy's buffer protocol does not support bfloat16
        left = memoryview(into.reshape(-1).view(np.uint8))
        while left:
            count = self._stream.readinto(left)
            if not count:
                raise ValueError(f"{self._byte_range.file.name} ends {len(left)} bytes early")
            left = left[count:]
        self.position += into.size

    def skip(self, count: int) -> None:
        """Skip `count` numbers."""
        piece = ROWS_BYTES // self._dtype.itemsize
        for first in range(0, count, piece):
            self.fill(np.empty(min(piece, count - first), self._dtype))


@final
class _ByteRangeReader(io.RawIOBase):
    """Byte range of a file, opened for each read: an array may have more chunks than a process may have open files."""

    def __init__(self, byte_range: ByteRange) -> None:
        super().__init__()
        self._file, self._next, self._end = byte_range.file, byte_range.start, byte_range.start + byte_range.length
        self._buffer = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        if not self._buffer:
            with self._file.open("rb") as file:
                file.seek(self._next)
                self._buffer = memoryview(file.read(min(PACKED_BYTES, self._end - self._next)))
            self._next += len(self._buffer)
        count = min(len(into), len(self._buffer))
        into[:count] = self._buffer[:count]
        self._buffer = self._buffer[count:]
        return count


def _fill(into: NDArray[Any], entry: Index, stream: _ChunkStream) -> None:
    """Read the chunk's next `entry` into its corner of the array, which may be smaller and need not be contiguous."""
    if into.shape == entry and into.flags.c_contiguous:
        stream.fill(into)
        return
    kept = tuple(slice(size) for size in into.shape[1:])
    rows = max(1, ROWS_BYTES // (math.prod(entry[1:]) * into.itemsize))
    for first in range(0, entry[0], rows):
        piece = np.empty((min(rows, entry[0] - first), *entry[1:]), into.dtype)
        stream.fill(piece)
        into[first : first + rows] = piece[: max(0, len(into) - first)][(slice(None), *kept)]


def _values(root: Path, store: Any, dump: Callable[..., Any]) -> Iterator[tuple[bytes, ByteRange]]:
    """Yield key and byte range of every value in the newest version that is stored in a file."""
    newest = max(dump(store).result()["versions"], key=lambda version: version["generation_number"])
    waiting = [(b"", newest["root"]["location"])] if "location" in newest["root"] else []
    while waiting:
        prefix, location = waiting.pop()
        for entry in dump(store, location).result()["entries"]:
            if "location" in entry:
                # keys below a node lack their common prefix
                waiting.append((prefix + entry["subtree_common_prefix"], entry["location"]))
            elif "indirect_value" in entry:
                yield prefix + entry["key"], _parse_byte_range(root, entry["indirect_value"])


def _parse_byte_range(root: Path, value: str) -> ByteRange:
    """Parse `value:BASE:FILE:OFFSET:LENGTH`, with both names percent-encoded."""
    names, start, length = value.rsplit(":", 2)
    _, base, name = names.split(":", 2)
    file = root / (unquote(base) + unquote(name))
    if not file.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"the store names {file.name} outside of it")
    return ByteRange(file, int(start), int(length))
