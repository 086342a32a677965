"""Tensors of a foreign checkpoint, read one at a time: names without wrappers, shapes and number types from the headers.

Owns: sharded safetensors files, the wrappers in names, the embedding under one of its two names. Does not know: the meaning of a tensor
(convert/names), orbax (convert/orbax).

    model.safetensors                  one file
    model.safetensors.index.json       tensor -> shard
    model-00001-of-00003.safetensors
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pi0fm.convert.names import EMBEDDING, LM_HEAD
from pi0fm.policy.saved.manifest import WEIGHTS, read_json
from pi0fm.policy.saved.weights import Shape, Weights, open_file
from pi0fm_client.errors import BundleError

INDEX = "model.safetensors.index.json"
# Words that DDP, torch.compile, FSDP and activation checkpointing add to names; no module of a policy has such a name.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def open_safetensors(path: Path) -> tuple[Weights, str]:
    """Open the tensors under `path`, in one file or in shards; also return a line about wrappers removed from names, or "".

    Raises BundleError for a file that is missing, truncated or damaged, an index that does not match its shards, two names that are equal
    without their wrappers, and a tensor that is not floating-point.
    """
    origin: dict[str, tuple[Weights, str]] = {}
    removed: set[str] = set()
    for file, promised in _files(path).items():
        part = open_file(file)
        if promised is not None and promised != part.shapes.keys():
            astray = sorted(promised ^ part.shapes.keys())
            raise BundleError(f"{path / INDEX} must list what {file.name} holds, they differ in {', '.join(astray)}; copy both again")
        for stored in part.shapes:
            name, words = unwrapped(stored)
            if name in origin:
                raise BundleError(f"{path} holds {name} twice, as {origin[name][1]} and as {stored}; keep one of them")
            removed |= words
            origin[name] = (part, stored)

    def read(name: str, index: Shape) -> Tensor:
        part, stored = origin[name]
        return part.read(stored, index)

    shapes = {name: part.shapes[stored] for name, (part, stored) in origin.items()}
    dtypes = {name: part.dtypes[stored] for name, (part, stored) in origin.items()}
    return Weights(path, shapes, dtypes, read), f"removed from the tensors' names: {', '.join(sorted(removed))}" if removed else ""


def unwrapped(stored: str) -> tuple[str, set[str]]:
    """Return a name without wrappers and without the leading `model.` of LeRobot's policies, and the removed words."""
    words = stored.split(".")
    kept = [word for word in words if word not in WRAPPERS]
    removed = {f"{word}." for word in words if word in WRAPPERS}
    if len(kept) > 1 and kept[0] == "model":
        kept, removed = kept[1:], removed | {"model."}
    return ".".join(kept), removed


def with_one_embedding(weights: Weights, tied: bool) -> tuple[Weights, str]:
    """Return the tensors with the embedding under `embed_tokens`, and a line about the change, or "".

    tied: the peer's two names are one tensor, so different values are refused. LeRobot's classes do not tie them: they train and read
    only `embed_tokens`, and lm_head is ignored.
    """
    shapes, dtypes = weights.shapes, weights.dtypes
    if LM_HEAD not in shapes:
        return weights, ""
    if EMBEDDING not in shapes:
        return replace(
            weights,
            shapes={**shapes, EMBEDDING: shapes[LM_HEAD]},
            dtypes={**dtypes, EMBEDDING: dtypes[LM_HEAD]},
            read=lambda name, index: weights.read(LM_HEAD if name == EMBEDDING else name, index),
        ), "the embedding is stored only as lm_head, and read from there"
    if shapes[LM_HEAD] != shapes[EMBEDDING] or _digest(weights, LM_HEAD) == _digest(weights, EMBEDDING):
        return weights, ""  # another shape is a mismatch, listed with the others
    if tied:
        raise BundleError(
            f"{LM_HEAD} and {EMBEDDING} are one tensor in openpi, but differ in {weights.path}; remove the one that was not trained"
        )
    return weights, "lm_head differs from embed_tokens, and only embed_tokens is read: lm_head is left out"


def _digest(weights: Weights, name: str) -> bytes:
    """Hash a tensor's bytes, to compare two tensors without both in memory."""
    return hashlib.sha256(memoryview(weights.read(name, ()).reshape(-1).view(torch.uint8).numpy())).digest()


def _files(path: Path) -> dict[Path, set[str] | None]:
    """Return the files to read, each with the names that the index lists for it."""
    if (path / WEIGHTS).is_file():
        return {path / WEIGHTS: None}
    if not (path / INDEX).is_file():
        raise BundleError(f"{path} must hold {WEIGHTS}, {INDEX} or params/, found {_listing(path)}; an adapter must be merged first")
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


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return ", ".join(names[:8]) or "nothing"
