"""A walk over a msgpack frame before anything in it is built.

Owns: the bounds that make a foreign frame safe to decode: whole, nothing behind it, shallow, few items, no extension types.
Does not know: what the items mean; protocol.py builds them.

msgpack trusts the lengths that a frame declares, and a small frame can unfold into a large tree: one byte `80` becomes a dict of
64 bytes. The walk reads only the first byte of each item and jumps over its payload, so its cost goes with the number of items
(about fifty for an observation), not with the bytes of the images.

    84 | a5 image | 84 c4 .. c3 c4 .. c5 ff ff <jump> .. | a6 prompt | a4 pick | ...
    ^    ^          ^
    |    item 2     item 3: a map, so 8 more items are due, one level deeper
    item 1: a map of 4, so 8 items are due
"""

from pi0fm.errors import ObservationError

MAX_DEPTH = 8
MAX_ITEMS = 16_384

# First bytes by what follows them (the msgpack specification, "Formats").
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def check(frame: bytes) -> None:
    """Pass a frame that is exactly one msgpack item within the bounds. Raises ObservationError."""
    position, items = 0, 0
    due = [1]  # items still to come, by level
    while due:
        if due[-1] == 0:
            due.pop()
            continue
        due[-1] -= 1
        items += 1
        position, children = _item(frame, position)
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


def _item(frame: bytes, position: int) -> tuple[int, int]:
    """Where the item's own bytes end, and how many items it contains. An end behind the frame's end means that it is cut."""
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
        return position + width + int.from_bytes(frame[position : position + width]), 0
    if code in _CONTAINERS:
        width, each = _CONTAINERS[code]
        return position + width, each * int.from_bytes(frame[position : position + width])
    raise ObservationError(
        f"a frame may hold maps, lists, text, bytes and numbers, found msgpack type 0x{code:02x}: send no extension types"
    )
