"""openpi's JAX weights, written by orbax, read without orbax and JAX, one layer of one array at a time.

Owns: the layout on disk, the names. Does not know: the meaning of a tensor (convert/names), decoding a chunk (convert/orbax_chunks).

    params/manifest.ocdbt, d/*, ocdbt.process_N/*    one key-value store; without it the same keys are files
      params.PaliGemma.llm.layers.attn.q_einsum.w.value/.zarray     shape and type
      params.PaliGemma.llm.layers.attn.q_einsum.w.value/0.0.0.0     numbers, zstd; an absent chunk is an error, not zeros

Names lose the leading `params` and, if all have it, the trailing `value` of a flax.nnx state; `.` becomes `/`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0fm.convert.orbax_chunks import ArrayStream, Find, Index, array_stream, find_in_files, find_in_tree
from pi0fm.policy.saved.weights import Weights, damaged_error
from pi0fm_client.errors import BundleError, ConfigError

MARKER_FILES = ("manifest.ocdbt", "_METADATA")
DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_BYTES = 2**36  # of one array, 8 times the largest of the released weights
# by default tensorstore decodes as many chunks at once as there are cores, and caches them
LITTLE_MEMORY = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}


def is_orbax(path: Path) -> bool:
    """Tell whether orbax wrote `path`, or its folder params/."""
    return _root(path) is not None


def open_orbax(path: Path) -> Weights:
    """Open the arrays under `path`, reading only their metadata. Each array's entries are best read in ascending order.

    Raises BundleError for a store that is truncated or damaged, or holds an array that is not floating-point or too large; ConfigError
    without tensorstore.
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
    tree = (root / MARKER_FILES[0]).is_file()
    store = {"driver": "ocdbt", "base": base} if tree else base
    context = tensorstore.Context(LITTLE_MEMORY)
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(store, context=context).result().list().result()]
        stored = {key.removesuffix(end): driver for key in keys for end, driver in DRIVERS.items() if key.endswith(end)}
        arrays = {
            name: tensorstore.open(
                {"driver": driver, "kvstore": {**store, "path": f"{store.get('path', '')}{name}/"}, "fill_missing_data_reads": False},
                open=True,
                read=True,
                context=context,
            ).result()
            for name, driver in stored.items()
        }
        find = find_in_files(root) if not tree else find_in_tree(root, tensorstore.KvStore.open(base).result(), tensorstore.ocdbt.dump)
    except ValueError as error:
        raise damaged_error(root, error) from None
    if not arrays:
        raise BundleError(f"{root} must hold arrays as orbax writes them, found {len(keys)} keys and none; copy it again, all files")
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES or math.prod(array.shape) * array.dtype.numpy_dtype.itemsize > LARGEST_BYTES:
            raise BundleError(
                f"{name} in {root} must be floating-point numbers of a policy's size, found {array.dtype.name} {list(array.shape)}"
            )
    names = _plain(list(arrays))
    reader = _reader(arrays, find)

    def read(name: str, index: Index) -> Tensor:
        try:
            return _tensor(reader(names[name], index))
        except (ValueError, OSError) as error:
            raise damaged_error(root, error) from None

    return Weights(
        path,
        {name: tuple(arrays[stored_name].shape) for name, stored_name in names.items()},
        {name: DTYPES[arrays[stored_name].dtype.name] for name, stored_name in names.items()},
        read,
    )


def _root(path: Path) -> Path | None:
    return next((root for root in (path / "params", path) if any((root / mark).is_file() for mark in MARKER_FILES)), None)


def _reader(arrays: Mapping[str, Any], find: Find) -> Callable[[str, Index], Any]:
    """Return a function that reads entries of the arrays, with the streams of one array open at a time."""
    latest: tuple[str, ArrayStream | None] | None = None

    def read(name: str, index: Index) -> Any:
        nonlocal latest
        if latest is None or latest[0] != name:
            latest = (name, array_stream(arrays[name], name, find))
        stream = latest[1]
        return arrays[name][index].read().result() if stream is None else stream.read(index)

    return read


def _plain(stored: list[str]) -> dict[str, str]:
    """Return the store's name for each of our names."""
    words = {name: name.split(".") for name in stored}
    wrapped = all(parts[-1] == "value" for parts in words.values())
    return {"/".join(parts[parts[0] == "params" : len(parts) - wrapped]): name for name, parts in words.items()}


def _tensor(array: Any) -> Tensor:
    """Convert an array to a tensor; numpy's bfloat16, which torch does not accept, by its bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
