"""Evaluation in which the simulator's clock keeps running during inference, as a robot's does.

Owns: the clock, the delay of each answer, one episode in one mode, its measures. Does not know: alignment and hand-over of chunks
(pi0fm_client.execution, the same that drives a robot), the page (report/realtime).

    step       k            k+1 .. k+d-1                k+d
    robot      o_k sent     moves, or stands still      the answer to o_k arrives: the measured or injected delay, and jitter
    policy     infers from o_k at once, in any time on this machine; only the simulator's clock counts

    synchronous      stands still until the answer arrives, then executes its rows from the first on
    asynchronous     the executor's `switch`: continues the old chunk, then takes the newest
    ensemble         the executor's `ensemble`: averages chunks that overlap
    guided, ...      the executor's `realtime`, with each word of policy.load_options.GUIDANCE

    jump        root mean square change of the command from one step to the next where a new chunk takes over, in half the action's range;
                also the same elsewhere
    reaction    from an event at any moment to the first command that follows from an observation of it: with observations at o_j, whose
                answers arrive at a_j, the mean of a_j - t over t in (o_{j-1}, o_j]
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.eval.rollouts.episode import Outcome, one_line
from pi0fm.policy.load_options import GUIDANCE
from pi0fm.sim.environment import Environment
from pi0fm_client import wire
from pi0fm_client.errors import Pi0fmError
from pi0fm_client.execution import Executor, Message
from pi0fm_client.safety import Limiter, Limits
from pi0fm_client.types import ActionChunk

SYNCHRONOUS, ASYNCHRONOUS, ENSEMBLE = "synchronous", "asynchronous", "ensemble"
MODES = (SYNCHRONOUS, ASYNCHRONOUS, ENSEMBLE, *GUIDANCE)
HAND_OVER = {ASYNCHRONOUS: "switch", ENSEMBLE: "ensemble"} | dict.fromkeys(GUIDANCE, "realtime")

Infer = Callable[[Message, int], ActionChunk]
"""Function (flat map of keys with extensions, control step) -> chunk."""


@dataclass(frozen=True)
class Timing:
    """Mode and delay of a cell. delay_ms: injected, or None for each inference's measured time; jitter_ms: deviation of additions."""

    mode: str
    delay_ms: float | None
    jitter_ms: float = 0.0


@dataclass(frozen=True)
class DrivenEpisode:
    """Episode under one timing. held: share of steps at a standstill. answers, failures: number of inferences that arrived, that raised.

    delay_ms: mean over answers. jump, change, reaction_ms: NaN where there was none. own_ms: processor time per step, without policy
    and simulator.
    """

    mode: str
    asked_ms: float | None
    task: str
    seed: int
    outcome: Outcome
    steps: int
    held: float
    answers: int
    failures: int
    delay_ms: float
    jump: float
    change: float
    reaction_ms: float
    own_ms: float
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the row of episodes.parquet."""
        return asdict(self)


class RobotController(Protocol):
    """Interface that turns answers into a command for each step: pi0fm_client's Executor, or `SynchronousController`."""

    def observe(self, observation: Callable[[], Message], /) -> None:
        """Send an observation where one is due."""

    def next(self) -> NDArray[np.float64]:
        """Return the command of this step."""


@final
class DelayedPolicy:
    """Policy with delayed answers: inferred at once, delivered later by the simulator's clock."""

    def __init__(self, infer: Infer, timing: Timing, seed: int, dt: float) -> None:
        self._infer, self._timing, self._dt = infer, timing, dt
        self._random = np.random.default_rng(seed)
        self._waiting: list[tuple[float, int, Future[ActionChunk], ActionChunk | Pi0fmError]] = []
        self.step, self.inference_seconds = 0, 0.0
        self.arrived: list[tuple[int, int]] = []  # (step of the observation, step of its answer)
        self.delays: list[float] = []
        self.failures = 0

    def now(self) -> float:
        """Return the simulator's time in seconds; an executor's clock."""
        return self.step * self._dt

    def submit(self, message: Message) -> Future[ActionChunk]:
        """Infer now, and hold the answer until its delay has passed."""
        began, busy, future = time.perf_counter(), time.thread_time(), Future[ActionChunk]()
        answer: ActionChunk | Pi0fmError
        try:
            answer = self._infer(message, self.step)
        except Pi0fmError as error:
            answer = error
        took = time.perf_counter() - began
        self.inference_seconds += time.thread_time() - busy
        delay = took if self._timing.delay_ms is None else self._timing.delay_ms / 1e3
        delay = max(0.0, delay + self._random.normal(0, self._timing.jitter_ms / 1e3) if self._timing.jitter_ms else delay)
        self._waiting.append((self.now() + delay, self.step, future, answer))
        self.deliver()
        return future

    def deliver(self) -> None:
        """Deliver the answers that have arrived by now."""
        due = [each for each in self._waiting if each[0] <= self.now() + 1e-9]
        for arrival, asked, future, answer in due:
            if isinstance(answer, Pi0fmError):
                self.failures += 1
                future.set_exception(answer)
            else:
                self.arrived.append((asked, self.step))
                self.delays.append(arrival - asked * self._dt)
                future.set_result(answer)
        self._waiting = [each for each in self._waiting if each[0] > self.now() + 1e-9]


