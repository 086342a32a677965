"""A safetensors file that is written piece by piece: the header first, then each tensor at its place.

Owns: the file's format, the cast to its type of numbers. Does not know: what the tensors are.

    8 bytes  length of the header     u64, little-endian
    header   {"name": {"dtype", "shape", "data_offsets"}, ..., "__metadata__"}, padded with spaces to a multiple of 8
    data     the tensors, one behind the other; a piece is written at `start of its tensor + its first entry`
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pi0fm_client.errors import OutputError

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
PIECE = 2**20  # entries that are cast and written at a time

Entries = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Put = Callable[[str, int, Tensor], None]


@contextmanager
def tensor_file(path: Path, entries: Entries) -> Iterator[Put]:
    """Open `path` for the tensors `entries`, name -> (shape, float32 or bfloat16), and yield `put(name, first entry, rows)`.

    Every entry must be put exactly once. Raises OutputError when the disk has no room.
    """
    header, starts, total = _header(entries)
    free = shutil.disk_usage(path.parent).free
    if free < len(header) + total:
        raise OutputError(
            f"{path.parent} must have room for {(len(header) + total) / 1e9:.1f} GB, found {free / 1e9:.1f} GB free; make room"
        )
    left = {name: math.prod(shape) for name, (shape, _) in entries.items()}
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)

        def put(name: str, first: int, rows: Tensor) -> None:
            dtype = entries[name][1]
            file.seek(len(header) + starts[name] + first * dtype.itemsize)
            _write(file, rows, dtype)
            left[name] -= rows.numel()

        yield put
    unfilled = [name for name, count in left.items() if count]
    if unfilled:
        raise AssertionError(f"not every entry was written once: {unfilled}")


def common_dtype(dtypes: list[torch.dtype], wanted: torch.dtype | None) -> torch.dtype:
    """`wanted`, else bfloat16 where all of a tensor's parts are, else float32."""
    if wanted is not None:
        return wanted
    return torch.bfloat16 if set(dtypes) == {torch.bfloat16} else torch.float32


def _header(entries: Entries) -> tuple[bytes, dict[str, int], int]:
    """The file's beginning, where each tensor starts behind it, and the length of all of them."""
    starts: dict[str, int] = {}
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # the wider numbers first: then each tensor begins at a multiple of its own width; by name, so that one set of weights is one file
    for name, (shape, dtype) in sorted(entries.items(), key=lambda entry: (-entry[1][1].itemsize, entry[0])):
        size = math.prod(shape) * dtype.itemsize
        starts[name] = position
        tree[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, position


def _write(file: BinaryIO, rows: Tensor, dtype: torch.dtype) -> None:
    """All entries of `rows` in order; only a piece of them is ever copied."""
    if rows.ndim == 0 or rows.numel() <= PIECE:
        pieces = [rows]
    else:
        step = max(1, PIECE * rows.shape[0] // rows.numel())
        pieces = [rows[start : start + step] for start in range(0, rows.shape[0], step)]
    for piece in pieces:
        file.write(memoryview(piece.to(dtype).reshape(-1).contiguous().view(torch.uint8).numpy()))
