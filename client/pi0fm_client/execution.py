"""Turn a policy's chunks into one action for each control step, however late or lost the replies are.

Owns: control steps, requests in the background, alignment of chunks, the hand-over from one to the next, the watchdog. Does not know:
how a policy is reached (client.py), the limits of an action (safety.py).
Shape letters: H action horizon, A robot action dim, S state dim.

    step      k                    k+d                         k+s
    robot     o_k sent             reply of o_k arrives        next observation is sent
    old chunk ====================>|                            d = inference_delay
    new chunk a_0 .. a_{d-1} skipped, a_d .. executed ------->  s = execution_horizon
                                                       no chunk ------> standstill, until the next one

Row i of a chunk belongs to control step k + i and to no other: a row whose step has passed is skipped, and a step without a row is a
standstill. So nothing expired is executed and nothing twice, however late, lost or slow the replies are.
"""

import asyncio
import inspect
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi0fm_client import arguments, wire
from pi0fm_client.errors import ConfigError, ServingError
from pi0fm_client.safety import Limiter, Limits, ObservationCheck, StateCheck, Vector, is_beyond
from pi0fm_client.types import ActionChunk

HAND_OVERS = ("auto", "realtime", "ensemble", "switch")
BEYOND_LIMITS = ("clamp", "refuse")
DELAYS_KEPT, DELAY_PERCENTILE = 100, 95
COMMANDS_KEPT = 256  # to report
ENSEMBLE_DECAY = 0.01  # of a chunk's weight with each newer one, as in ACT
LONGEST_PAUSE_SECONDS = 0.5  # between requests that fail: a chunk or so
EARLIEST = 0.75  # steps by which a control loop may be ahead of its rate
logger = logging.getLogger(__name__)
Message = Mapping[str, Any]
Reply = Future[ActionChunk] | asyncio.Future[ActionChunk]


class InferencePolicy(Protocol):
    """The policy: a PolicyClient, an AsyncPolicyClient, a RemotePolicy, or a policy in this process."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the policy."""

    def infer(self, observation: Mapping[str, Any]) -> Any:
        """Return the ActionChunk of a flat map of keys, or an awaitable of it."""


@dataclass(frozen=True)
class Command:
    """One control step's command: float64 [A], robot units. expires_at: on the executor's clock. held: the watchdog's, not a chunk's."""

    action: Vector
    step: int
    expires_at: float
    held: bool


@dataclass
class Report:
    """Counts since the start. inference_delay: the estimate, control steps. clamped: int [A], commands that a limit changed.

    alarm: of the newest chunk, by a policy that is calibrated; alarms: how many chunks raised one.
    """

    clamped: NDArray[np.int64]
    steps: int = 0
    holds: int = 0
    requests: int = 0
    chunks: int = 0
    failures: int = 0
    late_chunks: int = 0
    skipped_rows: int = 0
    refused: int = 0
    inference_delay: int = 0
    last_fault: str = ""
    alarm: bool = False
    alarms: int = 0


@dataclass(frozen=True)
class _Plan:
    """rows [H, A] for the control steps from `step` on."""

    step: int
    rows: Vector

    def at(self, step: int) -> Vector | None:
        return self.rows[step - self.step] if 0 <= step - self.step < len(self.rows) else None


@dataclass(frozen=True)
class _Request:
    step: int
    state: Vector
    reply: Reply


