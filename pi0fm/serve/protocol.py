"""Messages between a robot and a policy: msgpack maps with numpy arrays, in openpi's encoding.

Owns: `pack` and `unpack`, and what an array on the wire may be. Does not know: sockets, what the keys mean.

An array is a map of four, a numpy scalar a map of three; the markers' keys are bin, as openpi writes them:

    {b"__ndarray__": true,   b"data": <C-order bytes>, b"dtype": "<f4", b"shape": [H, A]}
    {b"__npgeneric__": true, b"data": <number>,        b"dtype": "<f4"}

Nothing of a frame is trusted: frames.py bounds it before msgpack builds it, and an array is made only when its type is a plain
number and its bytes are exactly what its shape needs. openpi's own decoder hands any dtype to numpy, and `|O` kills the process.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from pi0fm.errors import ObservationError
from pi0fm.serve import frames

MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_DIMENSIONS = 8
_SIZES_BY_KIND = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_ARRAY_KEYS = {"__ndarray__", "data", "dtype", "shape"}
_SCALAR_KEYS = {"__npgeneric__", "data", "dtype"}


def pack(message: Mapping[Any, Any]) -> bytes:
    """One frame from a map of text, numbers, lists, maps and arrays. Raises ObservationError for what has no place on the wire."""
    for key in message:
        if not isinstance(key, str):
            raise ObservationError(f"a message's keys must be text, found {key!r}: name it with a str")
    try:
        return msgpack.packb(dict(message), default=_plain)  # type: ignore[no-any-return,unused-ignore]
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise ObservationError(f"a message must be plain data: {_one_line(error)}; send text, numbers within 64 bits and arrays") from None


def unpack(frame: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> dict[str, Any]:
    """The map in one frame; arrays are C-contiguous, writable, in this machine's byte order.

    Raises ObservationError, before it allocates, for a frame or an array that is cut, too large, too deep, or of another kind.
    """
    if len(frame) > max_bytes:
        raise ObservationError(f"a frame may hold {max_bytes} bytes, found {len(frame)}: send smaller images")
    frames.check(frame)
    try:
        message = msgpack.unpackb(frame, object_hook=_revive, max_array_len=frames.MAX_ITEMS, max_map_len=frames.MAX_ITEMS)
    except ObservationError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ObservationError(
            f"a frame must be msgpack with text or bin keys: {_one_line(error)}; pack it as openpi-client does"
        ) from None
    if not isinstance(message, dict):
        raise ObservationError(f"a frame must hold a map of keys, found {type(message).__name__}: send {{'prompt': ..., ...}}")
    for key in message:
        if not isinstance(key, str):
            raise ObservationError(f"a message's keys must be text, found {key[:40]!r}: pack it with str keys")
    return message


def _plain(value: Any) -> Any:
    """What msgpack does not know, as plain data. msgpack calls it for unknown types only."""
    if isinstance(value, np.ndarray):
        _dtype(value.dtype.str)
        # tobytes is C order whatever the array's own layout, and also right for a transposed or empty one.
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _dtype(value.dtype.str)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in it")


def _revive(found: dict[Any, Any]) -> Any:
    """A marker map as the array or scalar that it stands for; any other map as it is."""
    fields = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: value for key, value in found.items()}
    for marker, keys, build in (("__ndarray__", _ARRAY_KEYS, _array), ("__npgeneric__", _SCALAR_KEYS, _scalar)):
        if marker not in fields:
            continue
        if len(found) != len(keys) or set(fields) != keys or fields[marker] is not True:
            raise ObservationError(f"a map with {marker} must have {marker} = true and {sorted(keys - {marker})}, found {_names(found)}")
        return build(fields)
    return found


def _array(fields: Mapping[str, Any]) -> NDArray[Any]:
    data, dtype, shape = fields["data"], _dtype(fields["dtype"]), fields["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ObservationError(f"an array's shape must be a list of at most {MAX_DIMENSIONS} sizes, found {str(shape)[:60]}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ObservationError(f"an array's sizes must be whole numbers >= 0, found {str(shape)[:60]}")
    # numpy multiplies the sizes even when one of them is 0, so an empty array is bounded too.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_FRAME_BYTES:
        raise ObservationError(
            f"an array may hold {MAX_FRAME_BYTES} bytes, found shape {str(shape)[:60]} of {dtype.str}: send a smaller one"
        )
    expected = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise ObservationError(f"an array of shape {shape} and type {dtype.str} needs {expected} bytes, found {size}: send array.tobytes()")
    if dtype.kind == "b":  # a bool is a byte that is 0 or 1; another byte must not live on inside a bool array
        return np.not_equal(np.frombuffer(data, np.uint8), 0).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _scalar(fields: Mapping[str, Any]) -> np.generic:
    dtype, data = _dtype(fields["dtype"]), fields["data"]
    allowed: type | tuple[type, ...] = {"b": bool, "i": int, "u": int}.get(dtype.kind, (int, float))
    if not isinstance(data, allowed) or (isinstance(data, bool) and dtype.kind != "b"):
        raise ObservationError(f"a scalar of type {dtype.str} must hold such a number, found {str(data)[:40]!r}")
    try:
        return dtype.newbyteorder("=").type(data)  # type: ignore[no-any-return]
    except OverflowError:
        raise ObservationError(f"a scalar of type {dtype.str} cannot hold {data}: send a wider type") from None


def _dtype(text: Any) -> np.dtype[Any]:
    """The number type that a text such as `<f4` names, without asking numpy to parse foreign text."""
    kind, size = (text[1:2], text[2:]) if isinstance(text, str) and len(text) == 3 and text[0] in "<>|=" else ("", "")
    if kind not in _SIZES_BY_KIND or size not in [str(size) for size in _SIZES_BY_KIND[kind]]:
        raise ObservationError(
            f"an array must be of bool, int, uint or float, found dtype {str(text)[:40]!r}: convert it with .astype(np.float32)"
        )
    dtype: np.dtype[Any] = np.dtype(text)
    return dtype


def _names(found: Mapping[Any, Any]) -> str:
    return ", ".join(str(key)[:20] for key in list(found)[:6])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
