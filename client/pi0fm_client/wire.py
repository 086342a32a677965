"""Messages between a robot and a policy server: msgpack maps with numpy arrays, in openpi's encoding.

Owns: `pack` and `unpack`, the arrays that may be sent, the bounds of a frame, the names of pi0fm's extensions. Does not know: sockets,
the meaning of keys.

An array is a map of four, a numpy scalar a map of three; the marker keys are bin, as openpi writes them:

    {b"__ndarray__": true,   b"data": <C-order bytes>, b"dtype": "<f4", b"shape": [H, A]}
    {b"__npgeneric__": true, b"data": <number>,        b"dtype": "<f4"}

A frame is not trusted: its bounds are checked before msgpack builds anything, and an array is made only when its type is a plain
number and its bytes are exactly what its shape needs. openpi's own decoder hands any dtype to numpy, and `|O` kills the process.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import ObservationError

# Extensions of openpi's protocol. A server lists those that it knows under EXTENSIONS of its greeting, by these same strings; only then
# may a request or a reply hold such a key, so an openpi server or client never sees one.
EXTENSIONS = "extensions"
IDENTITY = "identity"  # of the greeting: the bundle's hash
PREFIX = "pi0fm/"
REQUEST_ID = "pi0fm/request_id"  # request: int >= 0; the reply repeats it
DEADLINE_MS = "pi0fm/deadline_ms"  # request: float > 0, from its arrival; refused at once where that time does not suffice
SESSION = "pi0fm/session"  # request: text, one for each robot
ACTION_PREFIX = "pi0fm/action_prefix"  # request: float32 [n, A], robot units, absolute; row i is for the control step of the answer's row i
INFERENCE_DELAY = "pi0fm/inference_delay"  # request: int >= 0, of the prefix's rows that are executed before the answer comes
NUM_CANDIDATES = "pi0fm/num_candidates"  # request: int >= 1, chunks to choose the answer from
REPORT = "pi0fm/report"  # request: map with EXECUTED, and counts since the robot's start under the names of COUNTS
JPEG = "pi0fm/jpeg"  # request: a picture may be the map {JPEG: bytes}
REPLY_IDENTITY = "pi0fm/identity"  # reply: the identity of the policy that answered
UNCERTAINTY = "pi0fm/uncertainty"  # reply: float, spread of the velocities over the flow steps
ALARM = "pi0fm/alarm"  # reply: 1 where that is above the calibrated threshold, else 0
REFUSED = "pi0fm/refused"  # reply: text instead of the actions, with the request's id; the connection goes on
SCORES = "pi0fm/scores"  # reply: float32 [num_candidates]

EXECUTED = "executed"  # float32 [n, A], commands of the control steps since the last answered observation: row i is for its answer's row i
COUNTS = ("steps", "holds", "clamped", "late_chunks", "skipped_rows", "failures", "refused", "alarms")

MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_DIMENSIONS = 8
MAX_DEPTH = 8
MAX_ITEMS = 16_384
_SIZES_BY_KIND = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_ARRAY_KEYS = {"__ndarray__", "data", "dtype", "shape"}
_SCALAR_KEYS = {"__npgeneric__", "data", "dtype"}

# First bytes by what follows them (the msgpack specification, "Formats").
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def pack(message: Mapping[Any, Any]) -> bytes:
    """Encode a map of text, numbers, lists, maps and arrays as one frame. Raises ObservationError for any other value."""
    if not isinstance(message, Mapping):
        raise ObservationError(f"a message must be a flat map of keys, found {type(message).__name__}: send {{'prompt': ..., ...}}")
    for key in message:
        if not isinstance(key, str):
            raise ObservationError(f"a message's keys must be text, found {key!r}: name it with a str")
    try:
        return msgpack.packb(dict(message), default=_encode_unknown)  # type: ignore[no-any-return,unused-ignore]
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise ObservationError(f"a message must be plain data: {_one_line(error)}; send text, numbers within 64 bits and arrays") from None


def unpack(frame: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> dict[str, Any]:
    """Decode the map in one frame; arrays are C-contiguous, writable, in this machine's byte order.

    Raises ObservationError, before it allocates, for a frame or an array that is cut, too large, too deep, or of another kind.
    """
    if len(frame) > max_bytes:
        raise ObservationError(f"a frame may hold {max_bytes} bytes, found {len(frame)}: send smaller images")
    _check_bounds(frame)
    try:
        message = msgpack.unpackb(frame, object_hook=_decode_marker_map, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
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


def _check_bounds(frame: bytes) -> None:
    """Raise ObservationError unless the frame is exactly one msgpack item within MAX_DEPTH and MAX_ITEMS, without extension types.

    msgpack trusts the lengths that a frame declares, and a small frame can unfold into a large tree: one byte `80` becomes a dict of
    64 bytes. This walk reads only the first byte of each item and jumps over its payload, so its cost grows with the number of items
    (about fifty for an observation), not with the bytes of the images.

        84 | a5 image | 84 c4 .. c3 c4 .. c5 ff ff <jump> .. | a6 prompt | a4 pick | ...
        ^    ^          ^
        |    item 2     item 3: a map, so 8 more items are due, one level deeper
        item 1: a map of 4, so 8 items are due
    """
    position, items = 0, 0
    due = [1]  # items still to come, by level
    while due:
        if due[-1] == 0:
            due.pop()
            continue
        due[-1] -= 1
        items += 1
        position, children = _read_item(frame, position)
        if position > len(frame):
            raise ObservationError(f"a frame must be whole: it ends at byte {len(frame)}, inside an item; send it again, in one message")
        if items + children > MAX_ITEMS:
            raise ObservationError(f"a frame may hold {MAX_ITEMS} items, found more: send numbers as one array, not as a list")
        if children:
            due.append(children)
            if len(due) > MAX_DEPTH + 1:
                raise ObservationError(f"a frame may nest {MAX_DEPTH} levels, found more: send a flat map of keys to arrays")
    if position < len(frame):
        raise ObservationError(f"a frame must hold one message: {len(frame) - position} bytes follow it; send one map a frame")


def _read_item(frame: bytes, position: int) -> tuple[int, int]:
    """Return where the bytes of one item end and how many items it contains; an end past the frame's end means that the frame is cut."""
    if position >= len(frame):
        return len(frame) + 1, 0
    code = frame[position]
    position += 1
    if code <= 0x7F or code >= 0xE0:
        return position, 0
    if code <= 0x8F:
        return position, 2 * (code & 0x0F)
    if code <= 0x9F:
        return position, code & 0x0F
    if code <= 0xBF:
        return position + (code & 0x1F), 0
    if code in _FIXED:
        return position + _FIXED[code], 0
    if code in _SIZED:
        width = _SIZED[code]
        return position + width + int.from_bytes(frame[position : position + width], "big"), 0
    if code in _CONTAINERS:
        width, each = _CONTAINERS[code]
        return position + width, each * int.from_bytes(frame[position : position + width], "big")
    raise ObservationError(
        f"a frame may hold maps, lists, text, bytes and numbers, found msgpack type 0x{code:02x}: send no extension types"
    )