@final
class Executor:
    """The control loop's side of a policy. All methods belong to one thread, and none waits for the policy.

        with PolicyClient("ws://HOST:8000") as policy, Executor(policy, control_hz=50, initial_command=robot.position()) as executor:
            while robot.works():
                executor.observe(robot.observe)
                robot.apply(executor.next())
                executor.pace()

    initial_command: [A], keeps the robot where it is until the first chunk comes.
    execution_horizon: steps after which the next observation is sent; None takes the policy's, or half a chunk.
    hand_over: `realtime` sends the old chunk's remainder, as the limits leave it, with the observation, `ensemble` averages overlapping
    chunks, `switch` goes to the newest; `auto` is realtime where the policy knows it (`wire.ACTION_PREFIX` among its extensions), else
    switch.
    limits: a map, or a JSON file of the robot's own (`Limits.read`); with the policy's own, the stricter wins. Units that are not the
    policy's are refused where both are known; limits that do not suit the training's range are warned of.
    beyond_limits: `clamp` to the nearest command within, or `refuse` the rest of the chunk and stand still.
    relative_to_state: action dimensions that the policy gives as a difference from the state's same dimension.
    cameras, state_check: of ObservationCheck. submit: starts an inference and returns its future; None runs the policy in a thread, or
    in the running event loop when its `infer` is a coroutine. clock: seconds.
    Raises ConfigError for arguments that are wrong or do not fit together.
    """

    def __init__(
        self,
        policy: InferencePolicy,
        *,
        control_hz: float,
        initial_command: ArrayLike,
        execution_horizon: int | None = None,
        hand_over: Literal["auto", "realtime", "ensemble", "switch"] = "auto",
        limits: Mapping[str, Any] | str | Path | None = None,
        beyond_limits: Literal["clamp", "refuse"] = "clamp",
        relative_to_state: Sequence[int] = (),
        cameras: Sequence[str] | None = None,
        state_check: StateCheck = "refuse",
        submit: Callable[[Message], Reply] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        known = _known(policy)
        self._extensions = frozenset(known[wire.EXTENSIONS])
        control_hz = arguments.number("control_hz", control_hz, "50", 0.0)
        start = arguments.vector("initial_command", initial_command, known.get("robot_action_dim"))
        if execution_horizon is not None:
            execution_horizon = arguments.whole("execution_horizon", execution_horizon, 1, known.get("action_horizon", math.inf))
        arguments.word("hand_over", hand_over, HAND_OVERS)
        arguments.word("beyond_limits", beyond_limits, BEYOND_LIMITS)
        if hand_over == "realtime" and wire.ACTION_PREFIX not in self._extensions:
            raise ConfigError("this policy knows no real-time hand-over: type hand_over='ensemble' or 'switch', or serve it with one")
        _warn_of_rate(known.get("fps"), control_hz)
        self._realtime = hand_over == "realtime" or (hand_over == "auto" and wire.ACTION_PREFIX in self._extensions)
        self._ensemble, self._refuse = hand_over == "ensemble", beyond_limits == "refuse"
        self._action_horizon = known.get("action_horizon")
        self._names = arguments.texts("the policy's action_names", known.get("action_names", ()))
        self._horizon = execution_horizon or known.get("execution_horizon")
        self._dt, self._clock = 1.0 / control_hz, arguments.call("clock", clock)
        bounds = Limits.read(limits, start.size).stricter(_limits_of(known, start.size))
        _warn_of_units(bounds, known, control_hz)
        self._limiter = Limiter(bounds, start)
        self._relative = arguments.dimensions("relative_to_state", relative_to_state, min(start.size, known.get("state_dim", start.size)))
        if cameras is not None and not arguments.texts("cameras", cameras):
            raise ConfigError("cameras must name one camera or more that suffice, found none: leave it out to require all")
        self._check = ObservationCheck(known, cameras=cameras, mode=state_check)
        self._worker = None
        if submit is not None:
            arguments.call("submit", submit)
        elif inspect.iscoroutinefunction(policy.infer):
            submit = partial(_start_task, policy)
        else:
            self._worker = _Worker(policy)
            submit = self._worker.submit
        self._submit = submit
        self._origin: float | None = None
        self._plans: list[_Plan] = []
        self._request: _Request | None = None
        self._delays: deque[int] = deque(maxlen=DELAYS_KEPT)
        self._answered_step: int | None = None
        self._commands: deque[tuple[int, Vector]] = deque(maxlen=COMMANDS_KEPT)
        self._not_before, self._pause = -math.inf, self._dt
        self.command = Command(start, -1, -math.inf, held=True)
        self.report = Report(np.zeros(start.size, np.int64))

    @property
    def due(self) -> bool:
        """Whether `observe` would send an observation now; a loop whose cameras are slow may ask first."""
        self._collect()
        now = self._clock()
        if self._request is not None or now < self._not_before:
            return False
        step = self._step_at(now)
        plan = self._plans[-1] if self._plans else None
        if plan is None or plan.at(step) is None:
            return True
        rows = len(plan.rows)
        wanted = self._horizon or (rows + 1) // 2
        return step - plan.step >= max(1, min(wanted, rows - self.report.inference_delay))

    def observe(self, observation: Message | Callable[[], Message]) -> None:
        """Send an observation of this control step when it is time to; a callable is only called then.

        Raises ObservationError for a missing camera, and for a state that is refused; `next` goes on all the same.
        """
        if not self.due:
            return
        step = self._step_at(self._clock())
        taken = observation() if callable(observation) else observation
        state = self._check(taken)
        # copied, since a robot's driver may fill the same arrays again while they are sent
        message = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in taken.items()}
        self.report.requests += 1
        self._request = _Request(step, state, self._submit(message | self._extras(step)))

    def next(self) -> Vector:
        """Return this control step's command, float64 [A]; a second call within the step returns the same one."""
        self._collect()
        step = self._step_at(self._clock())
        if step == self.command.step:
            return self.command.action
        wanted = self._planned(step)
        allowed = self._limiter.nearest(self._limiter.standstill() if wanted is None else wanted)
        if wanted is not None:
            beyond = is_beyond(allowed, wanted)
            if beyond.any() and self._refuse:
                self.report.refused += 1
                places = [self._names[dim] if dim < len(self._names) else dim for dim in np.flatnonzero(beyond).tolist()]
                self.report.last_fault = f"an action beyond the limits in dimensions {places} was refused"
                self._plans.clear()
                wanted = None
                allowed = self._limiter.nearest(self._limiter.standstill())
            else:
                self.report.clamped += beyond
        self._tell(held=wanted is None, step=step)
        self._limiter.commit(allowed)
        assert self._origin is not None
        self.command = Command(allowed, step, self._origin + (step + 1) * self._dt, held=wanted is None)
        self._commands.append((step, allowed))
        self.report.steps += 1
        self.report.holds += wanted is None
        return allowed.copy()

    def pace(self) -> None:
        """Sleep until the next control step begins."""
        time.sleep(self.seconds_left())

    def seconds_left(self) -> float:
        """Return the seconds until the next control step begins, for a loop of asyncio to sleep."""
        return 0.0 if self._origin is None else max(0.0, self._origin + (self.command.step + 1) * self._dt - self._clock())

    def close(self) -> None:
        """End the thread; a reply that comes later is never read. The policy stays open."""
        if self._worker is not None:
            self._worker.close()

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step_at(self, now: float) -> int:
        """Return the control step of a call at `now`: the clock's, or the one after the last, which a loop may be early for."""
        if self._origin is None:
            self._origin = now
        exact, last = (now - self._origin) / self._dt, self.command.step
        return max(math.floor(exact + 0.5), last + 1 if last + 1 - exact <= EARLIEST else last)

    def _planned(self, step: int) -> Vector | None:
        self._plans = [plan for plan in self._plans if plan.step + len(plan.rows) > step]
        rows = [row for plan in self._plans if (row := plan.at(step)) is not None]
        if not rows:
            return None
        weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(rows)))
        return np.asarray(weights @ np.stack(rows) / weights.sum(), np.float64)

    def _extras(self, step: int) -> dict[str, Any]:
        """Return the extensions of a request: how long its answer is of use, and the old chunk's remainder."""
        extras: dict[str, Any] = {}
        if wire.DEADLINE_MS in self._extensions and self._action_horizon:
            extras[wire.DEADLINE_MS] = self._action_horizon * self._dt * 1e3
        rows = self._ahead(step) if self._realtime and self._plans else np.zeros((0, 0))
        if len(rows):
            extras |= {wire.ACTION_PREFIX: rows.astype(np.float32), wire.INFERENCE_DELAY: min(self.report.inference_delay, len(rows))}
        if wire.REPORT in self._extensions:
            counts = {name: int(np.sum(getattr(self.report, name))) for name in wire.COUNTS}
            extras[wire.REPORT] = {wire.EXECUTED: self._executed(step), **counts}
        return extras

    def _ahead(self, step: int) -> Vector:
        """Return the commands that the old chunk's rows from `step` on become within the limits; under `refuse` up to the refused row."""
        rows = self._plans[-1].rows[step - self._plans[-1].step :]
        given = int(step == self.command.step and len(rows) > 0)  # the command of this step, where it is given already
        commands, whole = self._limiter.ahead(rows[given:])
        commands = np.concatenate([np.broadcast_to(self.command.action, (given, commands.shape[1])), commands])
        return commands[: given + whole] if self._refuse else commands

    def _executed(self, step: int) -> NDArray[np.float32]:
        """Return the commands of the control steps from the last answered observation up to `step`, [n, A]; a missed step's is the last."""
        since = self._answered_step
        if since is None or not self._commands or self._commands[0][0] > since:
            return np.zeros((0, self.command.action.size), np.float32)
        steps, commands = zip(*self._commands, strict=True)
        rows = np.searchsorted(steps, np.arange(since, step), side="right") - 1
        return np.stack(commands)[rows].astype(np.float32)

    def _collect(self) -> None:
        """Take the reply, when it is there."""
        if self._request is None or not self._request.reply.done():
            return
        request, self._request = self._request, None
        now = self._clock()
        step = self._step_at(now)
        try:
            chunk = request.reply.result()
            rows = self._rows(chunk, request.state)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - a policy may raise anything, and the robot must then stand still
            self.report.failures += 1
            self.report.last_fault = f"{type(error).__name__}: {error}"
            self._not_before = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            return
        self._pause = self._dt
        self._answered_step = request.step
        self.report.chunks += 1
        self.report.alarm = bool(chunk.scores.get("alarm", 0.0))
        self.report.alarms += self.report.alarm
        late = step - request.step
        self._note_delay(late, len(rows))
        if late >= len(rows):
            self.report.late_chunks += 1
            self.report.last_fault = f"a chunk of {len(rows)} steps came {late} steps after its observation"
            return
        self.report.skipped_rows += late
        self._plans = [*(self._plans if self._ensemble else ()), _Plan(request.step, rows)]

    def _rows(self, chunk: ActionChunk, state: Vector) -> Vector:
        """Return a chunk's actions [H, A], absolute. Raises ServingError for another shape or numbers that are not finite."""
        rows, width = np.array(chunk.actions, np.float64), self.command.action.size
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows) or not np.isfinite(rows).all():
            raise ServingError(f"a chunk must be finite numbers [H, {width}], found {list(rows.shape)}: check the policy")
        if self._relative:
            if state.ndim != 1 or state.size <= max(self._relative):
                raise ServingError(f"relative actions need the observation's state, found {list(state.shape)}: send it")
            rows[:, self._relative] += state[self._relative]
        return rows

    def _note_delay(self, steps: int, horizon: int) -> None:
        """Estimate the delay from the last requests; the first pays for warming up, so it counts only while it is the only one."""
        if self.report.chunks > 1:
            self._delays.append(steps)
        known = self._delays or [min(steps, horizon // 2)]
        self.report.inference_delay = int(np.percentile(known, DELAY_PERCENTILE, method="higher"))

    def _tell(self, *, held: bool, step: int) -> None:
        if held and not self.command.held:
            logger.warning(
                "control step %d has no action: the robot stands still (%s)", step, self.report.last_fault or "waiting for a chunk"
            )
        elif self.command.held and not held:
            logger.warning("control step %d goes on with a new chunk", step)


@final
class _Worker:
    """Runs the policy in one thread: compiled graphs and caches may belong to the thread that made them."""

    def __init__(self, policy: InferencePolicy) -> None:
        self._policy = policy
        self._waiting: queue.SimpleQueue[tuple[Message, Future[ActionChunk]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="pi0fm-executor", daemon=True).start()

    def submit(self, message: Message) -> Future[ActionChunk]:
        future: Future[ActionChunk] = Future()
        self._waiting.put((message, future))
        return future

    def close(self) -> None:
        self._waiting.put(None)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            message, future = item
            try:
                future.set_result(self._policy.infer(message))
            except Exception as error:  # noqa: BLE001 - the control loop learns of it
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - and must not take a thread's exit for its own
                future.set_exception(ServingError(f"the policy ended with {type(error).__name__}"))


def _start_task(policy: InferencePolicy, message: Message) -> Reply:
    task: asyncio.Future[ActionChunk] = asyncio.ensure_future(policy.infer(message))
    return task


def _known(policy: InferencePolicy) -> dict[str, Any]:
    """Return the policy's metadata, its extensions always among them. Raises ConfigError where it is none, or no policy."""
    arguments.call("policy.infer", getattr(policy, "infer", None))
    known = dict(arguments.mapping("policy.metadata", getattr(policy, "metadata", None)))
    for name in ("action_horizon", "execution_horizon", "robot_action_dim", "state_dim"):
        if known.get(name) is None:
            known.pop(name, None)
        else:
            known[name] = arguments.whole(f"policy.metadata[{name!r}]", known[name], 1)
    return known | {wire.EXTENSIONS: arguments.texts("policy.metadata['extensions']", known.get(wire.EXTENSIONS, ()))}


def _limits_of(known: Mapping[str, Any], width: int) -> Limits:
    """Return the limits in a policy's metadata, with the units of its actions where it has them by name."""
    limits = dict(arguments.mapping("policy.metadata['limits']", known.get("limits") or {}))
    units = arguments.mapping("policy.metadata['units']", known.get("units") or {})
    names = arguments.texts("policy.metadata['action_names']", known.get("action_names") or ())
    if len(names) == width and units:
        limits.setdefault("units", [units.get(name) for name in names])
    return Limits.read(limits, width)


def _warn_of_units(limits: Limits, known: Mapping[str, Any], control_hz: float) -> None:
    """Log limits that do not suit the training's range of the state, in the dimensions that are the action's too."""
    span = arguments.mapping("policy.metadata['state_range']", known.get("state_range") or {})
    low, high = (np.asarray(span.get(end, ()), np.float64) for end in ("min", "max"))
    names, states = (list(known.get(f"{part}_names") or ()) for part in ("action", "state"))
    width, alike = len(limits.low), not (names and states)
    shared = [dim < min(low.size, high.size) and (alike or names[dim : dim + 1] == states[dim : dim + 1]) for dim in range(width)]
    ends = [np.array([end[dim] if shared[dim] else np.nan for dim in range(width)]) for end in (low, high)]
    doubt = limits.doubt(ends[0], ends[1], control_hz)
    if doubt is not None:
        logger.warning("%s", doubt)


def _warn_of_rate(fps: Any, control_hz: float) -> None:
    """Log a control rate that is not the training's, where that is known."""
    trained = arguments.number("policy.metadata['fps']", fps or control_hz, "50", 0.0)
    if not 0.95 < control_hz / trained < 1.05:
        logger.warning(
            "the policy was trained at %g control steps a second and is executed at %g: it will move at another speed", trained, control_hz
        )
