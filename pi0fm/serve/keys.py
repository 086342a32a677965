"""A robot's own observation keys for our columns, so that a program written for another server need not change.

Owns: the file of keys, the conversion of pictures and of a state in parts. Does not know: frames, networks.

    observation/exterior_image_1_left: observation.images.base      a picture: [h, w, 3] or [3, h, w], uint8 or float in [0, 1], or [1, ..]
    observation/joint_position: observation.state                   a state in parts, joined in the order of the file
    observation/gripper_position: observation.state
    observation/wrist_depth:                                        left out
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.columns.embodiment import PROMPT_KEYS, dotted
from pi0fm.options import nearest, read_yaml
from pi0fm_client.errors import ConfigError, ObservationError

PROMPT = PROMPT_KEYS[0]


@final
@dataclass(frozen=True)
class Keys:
    """A file of keys. columns: a robot's key -> our column, None leaves it out; the greeting holds it for executors."""

    columns: Mapping[str, str | None]
    cameras: frozenset[str]
    state: str

    @cached_property
    def _spelled(self) -> dict[str, str]:
        return {dotted(key): key for key in self.columns}

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {dotted(each): each for each in (*self.cameras, self.state, *PROMPT_KEYS)}

    def __call__(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message under our columns. Raises ObservationError, in the robot's words, for unknown keys and missing parts."""
        message = {self._spelled.get(dotted(key), key): value for key, value in message.items()}
        found = {key: value for key, value in message.items() if key not in self.columns}
        if unknown := [key for key in found if dotted(key) not in self._ours]:
            theirs = [*self.columns, *(each for each in self._ours.values() if each not in self.columns.values())]
            raise ObservationError(f"unknown observation key {unknown[0]!r}: {nearest(unknown[0], theirs)}")
        self._refuse_missing(message)
        parts: list[NDArray[Any]] = []
        for key, column in self.columns.items():
            if key not in message or column is None:
                continue
            if column in found:
                raise ObservationError(f"an observation has {column} once, found it and {key!r}; send one of them")
            if column == self.state:
                parts.append(np.atleast_1d(np.asarray(message[key])))
            else:
                found[column] = as_picture(message[key], key) if column in self.cameras else message[key]
        if parts:
            if any(part.ndim != 1 or part.dtype.kind not in "fiu" for part in parts):
                shapes = [list(part.shape) for part in parts]
                raise ObservationError(f"the parts of {self.state} must be rows of numbers, found shapes {shapes}")
            found[self.state] = np.concatenate(parts)
        return found

    def _refuse_missing(self, message: Mapping[str, Any]) -> None:
        """Raise ObservationError where a part of the state is left out, or every camera."""
        state = [key for key, column in self.columns.items() if column == self.state]
        absent = [key for key in state if key not in message]
        if absent and not (len(absent) == len(state) and dotted(self.state) in map(dotted, message)):
            raise ObservationError(f"an observation needs {', '.join(state)} for the state, found no {absent[0]}")
        theirs = {column: key for key, column in self.columns.items()}
        cameras = [theirs.get(camera, camera) for camera in sorted(self.cameras)]
        if cameras and not {dotted(each) for each in (*cameras, *self.cameras)} & set(map(dotted, message)):
            raise ObservationError(f"an observation needs at least one picture of: {', '.join(cameras)}")


def read_keys(path: Path, metadata: Mapping[str, Any]) -> Keys:
    """Read the file of keys at `path`.

    Raises ConfigError for an unknown column, and for a file after which no message could be inferred.
    """
    cameras, state = frozenset(metadata["cameras"].values()), metadata["state_key"]
    columns: dict[str, str | None] = {}
    for key, column in read_yaml(path).items():
        if not isinstance(key, str) or not (column is None or isinstance(column, str)):
            raise ConfigError(f"{path} must map a key to a column, or to nothing, found {key!r}: {column!r}; write KEY: COLUMN")
        if column is not None and column not in {*cameras, state, PROMPT}:
            raise ConfigError(f"{path} maps {key!r} to {column!r}, no column of the bundle: {nearest(column, [*sorted(cameras), state])}")
        twin = next((other for other in columns if dotted(other) == dotted(key)), None)
        if twin is not None:
            raise ConfigError(f"{path} names one key twice, as {twin!r} and {key!r}: leave one of them out")
        columns[key] = column
    for single, what in ((PROMPT, "text"), *((camera, "picture") for camera in sorted(cameras))):
        theirs = [key for key, column in columns.items() if column == single]
        if len(theirs) > 1:
            raise ConfigError(f"{path} maps {' and '.join(theirs)} to one {what} {single}; leave one of them out")
    kinds = {**dict.fromkeys(map(dotted, cameras), "a picture"), dotted(state): "the state", **dict.fromkeys(PROMPT_KEYS, "a text")}
    for key, column in columns.items():
        if column is not None and kinds.get(dotted(key), kinds[dotted(column)]) != kinds[dotted(column)]:
            raise ConfigError(
                f"{path} maps {key!r}, {kinds[dotted(key)]}, to {column!r}, {kinds[dotted(column)]}: no message would be inferred"
            )
    gone = {key for key, column in columns.items() if column is None} - set(columns.values())
    for column in (PROMPT, state):
        if column in gone:
            raise ConfigError(f"{path} leaves {column!r} out, and maps no other key to it: no message would be inferred; remove that line")
    if cameras and cameras <= gone:
        raise ConfigError(f"{path} leaves every camera out ({', '.join(sorted(cameras))}): no message would be inferred; keep one of them")
    return Keys(columns, cameras, state)


def as_picture(value: Any, key: str) -> NDArray[np.uint8]:
    """Return a picture as uint8 [height, width, 3]. Raises ObservationError for another array."""
    array = np.asarray(value)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f":
        if not (array.size and array.min() >= 0 and array.max() <= 1):  # nan is not within it either
            raise ObservationError(f"{key} must be uint8, or float in [0, 1], found {array.dtype} {list(array.shape)} beyond it")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ObservationError(f"{key} must be [height, width, 3] or [3, height, width], found {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)
