"""A robot as its data set describes it: which column is which camera, where state and action are, how wide they are.

Owns: the names and dimensions of one robot, and the passage from a flat map of keys to an `Observation`.
Does not know: normalisation, padding, tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm.options import nearest, option
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import Observation

PROMPT_KEYS = ("prompt", "task")


@dataclass(frozen=True)
class Embodiment:
    """One robot. State and action widths may be left to the data set; a width that is given must match it."""

    name: str = option("robot", "name of the robot, kept in the bundle")
    cameras: dict[str, str] = option(dict, "camera name -> column of the data set; empty takes every picture column, in order")
    state: str = option("observation.state", "column of the state")
    action: str = option("action", "column of the action")
    state_dim: int | None = option(None, "width of the state; empty takes the data set's")
    robot_action_dim: int | None = option(None, "width of the action; empty takes the data set's")
    delta_actions: tuple[int, ...] = option((), "action dimensions trained as differences from the state's same dimension")

    def __post_init__(self) -> None:
        if len(set(self.cameras.values())) != len(self.cameras):
            raise ConfigError(f"embodiment.cameras names one column twice: {self.cameras}")
        # an action dimension without the state's same dimension has nothing to differ from
        limit = min((width for width in (self.state_dim, self.robot_action_dim) if width is not None), default=None)
        for dim in self.delta_actions:
            if dim < 0 or (limit is not None and dim >= limit):
                raise ConfigError(f"embodiment.delta_actions must be dimensions of state and action, below {limit}, found {dim}")

    def dims(self) -> tuple[int, int]:
        """(state_dim, robot_action_dim) of an embodiment that was resolved against a data set."""
        if self.state_dim is None or self.robot_action_dim is None:
            raise ConfigError("the embodiment's state_dim and robot_action_dim are unknown until a data set or a bundle gives them")
        return self.state_dim, self.robot_action_dim

    def observation(self, flat: Mapping[str, Any]) -> Observation:
        """The observation in a flat map such as `{"observation.images.base": uint8 [h, w, 3], "observation.state": [S], "prompt": str}`.

        Keys may be written with `/` for `.`, and `task` for `prompt`. A camera that is absent is treated as missing.
        Raises ObservationError for an unknown key, no camera at all, or an array of another shape or type.
        """
        given = {str(key).replace("/", "."): value for key, value in flat.items()}
        known = {*(column.replace("/", ".") for column in self.cameras.values()), self.state, *PROMPT_KEYS}
        for key in given:
            if key not in known:
                raise ObservationError(f"unknown observation key {key!r}: {nearest(key, sorted(known))}")
        prompts = [given[key] for key in PROMPT_KEYS if key in given]
        if len(prompts) != 1 or not isinstance(prompts[0], str):
            raise ObservationError(f"an observation needs one text under 'prompt', found {prompts!r:.80}")
        images = {name: picture(given[column], column) for name, column in self.cameras.items() if column in given}
        if self.cameras and not images:
            raise ObservationError(f"an observation needs at least one picture of: {', '.join(self.cameras.values())}")
        if self.state not in given:
            raise ObservationError(f"an observation needs the state under {self.state!r}, found keys: {', '.join(sorted(given))}")
        return Observation(images, vector(given[self.state], self.dims()[0], self.state), prompts[0])


def picture(value: Any, key: str) -> NDArray[np.uint8]:
    """`value` as uint8 [height, width, 3]; anything else raises ObservationError."""
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ObservationError(f"{key} must be uint8 [height, width, 3], found {array.dtype} {list(array.shape)}")
    return array


def vector(value: Any, width: int, key: str) -> NDArray[np.float32]:
    """`value` as finite float32 [width]; anything else raises ObservationError."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.shape != (width,):
        raise ObservationError(f"{key} must be numbers [{width}], found {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ObservationError(f"{key} must be finite, found {array.tolist()}")
    return array.astype(np.float32)


def resolve(embodiment: Embodiment, columns: Mapping[str, tuple[int, ...]], picture_columns: list[str], where: str) -> Embodiment:
    """The embodiment with every blank filled from a data set's columns (name -> shape).

    Raises ConfigError when it names a column that is not there, or a width that differs.
    """
    cameras = dict(embodiment.cameras) or {column.rsplit(".", 1)[-1]: column for column in picture_columns}
    if not cameras:
        raise ConfigError(f"{where} must hold at least one picture column, found: {', '.join(columns)}")
    for name, column in cameras.items():
        if column not in picture_columns:
            raise ConfigError(f"camera {name!r} wants column {column!r}, which {where} does not hold: {nearest(column, picture_columns)}")
    widths: dict[str, Any] = {}
    for field, column, stated in (
        ("state_dim", embodiment.state, embodiment.state_dim),
        ("robot_action_dim", embodiment.action, embodiment.robot_action_dim),
    ):
        shape = columns.get(column)
        if shape is None or len(shape) != 1:
            raise ConfigError(
                f"{where} must hold a one-dimensional column {column!r}, found shape {shape}: {nearest(column, list(columns))}"
            )
        if stated not in (None, shape[0]):
            raise ConfigError(
                f"embodiment.{field} is {stated}, but column {column!r} of {where} is {shape[0]} wide; leave it out or correct it"
            )
        widths[field] = shape[0]
    return replace(embodiment, cameras=cameras, **widths)
