"""Limits on a robot's commands, and checks of the observations for a policy.

Owns: limits of each action dimension, the nearest command within them, the comparison of an observation with the training's. Does not
know: chunks, time, networks.
Shape letters: A robot action dim, S state dim.

    wanted  ----> position, change of one step, change of that change ----> command
                  low .. high       velocity              acceleration

An action is a target, or an increment (a displacement, a speed) where the robot's file says so; then it is itself the change.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0fm_client import arguments
from pi0fm_client.errors import ConfigError, ObservationError

Vector = NDArray[np.float64]
StateCheck = Literal["refuse", "warn", "off"]
CHECKS = get_args(StateCheck)
ROUNDING = 1e-6  # of an action in float32, which is not beyond a limit in float64
MARGIN = 0.5  # of the training's range of a state, by which it may be left
logger = logging.getLogger(__name__)
FASTEST_CROSSING, SLOWEST_CROSSING = 0.05, 20.0  # seconds from one end of the training's range to the other; else units are doubtful
_SPELLINGS = {
    **dict.fromkeys(("degree", "degrees", "°"), "deg"),
    **dict.fromkeys(("radian", "radians"), "rad"),
    **dict.fromkeys(("metre", "metres", "meter", "meters"), "m"),
    **dict.fromkeys(("millimetre", "millimetres", "millimeter", "millimeters"), "mm"),
}
_UNITS = {"degrees for radians": np.pi / 180, "radians for degrees": 180 / np.pi, "mm for m": 1e-3, "m for mm": 1e3}


@dataclass(frozen=True)
class Limits:
    """Bounds of each action dimension, [A], infinite where there is none.

    low, high: of an action, robot units. velocity: of its change in one control step. acceleration: of that change's change in one step.
    increments: bool [A], which dimensions are changes themselves: `velocity` bounds them, and `acceleration` their change.
    units: of each dimension, such as deg; "" for one that is not known, () for none.
    """

    low: Vector
    high: Vector
    velocity: Vector
    acceleration: Vector
    increments: NDArray[np.bool_]
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [self.low, self.high, self.velocity, self.acceleration, self.increments]
        if not all(isinstance(each, np.ndarray) and each.dtype.kind in "fb" and each.shape == self.low.shape for each in given) or (
            self.low.ndim != 1 or self.increments.dtype != np.bool_
        ):
            raise ConfigError("limits must be five arrays [A], increments of bool, the others of floats: see Limits.read")
        for name, wrong, rule in (
            ("low", ~(self.low <= self.high), "must not be above high"),
            ("velocity", ~(self.velocity > 0), "must be above 0"),
            ("acceleration", ~(self.acceleration > 0), "must be above 0"),
            ("increments", self.increments & ((self.low > 0) | (self.high < 0)), "need low <= 0 <= high, or they cannot stand still"),
        ):
            if wrong.any():
                found = np.asarray(getattr(self, name))[wrong].tolist()
                raise ConfigError(f"{name} {rule}, found {str(found)[:60]}: see dimensions {np.flatnonzero(wrong).tolist()}")

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path | None, action_dim: int, where: str = "limits") -> "Limits":
        """Return the limits in a map, or in a JSON file of one: a number, or a list with null for none, for each field that it names.

            {"low": -3.1, "high": [3.1, 3.1, 0.04], "velocity": 0.05, "acceleration": [0.01, 0.01, null], "units": ["rad", "rad", "m"]}

        increments is a list of dimensions; units one text, or a list with null for unknown ones. Raises ConfigError for anything else.
        """
        action_dim, tree = arguments.whole("action_dim", action_dim, 1, 65_536), {} if source is None else source
        if isinstance(tree, str | Path):
            where = " ".join(str(tree).split())[:200]
            try:
                tree = json.loads(Path(tree).read_text(), object_pairs_hook=_each_once)
            except (OSError, ValueError, RecursionError) as error:
                told = getattr(error, "strerror", None) or arguments.shown(str(error))
                raise ConfigError(f"{where} must be a JSON file of a robot's limits, found {told}: correct the path or the file") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(tree, Mapping) or not set(tree) <= set(known):
            found = [str(name) for name in tree] if isinstance(tree, Mapping) else tree
            raise ConfigError(f"{where} may hold {', '.join(known)}, found {arguments.shown(found)}: correct the names")
        increments = np.zeros(action_dim, np.bool_)
        increments[arguments.dimensions(f"{where}: increments", tree.get("increments", ()), action_dim)] = True
        none = {name: -np.inf if name == "low" else np.inf for name in known if name not in ("increments", "units")}
        bounds = {name: _bound(tree.get(name), none[name], action_dim, f"{where}: {name}") for name in none}
        try:
            return cls(increments=increments, units=_units(tree.get("units"), action_dim, where), **bounds)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def stricter(self, other: "Limits") -> "Limits":
        """Return the limits that satisfy both. Raises ConfigError where nothing does."""
        if len(other.low) != len(self.low):
            raise ConfigError(f"limits must be of as many dimensions as the robot's {len(self.low)}, found {len(other.low)}: correct them")
        units = tuple(ours or theirs for ours, theirs in zip(self.units, other.units, strict=True)) if self.units and other.units else ()
        for dim, (ours, theirs) in enumerate(zip(self.units, other.units, strict=False)):
            if ours and theirs and ours != theirs:
                raise ConfigError(
                    f"limits must be in the policy's units, found {ours} for dimension {dim}, which the policy has in {theirs}: "
                    f"write them in {theirs}"
                )
        low, high = np.maximum(self.low, other.low), np.minimum(self.high, other.high)
        if (low > high).any():
            raise ConfigError(f"the robot's limits and the policy's exclude each other in dimensions {np.flatnonzero(low > high).tolist()}")
        velocity, acceleration = np.minimum(self.velocity, other.velocity), np.minimum(self.acceleration, other.acceleration)
        return Limits(low, high, velocity, acceleration, self.increments | other.increments, units or self.units or other.units)

    def doubt(self, low: Vector, high: Vector, control_hz: float) -> str | None:
        """Return a line where these limits do not suit positions from `low` to `high` [A], NaN where unknown, as those of other units do.

        In a dimension they suit that allow a tenth of that range or more, and speeds that cross it in 0.05 to 20 s.
        """
        span = high - low
        for dim in np.flatnonzero(~self.increments & np.isfinite(span) & (span > 0)).tolist():
            bounds = np.array([self.low[dim], self.high[dim]])

            def suits(factor: float, dim: int = dim, bounds: Vector = bounds) -> bool:
                shared = min(bounds[1] * factor, high[dim]) - max(bounds[0] * factor, low[dim])
                seconds = span[dim] / (self.velocity[dim] * factor * control_hz)
                bound = seconds >= FASTEST_CROSSING or np.isinf(self.velocity[dim])
                return bool(shared >= 0.1 * span[dim] and bound and seconds <= SLOWEST_CROSSING)

            if not suits(1.0):
                units = next((f", {name}?" for name, factor in _UNITS.items() if suits(factor)), "")
                return (
                    f"limits of dimension {dim}, from {bounds[0]:.4g} to {bounds[1]:.4g} by {self.velocity[dim]:.4g} in a control step, do "
                    f"not suit its range in training, {low[dim]:.4g} .. {high[dim]:.4g}{units}: check their units"
                )
        return None


@final
class Limiter:
    """The last command, and the nearest allowed one to the next wanted action.

    A robot that starts outside its position limits may move back, never further out.
    """

    def __init__(self, limits: Limits, start: ArrayLike) -> None:
        self._limits = limits
        self.command = np.array(start, np.float64)
        outside = ~limits.increments & ((self.command < limits.low) | (self.command > limits.high))
        if outside.any():
            dims = np.flatnonzero(outside).tolist()
            logger.warning("the robot starts outside its limits in dimensions %s: it may move towards them, never further out", dims)
        self._change = np.zeros_like(self.command)

    def standstill(self) -> Vector:
        """Return the command that keeps the robot where it is: the last target, and no increment."""
        return np.where(self._limits.increments, 0.0, self.command)

    def nearest(self, wanted: Vector) -> Vector:
        """Return the allowed command nearest to `wanted`, dimension by dimension.

        Speed towards a bound is kept so low that `acceleration` suffices to stop in front of it; so an allowed command always exists.
        """
        return _allowed(self._limits, self.command, self._change, wanted)

    def ahead(self, rows: Vector) -> tuple[Vector, int]:
        """Return the commands that would be given for `rows` [n, A] one after another, and the number of the first that differs, else n."""
        last = np.concatenate([self.command[None], rows[:-1]])
        change = np.diff(last, axis=0, prepend=(self.command - self._change)[None])
        # as long as no row differs, each is preceded by those before it
        differs = is_beyond(_allowed(self._limits, last, change, rows), rows).any(1)
        first = int(differs.argmax()) if differs.any() else len(rows)
        commands = rows.copy()
        command, step = (last[first], change[first]) if first < len(rows) else (self.command, self._change)
        for index in range(first, len(rows)):
            commands[index] = _allowed(self._limits, command, step, rows[index])
            command, step = commands[index], commands[index] - command
        return commands, first

    def commit(self, command: Vector) -> None:
        """Record the command that the robot was given."""
        self._change, self.command = command - self.command, command


def is_beyond(allowed: Vector, wanted: Vector) -> NDArray[np.bool_]:
    """Tell which numbers a limit changed by more than their rounding in float32."""
    return np.asarray(abs(allowed - wanted) > ROUNDING * (1.0 + abs(wanted)))


def _allowed(bounds: Limits, last: Vector, change: Vector, wanted: Vector) -> Vector:
    """Return the allowed commands nearest to `wanted`, [..., A], after the commands `last`, which changed by `change`."""
    low, high = np.minimum(bounds.low, last), np.maximum(bounds.high, last)
    fastest, slowest = change + bounds.acceleration, change - bounds.acceleration
    up = np.minimum(np.minimum(bounds.velocity, fastest), _brakes_within(high - last, bounds.acceleration))
    down = np.maximum(np.maximum(-bounds.velocity, slowest), -_brakes_within(last - low, bounds.acceleration))
    target = np.clip(last + np.clip(wanted - last, down, up), low, high)
    most = np.minimum(np.minimum(bounds.velocity, bounds.high), last + bounds.acceleration)
    least = np.maximum(np.maximum(-bounds.velocity, bounds.low), last - bounds.acceleration)
    return np.asarray(np.where(bounds.increments, np.clip(wanted, least, most), target), np.float64)


def _brakes_within(distance: Vector, acceleration: Vector) -> Vector:
    """Return the largest change v of one step with v + (v - a) + (v - 2 a) + ... <= distance, over the positive terms."""
    with np.errstate(invalid="ignore"):  # inf / inf, where the distance or the acceleration has no bound
        steps = np.maximum(1.0, np.ceil((np.sqrt(1.0 + 8.0 * distance / acceleration) - 1.0) / 2.0))
        speed = distance / steps + acceleration * (steps - 1.0) / 2.0
    return np.where(np.isinf(distance) | np.isinf(acceleration), distance, speed)


@final
class ObservationCheck:
    """Compare observations with the training's, by the policy's metadata: `cameras`, `state_key`, `state_range` (min, max).

    cameras: names of those that must be there; None asks for all. Where the metadata has `keys`, the robot's own keys for columns
    (`pi0fm serve --keys`), either may be sent. mode: a state outside the training's range by more than
    MARGIN of its width is refused, warned of (once for each dimension), or not looked at (off).
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        *,
        cameras: Sequence[str] | None = None,
        mode: StateCheck = "refuse",
    ) -> None:
        metadata = arguments.mapping("the policy's metadata", metadata)
        known = arguments.mapping("the policy's cameras", metadata.get("cameras", {}))
        unknown = sorted(set(arguments.texts("cameras", () if cameras is None else cameras)) - set(known))
        if unknown:
            raise ConfigError(f"the policy has the cameras {sorted(known)}, found {unknown}: correct cameras=")
        self._mode, self._warned = arguments.word("a state check", mode, CHECKS), set[tuple[int, str]]()
        self._keys = [_dotted(str(column)) for name, column in known.items() if cameras is None or name in cameras]
        self._state_key = _dotted(str(metadata.get("state_key", "observation/state")))
        self._names = arguments.texts("the policy's state_names", metadata.get("state_names", ()))
        own = arguments.mapping("the policy's keys", metadata.get("keys", {}))
        self._columns = {_dotted(key): _dotted(str(column)) for key, column in own.items() if column is not None}
        self._range: list[Vector] | None = None
        if self._mode != "off" and (bounds := metadata.get("state_range")) is not None:
            bounds = arguments.mapping("the policy's state_range", bounds)
            low = arguments.vector("the policy's state_range min", bounds.get("min"))
            self._range = [low, arguments.vector("the policy's state_range max", bounds.get("max"), low.size)]

    def __call__(self, observation: Mapping[str, Any]) -> Vector:
        """Return the state, [0] where there is none. Raises ObservationError for a missing camera, and for a state that is refused."""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation must be a flat map of keys, found {type(observation).__name__}: send {{'prompt': ...}}")
        given = {_dotted(str(key)): value for key, value in observation.items()}
        columns = {self._columns.get(key, key) for key in given}
        missing = [key for key in self._keys if key not in columns]
        if missing:
            raise ObservationError(f"the policy needs the cameras {', '.join(self._keys)}, found no {missing[0]}: send it, or say cameras=")
        state = self._state(given)
        fault = self._state_fault(state)
        if fault is not None and self._mode == "refuse":
            usable = self._range is not None and state.shape == self._range[0].shape and np.isfinite(state).all()
            raise ObservationError(f"{fault[1]}; or let it pass by state_check warn" if usable else fault[1])
        if fault is not None and fault[0] not in self._warned:
            self._warned.add(fault[0])
            logger.warning("%s", fault[1])
        return state

    def _state(self, given: Mapping[str, Any]) -> Vector:
        """Return the state, joined from its parts in the order of the policy's `keys` where the robot sends parts."""
        parts = [key for key, column in self._columns.items() if column == self._state_key and key in given] or [self._state_key]
        try:
            found = [np.array(given.get(key, ()), np.float64) for key in parts]
            return found[0] if len(found) == 1 else np.concatenate([np.atleast_1d(part) for part in found])
        except (TypeError, ValueError):
            shown = arguments.shown([given.get(key) for key in parts])
            raise ObservationError(f"{self._state_key} must be numbers, found {shown}: send one number for each joint") from None

    def _state_fault(self, state: Vector) -> tuple[tuple[int, str], str] | None:
        """Return ((dimension, likely unit), line) of the first fault of a state, or None."""
        if self._range is None:
            return None
        low, high = self._range
        if state.shape != low.shape:
            found = list(state.shape) if state.size else "none"
            return (-1, ""), f"{self._state_key} must have {len(low)} numbers, found {found}: send one for each joint"
        slack = MARGIN * (high - low) + 0.01 * np.maximum(abs(low), abs(high)) + 1e-6
        outside = ~((low - slack <= state) & (state <= high + slack))
        if not outside.any():
            return None
        dim = int(np.flatnonzero(outside)[0])
        units = [
            f", {name}?"
            for name, factor in _UNITS.items()
            if ((low - slack <= state * factor) & (state * factor <= high + slack))[outside].all()
        ]
        name = f" ({self._names[dim]})" if dim < len(self._names) else ""
        return (dim, "".join(units[:1])), (
            f"{self._state_key}[{dim}]{name} was {low[dim]:.4g} .. {high[dim]:.4g} in training, found {state[dim]:.4g} "
            f"({outside.sum()} of {len(state)} outside{units[0] if units else ''}): check its units and order"
        )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a name that it holds twice, of which Python would keep the last."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} twice")
    return dict(pairs)


def _units(given: Any, width: int, where: str) -> tuple[str, ...]:
    """Return the unit of each dimension in one spelling, () where none is given."""
    listed = [given] * width if given is None or isinstance(given, str) else given
    if not isinstance(listed, Sequence) or len(listed) != width or not all(each is None or isinstance(each, str) for each in listed):
        raise ConfigError(f"{where}: units must be a text or {width} of them, null for an unknown one, found {str(given)[:60]}: type deg")
    found = tuple("" if each is None else _SPELLINGS.get(each.strip().lower(), each.strip()) for each in listed)
    return found if any(found) else ()


def _bound(given: Any, default: float, width: int, where: str) -> Vector:
    """Return one bound for each dimension."""
    values = given if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else [given] * width
    numeric = all(value is None or (isinstance(value, Real) and not isinstance(value, bool)) for value in values)
    found = np.array([default if value is None else float(value) for value in values]) if numeric else np.zeros(0)
    if found.shape != (width,) or np.isnan(found).any():
        raise ConfigError(f"{where} must be a number or {width} of them, null for none, found {str(given)[:60]}")
    return found


def _dotted(key: str) -> str:
    return key.replace("/", ".")
