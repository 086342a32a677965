"""Robot as its data set describes it: columns of cameras, state and action, widths, names and units of dimensions.

Owns: the names and dimensions of one robot, and the conversion of a flat map of keys to an `Observation`.
Does not know: normalisation, padding, tensors.
"""

import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pi0fm.options import nearest, option, refuse_below
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.safety import Limits
from pi0fm_client.types import Observation

PROMPT_KEYS = ("prompt", "task")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns that LeRobot adds


@dataclass(frozen=True)
class Embodiment:
    """Robot of a data set. Widths of state and action may be left to the data set; a given width must match it."""

    name: str = option("robot", "name of the robot, kept in the bundle")
    cameras: dict[str, str] = option(dict, "camera name -> column of the data set; empty takes every picture column, in order")
    state: str = option("observation.state", "column of the state")
    action: str = option("action", "column of the action")
    state_dim: int | None = option(None, "width of the state; empty takes the data set's")
    robot_action_dim: int | None = option(None, "width of the action; empty takes the data set's")
    delta_actions: tuple[int | str, ...] = option(
        (), "action dimensions, by number or name, trained as differences from the state's same dimension"
    )
    state_names: tuple[str, ...] = option((), "names of the state's dimensions, kept in the bundle; empty takes the data set's")
    action_names: tuple[str, ...] = option((), "names of the action's dimensions, kept in the bundle; empty takes the data set's")
    units: dict[str, str] = option(dict, "name of a dimension of state or action -> its unit, such as deg; kept in the bundle, and shown")
    limits: dict[str, list[float | None]] = option(
        dict,
        "limits of a command, kept by the robot's client: low, high; velocity, acceleration per control step; increments; null for none",
    )

    def __post_init__(self) -> None:
        refuse_below(self, "embodiment.", state_dim=1, robot_action_dim=1)
        if len(set(self.cameras.values())) != len(self.cameras):
            raise ConfigError(f"embodiment.cameras names one column twice: {self.cameras}")
        for word, names, width in (("state", self.state_names, self.state_dim), ("action", self.action_names, self.robot_action_dim)):
            if len(set(names)) != len(names) or (names and width not in (None, len(names))):
                count = "one name each" if width is None else f"{width} of them"
                raise ConfigError(f"embodiment.{word}_names must be names of all dimensions, {count}, each once, found {', '.join(names)}")
        # a delta action needs the same dimension of the state
        limit = min((width for width in (self.state_dim, self.robot_action_dim) if width is not None), default=None)
        if self.action_names:  # of a resolved embodiment the numbers are kept
            object.__setattr__(self, "delta_actions", tuple(map(self._numbered, self.delta_actions)))
        for dim in self.delta_actions:
            if isinstance(dim, int) and (dim < 0 or (limit is not None and dim >= limit)):
                raise ConfigError(f"embodiment.delta_actions must be dimensions of state and action, below {limit}, found {dim}")
        if len(set(self.delta_actions)) != len(self.delta_actions):
            raise ConfigError(f"embodiment.delta_actions must name each dimension once, found {', '.join(map(str, self.delta_actions))}")
        if self.limits and self.robot_action_dim is not None:
            Limits.read(self.limits, self.robot_action_dim, "embodiment.limits")

    def _numbered(self, dim: int | str) -> int:
        """Return the number of an action dimension. Raises ConfigError for an unknown name, and for one that the state has elsewhere."""
        if isinstance(dim, int):
            return dim
        if dim not in self.action_names:
            raise ConfigError(
                f"embodiment.delta_actions must be numbers or names of the action's dimensions, found {dim!r}: "
                f"{nearest(dim, self.action_names)}"
            )
        number = self.action_names.index(dim)
        if self.state_names and self.state_names[number : number + 1] != (dim,):
            held = self.state_names[number] if number < len(self.state_names) else "not there"
            raise ConfigError(
                f"embodiment.delta_actions are differences from the state's same dimension, but {number} is {dim!r} in the action and "
                f"{held!r} in the state; leave it out, or type {number} if they are one"
            )
        return number

    @property
    def delta_dims(self) -> tuple[int, ...]:
        """Numbers of `delta_actions`. Raises ConfigError for names that no data set has turned into numbers."""
        unknown = [dim for dim in self.delta_actions if not isinstance(dim, int)]
        if unknown:
            raise ConfigError(
                f"embodiment.delta_actions names {unknown[0]!r}, but the action's dimensions have no names; type their numbers"
            )
        return tuple(int(dim) for dim in self.delta_actions)

    def labels(self, column: str, width: int) -> tuple[str, ...]:
        """Name the dimensions of the state's or action's column, with units; by the column's last word where names are unknown."""
        names = {self.state: self.state_names, self.action: self.action_names}.get(column) or ()
        if len(names) != width:
            return tuple(f"{dotted(column).rsplit('.', 1)[-1]} {number}" for number in range(width))
        return tuple(f"{name} ({self.units[name]})" if name in self.units else name for name in names)

    def dims(self) -> tuple[int, int]:
        """(state_dim, robot_action_dim) of an embodiment that was resolved against a data set."""
        if self.state_dim is None or self.robot_action_dim is None:
            raise ConfigError("the embodiment's state_dim and robot_action_dim are unknown until a data set or a bundle gives them")
        return self.state_dim, self.robot_action_dim

    def observation(self, flat: Mapping[str, Any]) -> Observation:
        """Read an observation of keys such as `{"observation.images.base": uint8 [h, w, 3], "observation.state": [S], "prompt": str}`.

        `/` and `.` in a key are equal, and so are `task` and `prompt`. An absent camera is treated as missing.
        Raises ObservationError for an unknown or repeated key, no camera at all, or an array of another shape or type.
        """
        given: dict[str, Any] = {}
        for key, value in flat.items():
            if dotted(str(key)) in given:
                raise ObservationError(f"an observation has each key once, found {key!r} in two spellings; leave one of them out")
            given[dotted(str(key))] = value
        columns = {name: dotted(column) for name, column in self.cameras.items()}
        state = dotted(self.state)
        known = {*columns.values(), state, *PROMPT_KEYS}
        for key in given:
            if key not in known:
                raise ObservationError(f"unknown observation key {key!r}: {nearest(key, sorted(known))}")
        prompts = [given[key] for key in PROMPT_KEYS if key in given]
        if len(prompts) == 2 and isinstance(prompts[0], str) and prompts[0] == prompts[1]:
            prompts = prompts[:1]
        if len(prompts) != 1 or not isinstance(prompts[0], str):
            found = f"{len(prompts)} of them" if len(prompts) != 1 else type(prompts[0]).__name__
            raise ObservationError(f"an observation needs one text under 'prompt', found {found}; send a str")
        images = {name: picture(given[column], column) for name, column in columns.items() if column in given}
        if columns and not images:
            raise ObservationError(f"an observation needs at least one picture of: {', '.join(columns.values())}")
        if state not in given:
            raise ObservationError(f"an observation needs the state under {state!r}, found keys: {', '.join(sorted(given))}")
        return Observation(images, vector(given[state], self.dims()[0], state), prompts[0])


