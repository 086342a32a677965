"""openpi's JAX weights: what orbax wrote, read one array at a time with tensorstore, without orbax and without JAX.

Owns: the layout on disk, the names. Does not know: what a tensor means (models/checkpoint_map).

    params/manifest.ocdbt, d/*, ocdbt.process_N/*    one key-value store; without it the same keys are files
      params.PaliGemma.llm.layers.attn.q_einsum.w.value/.zarray     shape and type
      params.PaliGemma.llm.layers.attn.q_einsum.w.value/0.0.0.0     numbers, zstd; an absent one is an error, not a zero

Names lose the leading `params` and, where every one has it, the trailing `value` of a flax.nnx state; `.` becomes `/`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0fm.errors import BundleError, ConfigError
from pi0fm.policy.convert_read import Checkpoint

MARKS = ("manifest.ocdbt", "_METADATA")
DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_BYTES = 2**36  # of one array; eight times the largest of the released weights


def is_orbax(path: Path) -> bool:
    """Whether orbax wrote `path`, or its folder params/."""
    return _root(path) is not None


def open_orbax(path: Path) -> Checkpoint:
    """The arrays under `path`. Nothing but their metadata is read.

    Raises BundleError for a store that is cut or damaged, holds other than floating-point numbers or an array of absurd size,
    ConfigError without tensorstore.
    """
    try:
        import tensorstore
    except ImportError:
        raise ConfigError(
            f"{path} holds JAX weights, which are read with tensorstore, and it is not installed; type: pip install 'pi0fm[jax]'"
        ) from None
    root = _root(path)
    assert root is not None
    base: dict[str, Any] = {"driver": "file", "path": f"{root.resolve()}/"}
    store = {"driver": "ocdbt", "base": base} if (root / MARKS[0]).is_file() else base
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
        stored = {key.removesuffix(end): driver for key in keys for end, driver in DRIVERS.items() if key.endswith(end)}
        arrays = {
            name: tensorstore.open(
                {"driver": driver, "kvstore": {**store, "path": f"{store.get('path', '')}{name}/"}, "fill_missing_data_reads": False},
                open=True,
                read=True,
            ).result()
            for name, driver in stored.items()
        }
    except ValueError as error:
        raise _damaged(root, error) from None
    if not arrays:
        raise BundleError(f"{root} must hold arrays as orbax writes them, found {len(keys)} keys and none; copy it again, all files")
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES or math.prod(array.shape) * array.dtype.numpy_dtype.itemsize > LARGEST_BYTES:
            raise BundleError(
                f"{name} in {root} must be floating-point numbers of a policy's size, found {array.dtype.name} {list(array.shape)}"
            )
    names = _plain(list(arrays))

    def read(name: str) -> Tensor:
        try:
            return _tensor(arrays[names[name]].read().result())
        except ValueError as error:
            raise _damaged(root, error) from None

    return Checkpoint(
        path,
        {name: tuple(arrays[stored_name].shape) for name, stored_name in names.items()},
        {name: DTYPES[arrays[stored_name].dtype.name] for name, stored_name in names.items()},
        read,
    )


def _root(path: Path) -> Path | None:
    return next((root for root in (path / "params", path) if any((root / mark).is_file() for mark in MARKS)), None)


def _plain(stored: list[str]) -> dict[str, str]:
    """Our spelling of each name -> the store's."""
    words = {name: name.split(".") for name in stored}
    wrapped = all(parts[-1] == "value" for parts in words.values())
    return {"/".join(parts[parts[0] == "params" : len(parts) - wrapped]): name for name, parts in words.items()}


def _tensor(array: Any) -> Tensor:
    """torch knows no bfloat16 of numpy's: its bits are taken as they are."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _damaged(root: Path, error: ValueError) -> BundleError:
    return BundleError(f"{root} is cut or damaged ({' '.join(str(error).split()):.160}); copy it again, all files")
