"""A foreign checkpoint's tensors, one at a time: names without wrappers, shapes and types of numbers from the headers alone.

Owns: safetensors files, whole or in shards, the names that wrappers leave behind, the embedding that is stored under one of two names.
Does not know: what a tensor means (convert/names), orbax (convert/orbax).

    model.safetensors                  one file
    model.safetensors.index.json       which shard holds which tensor
    model-00001-of-00003.safetensors
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi0fm.convert.names import EMBEDDING, LM_HEAD
from pi0fm_client.errors import BundleError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What DDP, torch.compile, FSDP and activation checkpointing put into names. No module of a policy is called so.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
Index = tuple[int, ...]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, described by their headers, read one by one.

    removed: the wrappers' words that were taken out of the names. read(name, index): entry `index` of the tensor's leading axes on the
    CPU, all of it for (); raises BundleError for a file that is cut or damaged.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str, Index], Tensor]
    removed: tuple[str, ...] = ()


def open_safetensors(path: Path) -> Checkpoint:
    """The tensors under `path`, in one file or in shards.

    Raises BundleError for a file that is missing, cut or damaged, a shard's index that does not fit, names that meet when their
    wrappers are taken off, and a tensor that holds no floating-point numbers.
    """
    files = _files(path)
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    origin: dict[str, tuple[Path, str]] = {}
    removed: set[str] = set()
    for file, promised in files.items():
        found = _header(file)
        if promised is not None and promised != found.keys():
            astray = sorted(promised ^ found.keys())
            raise BundleError(f"{path / INDEX} must list what {file.name} holds, they differ in {', '.join(astray)}; copy both again")
        for stored, header in found.items():
            name, words = unwrapped(stored)
            if name in origin:
                raise BundleError(f"{path} holds {name} twice, as {origin[name][1]} and as {stored}; keep one of them")
            removed |= words
            headers[name], origin[name] = header, (file, stored)
    strange = sorted(f"{name} ({dtype})" for name, (_, dtype) in headers.items() if dtype not in DTYPES)
    if strange:
        raise BundleError(
            f"weights must be floating-point numbers of 16 to 64 bits, {path} holds {', '.join(strange)}; save it without quantisation"
        )

    def read(name: str, index: Index) -> Tensor:
        file, stored = origin[name]
        # Opened for one tensor: the pages of a mapped file stay in memory until it is closed.
        with _opened(file) as opened:
            tensor: Tensor = opened.get_slice(stored)[index] if index else opened.get_tensor(stored)
        return tensor

    shapes = {name: shape for name, (shape, _) in headers.items()}
    return Checkpoint(path, shapes, {name: DTYPES[dtype] for name, (_, dtype) in headers.items()}, read, tuple(sorted(removed)))


def unwrapped(stored: str) -> tuple[str, set[str]]:
    """A name without wrappers and without the leading `model.` of a policy's one child, and the words that were taken out."""
    words = stored.split(".")
    kept = [word for word in words if word not in WRAPPERS]
    removed = {f"{word}." for word in words if word in WRAPPERS}
    if len(kept) > 1 and kept[0] == "model":
        kept, removed = kept[1:], removed | {"model."}
    return ".".join(kept), removed


def with_one_embedding(checkpoint: Checkpoint, tied: bool) -> tuple[Checkpoint, str]:
    """The checkpoint with its embedding under `embed_tokens`, wherever it was stored, and a line about it (empty when nothing was done).

    tied: the peer's two names are one tensor, so two that differ are a fault, and refused. LeRobot's classes do not tie them, train
    `embed_tokens` alone and read it alone: there the other is passed over.
    """
    if LM_HEAD not in checkpoint.shapes:
        return checkpoint, ""
    if EMBEDDING not in checkpoint.shapes:
        alias = {EMBEDDING: LM_HEAD}
        shapes = {**checkpoint.shapes, EMBEDDING: checkpoint.shapes[LM_HEAD]}
        dtypes = {**checkpoint.dtypes, EMBEDDING: checkpoint.dtypes[LM_HEAD]}

        def read(name: str, index: Index) -> Tensor:
            return checkpoint.read(alias.get(name, name), index)

        found = replace(checkpoint, shapes=shapes, dtypes=dtypes, read=read)
        return found, "the embedding is stored as lm_head alone: it is read from there"
    if checkpoint.shapes[LM_HEAD] != checkpoint.shapes[EMBEDDING] or _digest(checkpoint, LM_HEAD) == _digest(checkpoint, EMBEDDING):
        return checkpoint, ""  # another shape is a misfit, and listed with the others
    if tied:
        raise BundleError(
            f"{LM_HEAD} and {EMBEDDING} are one tensor in openpi, but differ in {checkpoint.path}; remove the one that was not trained"
        )
    return checkpoint, "lm_head differs from embed_tokens, which alone is read: lm_head is left behind"


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    """Of a tensor's bytes: two are compared without both being in memory."""
    return hashlib.sha256(memoryview(checkpoint.read(name, ()).reshape(-1).view(torch.uint8).numpy())).digest()


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the names that an index promises of it."""
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if not (path / INDEX).is_file():
        raise BundleError(f"{path} must hold {SINGLE}, {INDEX} or params/, found {_listing(path)}; an adapter must be merged first")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise BundleError(f"{path / INDEX} must hold weight_map, tensor -> file; copy it again")
    shards: dict[Path, set[str] | None] = {}
    for name in sorted(set(weight_map.values())):
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            raise BundleError(f"{path / INDEX} names {name}, which is not in {path}; copy all shards")
        shards[file] = {tensor for tensor, where in weight_map.items() if where == name}
    return shards


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} is cut or damaged ({' '.join(str(error).split()):.120}); copy it again") from None


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types by name. safetensors holds every size against the file's length, so none is believed that is not there."""
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises BundleError that names the file."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable JSON ({' '.join(str(error).split()):.120}); copy it again") from None
    if not isinstance(tree, dict):
        raise BundleError(f"{path} must hold a mapping, found {type(tree).__name__}; copy it again")
    return tree


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return ", ".join(names[:8]) or "nothing"
