"""From a frame to an observation that can be inferred: everything wrong with a request is found here, before it can share a batch.

Owns: the extension keys of a request, the bounds of its keys and values. Does not know: sockets, queues, the meaning of a robot's keys.

    frame -> pi0fm_client.wire.unpack, bounded -> extensions taken out and checked -> bounded -> `to_observation` -> ReceivedRequest
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pi0fm.options import nearest
from pi0fm_client import wire
from pi0fm_client.errors import ObservationError
from pi0fm_client.types import ActionPrefix, Observation, RobotReport

EXTENSIONS = (wire.REQUEST_ID, wire.DEADLINE_MS, wire.SESSION, wire.JPEG, wire.REPORT)
NOISE_SEED = "noise_seed"
MAX_KEYS = 64
MAX_NAME = 200  # characters of a key or a session
MAX_TEXT = 65_536
MAX_LIST = 4096
MAX_DEADLINE_MS = 3_600_000.0
MAX_CANDIDATES = 32
QUICK_BYTES, QUICK_TEXT = 2**20, 1000  # of a frame and of a text that are judged in the event loop, in less than a millisecond
MAX_EXECUTED = 16_384  # numbers
MAX_COMMAND = 1e9


@dataclass(frozen=True)
class ReceivedRequest:
    """The request in one frame. deadline_ms: from its arrival. prefix: the remainder of the robot's last chunk. candidates: see Request."""

    observation: Observation
    noise_seed: int | None
    request_id: int | None
    deadline_ms: float | None
    session: str
    prefix: ActionPrefix | None = None
    candidates: int | None = None
    report: RobotReport | None = None


@final
class RequestReader:
    """Read frames; safe in several threads.

    to_observation: raises ObservationError for keys and arrays that do not fit the policy. renamed: a message in the policy's keys.
    check_prefix: raises ObservationError for an action prefix that does not fit; None knows no such extension. chooses: the policy can
    sample several chunks. action_dim: of the commands that a robot reports; None takes any width.
    """

    def __init__(
        self,
        to_observation: Callable[[Mapping[str, Any]], Observation],
        max_frame_bytes: int,
        renamed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
        check_prefix: Callable[[ActionPrefix], None] | None = None,
        chooses: bool = False,
        action_dim: int | None = None,
    ) -> None:
        self._to_observation, self._max_frame_bytes, self._renamed = to_observation, max_frame_bytes, renamed
        self._check_prefix, self._action_dim = check_prefix, action_dim
        led = () if check_prefix is None else (wire.ACTION_PREFIX, wire.INFERENCE_DELAY)
        chosen = (wire.NUM_CANDIDATES, wire.UNCERTAINTY) if chooses else ()
        self.extensions = (*EXTENSIONS, *led, *chosen)

    def read(self, frame: bytes) -> ReceivedRequest:
        """Return the request in a frame. Raises ObservationError in one line that names the key."""
        return self.parse(self.unpacked(frame))

    def unpacked(self, frame: bytes) -> dict[str, Any]:
        """Return the map in a frame. Raises ObservationError."""
        return wire.unpack(frame, max_bytes=self._max_frame_bytes)

    def parse(self, message: dict[str, Any]) -> ReceivedRequest:
        """Return the request in a map. Raises ObservationError in one line that names the key."""
        if len(message) > MAX_KEYS:
            raise ObservationError(f"a request may hold {MAX_KEYS} keys, found {len(message)}: send only those of the greeting")
        for key in message:
            if len(key) > MAX_NAME:  # before a nearest key is looked for, which takes the square of the length
                raise ObservationError(f"a key may have {MAX_NAME} characters, found {len(key)}: {key[:40]!r}")
        request_id = whole_number(message.pop(wire.REQUEST_ID, None), wire.REQUEST_ID)
        noise_seed = whole_number(message.pop(NOISE_SEED, None), NOISE_SEED)
        deadline_ms = _deadline(message.pop(wire.DEADLINE_MS, None))
        session = message.pop(wire.SESSION, "")
        if not isinstance(session, str) or len(session) > MAX_NAME:
            raise ObservationError(f"{wire.SESSION} must be a text of at most {MAX_NAME} characters, found {str(session)[:40]!r}")
        prefix, candidates, report = self._prefix(message), None, _report(message.pop(wire.REPORT, None), self._action_dim)
        if wire.NUM_CANDIDATES in self.extensions:
            candidates = whole_number(message.pop(wire.NUM_CANDIDATES, None), wire.NUM_CANDIDATES)
        if candidates is not None and (not 1 <= candidates <= MAX_CANDIDATES or prefix is not None):
            where = "" if prefix is None else f" with {wire.ACTION_PREFIX}: leave one of them out"
            raise ObservationError(f"{wire.NUM_CANDIDATES} must be in 1..{MAX_CANDIDATES}, alone, found {candidates}{where}")
        for key in message:
            if key.startswith(wire.PREFIX):
                raise ObservationError(f"unknown extension {key!r}: {nearest(key, self.extensions)}")
        plain = {key: self._bounded(key, value) for key, value in message.items()}
        return ReceivedRequest(
            self._to_observation(self._renamed(plain)), noise_seed, request_id, deadline_ms, session, prefix, candidates, report
        )

    def _prefix(self, message: dict[str, Any]) -> ActionPrefix | None:
        """Take the action prefix out of a message."""
        if self._check_prefix is None or not {wire.ACTION_PREFIX, wire.INFERENCE_DELAY} & message.keys():
            return None
        actions, delay = message.pop(wire.ACTION_PREFIX, None), whole_number(message.pop(wire.INFERENCE_DELAY, None), wire.INFERENCE_DELAY)
        if not isinstance(actions, np.ndarray):
            raise ObservationError(f"{wire.ACTION_PREFIX} must be an array, found {type(actions).__name__}: send it, or no delay either")
        prefix = ActionPrefix(actions, delay or 0)
        self._check_prefix(prefix)
        return prefix

    def _bounded(self, key: str, value: Any) -> Any:
        """Return a value that is cheap to judge: an array, a number, a short text; a flat list of numbers or a JPEG as an array."""
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise ObservationError(f"{key} may have {MAX_TEXT} characters, found {len(value)}: shorten it")
            return value
        if isinstance(value, list):
            if len(value) > MAX_LIST or not all(type(item) in (int, float) for item in value):
                raise ObservationError(f"{key} must be an array, or a flat list of at most {MAX_LIST} numbers: send an array")
            return np.asarray(value, np.float64)
        if isinstance(value, dict) and value.keys() == {wire.JPEG} and isinstance(value[wire.JPEG], bytes):
            return decode_jpeg(value[wire.JPEG], key, self._max_frame_bytes)
        if isinstance(value, np.ndarray | np.generic | int | float):
            return value
        raise ObservationError(f"{key} must be an array, a number or a text, found {type(value).__name__}")