def of_sample(flat: Mapping[str, Any], embodiment: Embodiment) -> Mapping[str, Any]:
    """Convert a row of a LeRobotDataset to a flat map of the keys that a policy reads, pictures [3, height, width] in [0, 1] to uint8.

    A map without torch's tensors is returned as it is. Raises ObservationError for pictures of another form.
    """
    if not any(hasattr(value, "detach") for value in flat.values()):
        return flat
    cameras, others = set(embodiment.cameras.values()), (embodiment.state, *PROMPT_KEYS)
    return {key: _pixels(value, key) if key in cameras else value for key, value in flat.items() if key in cameras or key in others}


def _pixels(value: Any, key: str) -> NDArray[np.uint8]:
    array = np.asarray(value)
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype.kind not in "fu" or 0 in array.shape:
        raise ObservationError(f"{key} of a LeRobot sample must be [3, height, width], found {array.dtype} {list(array.shape)}")
    if array.dtype != np.uint8 and not ((array >= 0) & (array <= 1)).all():
        raise ObservationError(
            f"{key} of a LeRobot sample must lie in [0, 1], found {array.min():.3g} to {array.max():.3g}; open the data set without "
            "transforms that normalise pictures"
        )
    pixels = array if array.dtype == np.uint8 else np.rint(255 * array).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def dotted(key: str) -> str:
    """Spell a key in the form in which keys are compared."""
    return key.replace("/", ".")


def picture(value: Any, key: str) -> NDArray[np.uint8]:
    """Check that `value` is uint8 [height, width, 3]. Raises ObservationError for anything else."""
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ObservationError(
            f"{key} must be uint8 [height, width, 3], found {array.dtype} {list(array.shape)}; convert it, or let the server do it: --keys"
        )
    return array


