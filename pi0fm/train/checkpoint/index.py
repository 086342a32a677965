"""Index of a checkpoint, and whether it is whole, from untrusted JSON.

Owns: `Index`, the checks of COMMIT and index.json, removing a checkpoint. Does not know: tensors in memory, torch's planner.

    COMMIT -- size of every file, CRC-32 of --> index.json -- type, shape, boxes: (offset, shape, file, bytes, CRC-32) --> rank files
"""

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pi0fm.policy.saved.weights import DTYPES
from pi0fm.train.checkpoint.storage import COMMIT, Store, folder

INDEX, VERSION = "index.json", 1
_RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")


class TornError(Exception):
    """A checkpoint that is not whole; `str(error)` gives the reason."""


@dataclass(frozen=True)
class Box:
    """Part of a tensor, and its bytes: start .. stop - 1 of `file`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Index:
    """Contents of a checkpoint. facts: about the run, plain JSON."""

    facts: dict[str, Any]
    tensors: dict[str, Entry]


def read_index(store: Store, step: int, sizes: Mapping[str, int]) -> Index:
    """Read the index of a whole checkpoint. sizes: bytes by name in the store. Raises TornError that names what is missing or truncated."""
    place = folder(step)
    if f"{place}/{COMMIT}" not in sizes:
        raise TornError(f"it has no {COMMIT}")
    try:
        commit = json.loads(bytes(store.read(f"{place}/{COMMIT}")))
        for name, size in commit["files"].items():
            if sizes.get(f"{place}/{name}") != size:
                raise TornError(f"{name} should hold {size} bytes, it holds {sizes.get(f'{place}/{name}', 0)}")
        content = bytes(store.read(f"{place}/{INDEX}"))
        if zlib.crc32(content) != commit["index_crc32"]:
            raise TornError(f"{INDEX} does not hold what was written")
        tree = json.loads(content)
        if tree["version"] != VERSION:
            raise TornError(f"it has version {tree['version']} of the format, this pi0fm reads {VERSION}")
        tensors = {str(name): _entry(found, commit["files"]) for name, found in tree["tensors"].items()}
        return Index(dict(tree["facts"]), tensors)
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:
        raise TornError(f"it is not readable ({type(error).__name__}: {' '.join(str(error).split()):.120})") from error


def remove(store: Store, step: int, names: list[str]) -> None:
    """Remove a checkpoint, its COMMIT first, so that an interrupted removal leaves a torn checkpoint, never a whole one."""
    place = f"{folder(step)}/"
    inside = sorted((name for name in names if name.startswith(place)), key=lambda name: name != place + COMMIT)
    store.remove(inside)


def _entry(tree: Mapping[str, Any], files: Mapping[str, int]) -> Entry:
    """Parse one tensor's entry of untrusted JSON, checking every number against the file that it refers to."""
    dtype, shape = DTYPES[tree["dtype"]], _sizes(tree["shape"])
    boxes = []
    for found in tree["boxes"]:
        box = Box(
            _sizes(found["offset"]), _sizes(found["shape"]), found["file"], int(found["start"]), int(found["stop"]), int(found["crc32"])
        )
        if not _RANK_FILE.fullmatch(box.file) or not 0 <= box.start <= box.stop <= files[box.file]:
            raise ValueError(f"a box is at {box.start}..{box.stop} of {box.file!r}")
        if len(box.shape) != len(shape) or any(o + n > size for o, n, size in zip(box.offset, box.shape, shape, strict=True)):
            raise ValueError(f"a box of {box.shape} at {box.offset} of {shape}")
        if box.stop - box.start != math.prod(box.shape) * dtype.itemsize:
            raise ValueError(f"{box.stop - box.start} bytes for {box.shape} of {dtype}")
        boxes.append(box)
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        raise ValueError(f"boxes do not fill {shape}")
    return Entry(dtype, shape, tuple(boxes))


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(int(value) for value in values)
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    return sizes