def _encode_unknown(value: Any) -> Any:
    """Return arrays, numpy scalars and mappings as plain data. msgpack calls it for types that it does not know."""
    if isinstance(value, np.ndarray):
        _number_type(value.dtype.str)
        # tobytes gives C order for any layout, a transposed or empty array included.
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _number_type(value.dtype.str)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in it")


def _decode_marker_map(found: dict[Any, Any]) -> Any:
    """Return the array or scalar that a marker map encodes; return any other map unchanged."""
    fields = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: value for key, value in found.items()}
    for marker, keys, build in (("__ndarray__", _ARRAY_KEYS, _decode_array), ("__npgeneric__", _SCALAR_KEYS, _decode_scalar)):
        if marker not in fields:
            continue
        if len(found) != len(keys) or set(fields) != keys or fields[marker] is not True:
            raise ObservationError(
                f"a map with {marker} must have {marker} = true and {sorted(keys - {marker})}, found {_first_keys(found)}"
            )
        return build(fields)
    return found


def _decode_array(fields: Mapping[str, Any]) -> NDArray[Any]:
    data, dtype, shape = fields["data"], _number_type(fields["dtype"]), fields["shape"]
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


def _decode_scalar(fields: Mapping[str, Any]) -> np.generic:
    dtype, data = _number_type(fields["dtype"]), fields["data"]
    allowed: type | tuple[type, ...] = {"b": bool, "i": int, "u": int}.get(dtype.kind, (int, float))
    if not isinstance(data, allowed) or (isinstance(data, bool) and dtype.kind != "b"):
        raise ObservationError(f"a scalar of type {dtype.str} must hold such a number, found {str(data)[:40]!r}")
    try:
        return dtype.newbyteorder("=").type(data)  # type: ignore[no-any-return]
    except OverflowError:
        raise ObservationError(f"a scalar of type {dtype.str} cannot hold {data}: send a wider type") from None


def _number_type(text: Any) -> np.dtype[Any]:
    """Return the number type that a text such as `<f4` names; numpy never parses foreign text."""
    kind, size = (text[1:2], text[2:]) if isinstance(text, str) and len(text) == 3 and text[0] in "<>|=" else ("", "")
    if kind not in _SIZES_BY_KIND or size not in [str(size) for size in _SIZES_BY_KIND[kind]]:
        raise ObservationError(
            f"an array must be of bool, int, uint or float, found dtype {str(text)[:40]!r}: "
            + ("send a text as str" if str(text)[1:2] in ("U", "S") else "convert it with .astype(np.float32)")
        )
    dtype: np.dtype[Any] = np.dtype(text)
    return dtype


def _first_keys(found: Mapping[Any, Any]) -> str:
    return ", ".join(str(key)[:20] for key in list(found)[:6])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
