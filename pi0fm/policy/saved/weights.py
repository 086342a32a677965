"""Tensors in safetensors files: described by their headers, read one by one, written piece by piece, put into a network on its device.

Owns: the file's format, the casts between types of numbers. Does not know: the meaning of a tensor, shards, the rest of a bundle.

    8 bytes  length of the header     u64, little-endian
    header   {"name": {"dtype", "shape", "data_offsets"}, ..., "__metadata__"}, padded with spaces to a multiple of 8
    data     the tensors, one behind the other; a piece is written at `start of its tensor + its first entry`
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi0fm.models.config import Pi0Config
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.sampling.sampler import columns_together, tower_matrices
from pi0fm_client.errors import BundleError, OutputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**20  # entries that are cast and written at a time

Shape = tuple[int, ...]
Entries = Mapping[str, tuple[Shape, torch.dtype]]
Put = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Weights:
    """Tensors by name, described by their headers.

    read(name, index): entry `index` of the tensor's leading axes on the CPU, all of it for (); raises BundleError for a file that is cut
    or damaged. fill(name, tensor, first): as many numbers as the tensor takes, from number `first` on, into contiguous memory on the CPU,
    of one safetensors file.
    """

    path: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str, Shape], Tensor]
    fill: Callable[[str, Tensor, int], None] | None = None

    def rows(self, name: str, which: slice) -> Tensor:
        """Some rows of a tensor, a slice of its first axis with both ends; of one file these alone are read."""
        if self.fill is None:
            return self.read(name, ())[which]
        tensor = torch.empty((which.stop - which.start, *self.shapes[name][1:]), dtype=self.dtypes[name])
        self.fill(name, tensor, which.start * math.prod(self.shapes[name][1:]))
        return tensor


def open_file(file: Path) -> Weights:
    """The tensors of one safetensors file. Nothing of it stays mapped: memory holds only the tensors that a caller keeps.

    Raises BundleError for a file that is missing, cut or damaged, or holds other than floating-point numbers of 16 to 64 bits.
    """
    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:  # safetensors holds every size against the file's length
            start = 8 + int.from_bytes(opened.read(8), "little")
            told = json.loads(opened.read(start - 8))
    except (SafetensorError, OSError) as error:
        raise damaged_error(file, error) from None
    told.pop("__metadata__", None)
    strange = sorted(
        f"{name} ({entry['dtype']})"
        for name, entry in told.items()
        if entry["dtype"] not in DTYPES or not DTYPES[entry["dtype"]].is_floating_point
    )
    if strange:
        raise BundleError(
            f"weights must be floating-point numbers of 16 to 64 bits, {file} holds {', '.join(strange)}; save it without quantisation"
        )
    dtypes = {name: DTYPES[entry["dtype"]] for name, entry in told.items()}

    def read(name: str, index: Shape) -> Tensor:
        tensor = torch.empty(told[name]["shape"], dtype=dtypes[name])
        fill(name, tensor, 0)
        return tensor[index]

    def fill(name: str, tensor: Tensor, first: int) -> None:
        left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(start + told[name]["data_offsets"][0] + first * tensor.itemsize)
                while left:
                    count = opened.readinto(left)
                    if not count:
                        raise EOFError(f"{name} ends {len(left)} bytes early")
                    left = left[count:]
        except (OSError, EOFError) as error:
            raise damaged_error(file, error) from None

    return Weights(file, {name: tuple(entry["shape"]) for name, entry in told.items()}, dtypes, read, fill)


def damaged_error(file: Path, error: Exception) -> BundleError:
    """Return the error for a file that is cut or damaged."""
    return BundleError(f"{file} is cut or damaged ({' '.join(str(error).split()):.160}); copy it again, all files")


@contextmanager
def tensor_file(path: Path, entries: Entries) -> Iterator[Put]:
    """Open `path` for the tensors `entries`, name -> (shape, float32 or bfloat16), and yield `put(name, first entry, rows)`.

    Every entry must be put exactly once, from any device. Raises OutputError when the disk has no room.
    """
    # the wider numbers first: then each tensor begins at a multiple of its own width; by name, so that one set of weights is one file
    head, starts, total = header(dict(sorted(entries.items(), key=lambda entry: (-entry[1][1].itemsize, entry[0]))))
    free = shutil.disk_usage(path.parent).free
    if free < len(head) + total:
        raise OutputError(f"{path.parent} must have room for {(len(head) + total) / 1e9:.1f} GB, found {free / 1e9:.1f} GB free; make room")
    left = {name: math.prod(shape) for name, (shape, _) in entries.items()}
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + total)

        def put(name: str, first: int, rows: Tensor) -> None:
            dtype = entries[name][1]
            file.seek(len(head) + starts[name] + first * dtype.itemsize)
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


def network_shapes(model: Pi0Config) -> dict[str, Shape]:
    """Return the shape of every tensor of the network; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Pi0(model).state_dict().items()}