def is_quick(message: Mapping[str, Any]) -> bool:
    """Tell whether a map costs so little to judge that handing it to another thread would cost more: pictures as arrays, short texts."""
    if len(message) > MAX_KEYS or any(len(key) > MAX_NAME for key in message):
        return False
    plain = (value for key, value in message.items() if key != wire.REPORT)
    return all(
        len(value) <= QUICK_TEXT if isinstance(value, str) else isinstance(value, np.ndarray | np.generic | int | float) for value in plain
    )


def decode_jpeg(encoded: bytes, key: str, max_bytes: int) -> NDArray[np.uint8]:
    """Return a JPEG as uint8 [height, width, 3]; its size is read, and bounded, before its pixels are. Raises ObservationError."""
    try:
        with Image.open(BytesIO(encoded), formats=("JPEG",)) as image:
            width, height = image.size
            if width * height * 3 > max_bytes:
                raise ObservationError(f"{key} may have {max_bytes // 3} pixels, found {width} x {height}: send a smaller picture")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ObservationError(f"{key} must be a whole JPEG, found {len(encoded)} bytes that are none: encode it again") from None


def whole_number(value: Any, key: str) -> int | None:
    """Return `value` as a whole number in [0, 2**63), or None. Raises ObservationError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**63:
        raise ObservationError(f"{key} must be a whole number in [0, 2**63), found {str(value)[:40]}: send one, or leave it out")
    return int(value)


def _report(value: Any, action_dim: int | None) -> RobotReport | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value.keys() <= {wire.EXECUTED, *wire.COUNTS}:
        raise ObservationError(f"{wire.REPORT} must be a map of {', '.join((wire.EXECUTED, *wire.COUNTS))}, found {str(value)[:60]}")
    executed = value.pop(wire.EXECUTED, np.zeros((0, 0), np.float32))
    fits = isinstance(executed, np.ndarray) and executed.ndim == 2 and executed.dtype.kind == "f" and executed.size <= MAX_EXECUTED
    if not fits or not (np.abs(executed) < MAX_COMMAND).all():  # nan is not below it
        raise ObservationError(
            f"{wire.REPORT}: {wire.EXECUTED} must be floats [n, actions], at most {MAX_EXECUTED}, finite: or leave it out"
        )
    if len(executed) and executed.shape[1] != (action_dim or executed.shape[1]):
        raise ObservationError(f"{wire.REPORT}: {wire.EXECUTED} must be [n, {action_dim}], found {list(executed.shape)}: send commands")
    return RobotReport(executed, {name: whole_number(count, f"{wire.REPORT}: {name}") or 0 for name, count in value.items()})


def _deadline(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value > 0:
        raise ObservationError(f"{wire.DEADLINE_MS} must be a number > 0, found {str(value)[:40]}: send the milliseconds that are left")
    return float(min(value, MAX_DEADLINE_MS))