@final
class SynchronousController:
    """Synchronous robot: observes at rest, waits, and executes the first `horizon` rows of the answer."""

    def __init__(self, submit: Callable[[Message], Future[ActionChunk]], limits: Limits, start: NDArray[np.float32], horizon: int) -> None:
        self._submit, self._limiter, self._horizon = submit, Limiter(limits, start), horizon
        self._reply: Future[ActionChunk] | None = None
        self._rows: list[NDArray[np.float32]] = []
        self.held = False

    def observe(self, observation: Callable[[], Message], /) -> None:
        """Send an observation when all rows are executed and no answer is awaited."""
        if self._reply is not None and self._reply.done():
            reply, self._reply = self._reply, None
            if reply.exception() is None:
                self._rows = list(reply.result().actions[: self._horizon])
        if self._reply is None and not self._rows:
            self._reply = self._submit(observation())
            if self._reply.done() and self._reply.exception() is None:
                self._rows, self._reply = list(self._reply.result().actions[: self._horizon]), None

    def next(self) -> NDArray[np.float64]:
        """Return the next row, or a standstill."""
        self.held = not self._rows
        wanted = self._limiter.standstill() if self.held else np.asarray(self._rows.pop(0), np.float64)
        command = self._limiter.nearest(wanted)
        self._limiter.commit(command)
        return command


def drive(
    environment: Environment,
    seed: int,
    infer: Infer,
    flat: Callable[[Environment], Message],
    metadata: Mapping[str, Any],
    timing: Timing,
    horizon: int,
    limits: Mapping[str, Any],
    half_range: NDArray[np.float64],
) -> DrivenEpisode:
    """Run one episode. flat: an observation by its keys; limits: of `pi0fm_client.safety`; half_range [A]: of an action's numbers.

    A fault of the environment is this episode's crash; a Pi0fmError of the policy is a missing answer.
    """
    dt = 1.0 / environment.fps
    answers = DelayedPolicy(infer, timing, seed, dt)
    outcome, error, simulated, began = "failure", None, 0.0, time.thread_time()
    commands: list[NDArray[np.float64]] = []
    held: list[bool] = []

    def timed(work: Callable[..., Any], *words: Any) -> Any:
        nonlocal simulated
        start = time.thread_time()
        try:
            return work(*words)
        finally:
            simulated += time.thread_time() - start

    def seen() -> Message:
        message: Message = timed(flat, environment)
        return message

    try:
        timed(environment.reset, seed)
        start = environment.still_action()
        robot: RobotController
        if timing.mode == SYNCHRONOUS:
            robot = SynchronousController(answers.submit, Limits.read(limits, start.size), start, horizon)
        else:
            robot = Executor(
                _MetadataOnly(metadata),
                control_hz=environment.fps,
                initial_command=start,
                execution_horizon=horizon,
                hand_over=HAND_OVER[timing.mode],  # type: ignore[arg-type]
                limits=limits,
                state_check="off",
                submit=answers.submit,
                clock=answers.now,
            )
        while answers.step < environment.max_steps:
            answers.deliver()
            robot.observe(seen)
            commands.append(robot.next())
            held.append(robot.held if isinstance(robot, SynchronousController) else robot.command.held)  # type: ignore[attr-defined]
            result = timed(environment.step, commands[-1].astype(np.float32))
            answers.step += 1
            if result.done:
                outcome = "success" if result.success else "failure"
                break
    except Exception as fault:  # noqa: BLE001  a simulator may raise anything, and the other episodes must run
        outcome, error = "crash", one_line(fault)
    own = time.thread_time() - began - simulated - answers.inference_seconds
    jump, change = _changes(commands, held, [arrival for _, arrival in answers.arrived], half_range)
    return DrivenEpisode(
        mode=timing.mode,
        asked_ms=timing.delay_ms,
        task=environment.task,
        seed=seed,
        outcome=outcome,  # type: ignore[arg-type]
        steps=answers.step,
        held=float(np.mean(held)) if held else 0.0,
        answers=len(answers.arrived),
        failures=answers.failures,
        delay_ms=1e3 * float(np.mean(answers.delays)) if answers.delays else float("nan"),
        jump=jump,
        change=change,
        reaction_ms=1e3 * dt * reaction(answers.arrived),
        own_ms=1e3 * own / max(1, answers.step),
        error=error,
    )


def reaction(arrived: list[tuple[int, int]]) -> float:
    """Return the mean steps from an event to a command that follows from it; NaN for fewer than two answers."""
    observed, answered = (np.array(each, np.float64) for each in zip(*arrived, strict=True)) if arrived else (np.zeros(0), np.zeros(0))
    between = np.diff(observed)
    if not between.sum():
        return float("nan")
    return float((between * (answered[1:] - (observed[1:] + observed[:-1]) / 2)).sum() / between.sum())


def _changes(
    commands: list[NDArray[np.float64]], held: list[bool], arrivals: list[int], half_range: NDArray[np.float64]
) -> tuple[float, float]:
    """Return (jump, change): the command's change where a chunk takes over, and at all other steps without a standstill."""
    if len(commands) < 2:
        return float("nan"), float("nan")
    sizes = np.sqrt(((np.diff(np.stack(commands), axis=0) / half_range) ** 2).mean(1))  # of step k + 1
    moving = ~np.array(held)[1:]
    new = np.isin(np.arange(1, len(commands)), arrivals[1:])
    means = [float(sizes[which & moving].mean()) if (which & moving).any() else float("nan") for which in (new, ~new)]
    return means[0], means[1]


@final
class _MetadataOnly:
    """Part of a policy that an Executor with a `submit` reads: the metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = {name: value for name, value in metadata.items() if name != wire.EXTENSIONS} | {
            wire.EXTENSIONS: (wire.ACTION_PREFIX, wire.INFERENCE_DELAY)
        }

    def infer(self, observation: Message) -> ActionChunk:
        """Refuse: the executor's `submit` infers."""
        raise NotImplementedError