def describe_mismatch(found: Mapping[str, Shape], needed: Mapping[str, Shape], allowed: Mapping[str, Shape] = MappingProxyType({})) -> str:
    """List every name that is missing, neither needed nor allowed, or of another shape than either says; empty when none is."""
    known = {**allowed, **needed}
    groups = {
        "missing": sorted(needed.keys() - found.keys()),
        "unexpected": sorted(found.keys() - known.keys()),
        "of another shape": [
            f"{name} {list(found[name])} for {list(known[name])}"
            for name in sorted(found.keys() & known.keys())
            if found[name] != known[name]
        ],
    }
    return "; ".join(f"{word} ({len(names)}): {', '.join(names)}" for word, names in groups.items() if names)


def refuse_wrong_weights(weights: Weights, model: Pi0Config) -> None:
    """Raise BundleError that names every tensor in which a bundle's weights are not those of its network."""
    wrong = describe_mismatch(weights.shapes, network_shapes(model))
    if wrong:
        raise BundleError(f"the weights in {weights.path.parent} do not fit its configuration: {wrong}; copy the bundle again")


def fill_network(weights: Weights, model: Pi0Config, device: torch.device, dtype: torch.dtype) -> Pi0:
    """A network with these weights on `device`, tensor by tensor, its matrices as `arrange_matrices` leaves them.

    dtype: of the towers' matrices, all else is float32, also where another type is stored. Raises BundleError where the weights do not fit.
    A tensor that changes its type, place or order is read into memory that the next one uses again: a new piece for each would leave holes
    that nothing fits into, 0.2 to 0.45 of the file once the C library serves pieces of their size from its heap (docs/LOG.md).
    """
    refuse_wrong_weights(weights, model)
    assert weights.fill is not None
    with torch.device("meta"):
        network = Pi0(model)
    narrow = {f"{name}.{leaf}" for name, matrix in tower_matrices(network).items() for leaf, _ in matrix.named_parameters()}
    columns = columns_together(network, dtype, device)
    tensors: dict[str, Tensor] = {}
    changed: list[str] = []
    for name, shape in weights.shapes.items():
        wanted = dtype if name in narrow else torch.float32
        empty = torch.empty(shape[::-1] if name in columns else shape, dtype=wanted, device=device)
        tensors[name] = empty.t() if name in columns else empty
        if name not in columns and device.type == "cpu" and wanted == weights.dtypes[name]:
            weights.fill(name, empty, 0)
        else:
            changed.append(name)
    sizes = [math.prod(weights.shapes[name]) * weights.dtypes[name].itemsize for name in changed]
    room = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    for name, size in zip(changed, sizes, strict=True):
        read = room[:size].view(weights.dtypes[name]).view(weights.shapes[name])
        weights.fill(name, read, 0)
        tensors[name].copy_(read)
    network.load_state_dict(tensors, assign=True)
    return network


def header(entries: Entries) -> tuple[bytes, dict[str, int], int]:
    """A file's beginning, where each tensor starts behind it, and the length of all of them; in the order of `entries`."""
    starts: dict[str, int] = {}
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (shape, dtype) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        starts[name] = position
        tree[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts, position


def _write(file: BinaryIO, rows: Tensor, dtype: torch.dtype) -> None:
    """Write all entries of `rows` in order; only a piece of them is ever copied."""
    rows = rows.detach()
    if rows.ndim == 0 or rows.numel() <= PIECE:
        pieces = [rows]
    else:
        step = max(1, PIECE * rows.shape[0] // rows.numel())
        pieces = [rows[start : start + step] for start in range(0, rows.shape[0], step)]
    for piece in pieces:
        file.write(memoryview(piece.to("cpu", dtype).reshape(-1).contiguous().view(torch.uint8).numpy()))