def vector(value: Any, width: int, key: str) -> NDArray[np.float32]:
    """Convert `value` to finite float32 [width]. Raises ObservationError for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ObservationError(f"{key} must be numbers [{width}], found a list of lists of several lengths") from None
    if array.dtype.kind not in "fiu" or array.shape != (width,):
        raise ObservationError(f"{key} must be numbers [{width}], found {array.dtype} {list(array.shape)}")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ObservationError(f"{key} must be finite in float32, found {array.tolist()}")
    return numbers


def camera_names(columns: Sequence[str]) -> dict[str, str]:
    """Name the camera of each column by its last word, and by as many words before it as distinguish it from the others.

    observation.images.base                        base
    left/rgb, right/rgb                            left_rgb, right_rgb
    """
    words = [re.findall(r"[^./\s]+", column) or [column] for column in columns]
    for count in range(1, max((len(each) for each in words), default=0) + 1):
        names = ["_".join(each[-count:]) for each in words]
        if len(set(names)) == len(names):
            return dict(zip(names, columns, strict=True))
    return {column: column for column in columns}


def resolve(
    embodiment: Embodiment,
    columns: Mapping[str, tuple[int, ...]],
    picture_columns: list[str],
    where: str,
    depth: Sequence[str] = (),
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Embodiment:
    """Fill every blank of the embodiment from a data set's columns (name -> shape) and the names of their dimensions.

    depth: the data set's depth maps, which are no pictures. Raises ConfigError for a missing column, a depth map, a different width, or a
    unit of no dimension.
    """
    cameras = dict(embodiment.cameras) or camera_names(picture_columns)
    if not cameras:
        held = f"depth maps only: {', '.join(depth)}" if depth else ", ".join(columns)
        raise ConfigError(f"{where} must hold a column of dtype image or video, found {held}; correct meta/info.json, or record pictures")
    for name, column in cameras.items():
        if column in depth:
            raise ConfigError(f"camera {name!r} is column {column!r} of {where}, a depth map; pi0fm reads colour pictures: leave it out")
        if column not in picture_columns:
            typed = yaml.safe_dump(_suggested_cameras(cameras, picture_columns), default_flow_style=True, width=math.inf, sort_keys=False)
            raise ConfigError(
                f"camera {name!r} wants column {column!r}, which {where} does not hold; its cameras are {', '.join(picture_columns)}: "
                f"type --embodiment.cameras {shlex.quote(typed.strip())}"
            )
    alike = [column for column in cameras.values() if [dotted(each) for each in cameras.values()].count(dotted(column)) > 1]
    if alike:
        raise ConfigError(
            f"columns {' and '.join(map(repr, alike))} of {where} are one key to a client; type --embodiment.cameras.NAME COLUMN"
        )
    widths: dict[str, Any] = {}
    for part, column, field, stated in (
        ("state", embodiment.state, "state_dim", embodiment.state_dim),
        ("action", embodiment.action, "robot_action_dim", embodiment.robot_action_dim),
    ):
        shape = columns.get(column)
        if shape is None:
            raise ConfigError(
                f"{where} must hold the {part} under {column!r}, found no such column; {_suggested(part, columns, embodiment)}"
            )
        if len(shape) > 1:
            raise ConfigError(
                f"column {column!r} of {where} must be one-dimensional, found shape {list(shape)}; write it as one row of numbers"
            )
        width = shape[0] if shape else 1
        if stated not in (None, width):
            raise ConfigError(
                f"embodiment.{field} is {stated}, but column {column!r} of {where} is {width} wide; type --embodiment.{field} {width}"
            )
        widths[field] = width
        widths[f"{part}_names"] = getattr(embodiment, f"{part}_names") or names.get(column, ())
    found = replace(embodiment, cameras=cameras, **widths)
    found.delta_dims  # noqa: B018 - refuses names where the data set has none
    known = [*found.state_names, *found.action_names]
    for name in found.units:
        if name not in known:
            raise ConfigError(f"embodiment.units must be of dimensions of {where}, found {name!r}: {nearest(name, known)}")
    return found


def _suggested_cameras(cameras: Mapping[str, str], held: Sequence[str]) -> dict[str, str]:
    """Give each camera its own column where the data set holds it, else the most similar one left, else the next; none is given twice."""
    left = [column for column in held if column not in cameras.values()]
    found: dict[str, str] = {}
    for name, column in cameras.items():
        if column in held:
            found[name] = column
        elif left:
            near = difflib.get_close_matches(column, left, n=1, cutoff=0.9)
            found[name] = near[0] if near else left[0]
            left.remove(found[name])
    return found


def _suggested(word: str, columns: Mapping[str, tuple[int, ...]], embodiment: Embodiment) -> str:
    """Advise on a state or action column: one whose last word begins with `word`, the only one left, or all to choose from."""
    rows = [name for name, shape in columns.items() if len(shape) <= 1 and name not in BOOKKEEPING]
    fitting = [name for name in rows if dotted(name).rsplit(".", 1)[-1].startswith(word)]
    left = [name for name in rows if name not in (embodiment.state, embodiment.action)]
    chosen = fitting[:1] or (left if len(left) == 1 else [])
    if chosen:
        return f"type --embodiment.{word} {shlex.quote(chosen[0])}"
    return f"type --embodiment.{word} COLUMN; columns here: {', '.join(rows) or 'none'}"
