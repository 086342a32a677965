"""Tests of the executor with a simulated arm and clock: delay, jitter, loss, stalls, reordering and a dead server, without waiting."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0fm_client import Executor, PolicyClient, wire
from pi0fm_client.errors import ConfigError, ObservationError, ServingError
from pi0fm_client.execution import EARLIEST
from pi0fm_client.types import ActionChunk

DT = 0.02
HORIZON = 16
Chunk = Callable[[Mapping[str, Any], int], Any]


@dataclass
class Link:
    """Policy behind a network with a simulated clock: request n is answered after `delays[n]` steps (later ones after the last delay).

    A delay of None is a loss: an error after 10 steps. `chunk(message, step)` makes the answer when the request is sent.
    """

    chunk: Chunk
    delays: Iterable[float | None] = (0,)
    metadata: dict[str, Any] = field(default_factory=lambda: {"action_horizon": HORIZON, "execution_horizon": 8})
    now: float = 100.0
    sent: list[Mapping[str, Any]] = field(default_factory=list)
    due: list[tuple[float, Future[ActionChunk], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._delays = list(self.delays)
        self.start = self.now

    @property
    def step(self) -> int:
        return round((self.now - self.start) / DT)

    def infer(self, observation: Mapping[str, Any]) -> ActionChunk:
        raise AssertionError("asked through submit")

    def submit(self, message: Mapping[str, Any]) -> Future[ActionChunk]:
        delay = self._delays[min(len(self.sent), len(self._delays) - 1)]
        self.sent.append(message)
        future: Future[ActionChunk] = Future()
        answer = ServingError("lost") if delay is None else self.chunk(message, self.step)
        self.due.append((self.now + (10 if delay is None else delay) * DT, future, answer))
        return future

    def tick(self, seconds: float = DT) -> None:
        self.now += seconds
        self.deliver()

    def deliver(self) -> None:
        for item in [item for item in self.due if item[0] <= self.now + 1e-9]:
            self.due.remove(item)
            _, future, answer = item
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer if isinstance(answer, ActionChunk) else ActionChunk(np.asarray(answer, np.float32)))

    def executor(self, width: int = 1, **options: Any) -> Executor:
        options = {"control_hz": 1 / DT, "initial_command": np.zeros(width)} | options
        return Executor(self, submit=self.submit, clock=lambda: self.now, **options)

    def run(self, executor: Executor, steps: int) -> list[np.ndarray]:
        commands = []
        for _ in range(steps):
            self.deliver()
            executor.observe({"observation/state": commands[-1] if commands else np.zeros(1)})
            self.deliver()
            commands.append(executor.next())
            self.tick()
        return commands


def stamped(message: Mapping[str, Any], step: int) -> np.ndarray:
    """Each row says which control step it is meant for."""
    return (step + np.arange(HORIZON))[:, None]


def test_an_alarm_of_the_policy_is_reported_until_the_next_chunk() -> None:
    link = Link(lambda message, step: ActionChunk(stamped(message, step), {}, {"alarm": float(step == 8)}), [1])
    executor, seen = link.executor(), []
    for _ in range(24):
        link.run(executor, 1)
        seen.append((executor.report.alarm, executor.report.alarms))
    assert seen[8] == (False, 0) and seen[10] == (True, 1) and seen[15] == (True, 1) and seen[-1] == (False, 1)


@pytest.mark.parametrize("delay", range(9))
def test_rows_belong_to_their_control_steps_whatever_the_delay(delay: int) -> None:
    link = Link(stamped, [delay])
    executor = link.executor()
    commands = link.run(executor, 60)
    assert [command[0] for command in commands[:delay]] == [0.0] * delay
    assert [command[0] for command in commands[delay:]] == list(range(delay, 60))
    assert executor.report.inference_delay == delay and executor.report.holds == delay
    assert executor.report.requests == len(range(0, 60, max(8, delay)))


def test_the_next_observation_is_sent_in_time_for_a_slow_policy() -> None:
    """d = 12 of 16 rows: the next one is asked for as soon as the last came, and the rest is a standstill."""
    link = Link(stamped, [12])
    executor = link.executor()
    link.run(executor, 100)
    assert executor.report.requests == 9 and executor.report.holds == 12 + 7 * (24 - 16)


def test_the_delay_is_a_percentile_that_recovers_from_slow_calls() -> None:
    link = Link(stamped, [15, *[2] * 10, 9, *[2] * 200])
    executor = link.executor()
    seen = []
    for _ in range(1000):
        link.run(executor, 1)
        seen.append(executor.report.inference_delay)
    assert seen[16] == 8  # only the first is known, which pays for warming up
    assert seen[30] == 2 and seen[120] == 9 and seen[-1] == 2


def test_a_chunk_that_comes_too_late_is_thrown_away_and_the_next_one_recovers(caplog: pytest.LogCaptureFixture) -> None:
    link = Link(stamped, [2, 40, 2])
    executor = link.executor(initial_command=[-1.0])
    with caplog.at_level(logging.WARNING):
        commands = link.run(executor, 80)
    held = [step for step in range(80) if commands[step][0] != step]
    assert held == [0, 1, *range(16, 50)]  # sent at 8, back at 48, thrown away; sent again at once
    assert commands[20][0] == 15.0  # the last command
    assert executor.report.late_chunks == 1 and "came 40 steps after" in executor.report.last_fault
    assert "control step 16 has no action" in caplog.text and "control step 50 goes on" in caplog.text


def test_a_dead_server_ends_in_a_standstill_within_one_step_of_expiry() -> None:
    link = Link(stamped, [5, 5, None])
    executor = link.executor()
    commands = link.run(executor, 100)
    assert [command[0] for command in commands[5:]] == [min(step, 23) for step in range(5, 100)]
    assert executor.command.held and executor.report.failures > 2 and "lost" in executor.report.last_fault
    assert len(link.sent) < 12  # asked again after pauses


def test_it_goes_on_when_a_policy_raises_anything() -> None:
    link = Link(lambda message, step: ValueError("no policy") if step < 20 else stamped(message, step), [0])
    commands = link.run(link.executor(), 60)
    assert commands[10][0] == 0.0 and commands[-1][0] == 59.0


@pytest.mark.parametrize("wrong", [np.full((4, 1), np.nan), np.zeros((4, 2)), np.zeros((0, 1)), np.zeros(4)])
def test_what_is_no_chunk_of_this_robot_is_never_executed(wrong: np.ndarray) -> None:
    link = Link(lambda message, step: wrong)
    executor = link.executor()
    assert all(command[0] == 0.0 for command in link.run(executor, 20))
    assert executor.report.failures > 0 and "a chunk must be finite numbers [H, 1]" in executor.report.last_fault


LIMITS = {"low": [None, -1, -1], "high": [None, 1, 1], "velocity": [None, 0.2, 0.5], "acceleration": [None, 0.05, 0.2], "increments": [2]}
faults = st.lists(st.one_of(st.none(), st.floats(0, 30)), min_size=1, max_size=12)
ticks = st.lists(st.one_of(st.floats(0.8, 1.2), st.sampled_from([0.1, 1.0, 1.0, 3.0, 12.0])), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(faults, ticks, st.integers(0, 2**31), st.sampled_from(["switch", "ensemble", "realtime"]), st.sampled_from(["clamp", "refuse"]))
def test_no_fault_executes_an_expired_action_or_leaves_the_limits(
    delays: list[float | None], steps: list[float], seed: int, hand_over: Any, beyond: Any
) -> None:
    """Replies are late, lost and out of proportion, the loop is early, late and stalls: a row is executed in its own step or never."""
    random = np.random.default_rng(seed)

    def wild(message: Mapping[str, Any], step: int) -> np.ndarray:
        rows = random.normal(size=(HORIZON, 3)) * random.choice([0.01, 1.0, 1e6])
        rows[:, 0] = (link.now - link.start) / DT + np.arange(HORIZON)
        return rows

    link = Link(wild, delays)
    link.metadata["extensions"] = [wire.ACTION_PREFIX] if hand_over == "realtime" else []
    executor = link.executor(3, hand_over=hand_over, limits=LIMITS, beyond_limits=beyond)
    told, last = [np.zeros(3), np.zeros(3)], -1
    for tick in steps:
        link.run(executor, 0)
        executor.observe({"observation/state": told[-1]})
        action, command = executor.next(), executor.command
        exact = (link.now - link.start) / DT
        assert command.step >= last and abs(command.step - exact) <= 1.0
        assert command.expires_at > link.now
        if command.step > last:
            told.append(action)
            if not command.held:
                # an observation is taken 0.75 steps before its step begins at the earliest, 0.5 after it at the latest
                assert -EARLIEST - 1e-9 <= action[0] - command.step <= 0.5 + 1e-9
        last = command.step
        link.tick(tick * DT)
    told_array = np.array(told)
    change = np.diff(told_array, axis=0)
    assert (abs(told_array[:, 1:]) <= 1).all()
    assert (abs(change[:, 1]) <= 0.2 + 1e-9).all() and (abs(np.diff(change[:, 1])) <= 0.05 + 1e-9).all()
    assert (abs(told_array[:, 2]) <= 0.5).all() and (abs(change[:, 2]) <= 0.2 + 1e-9).all()


def test_the_loop_keeps_its_rate_with_a_delay_of_100_ms() -> None:
    link = Link(stamped, [5])
    executor = link.executor()
    commands = link.run(executor, 500)
    assert executor.report.steps == 500 and executor.report.holds == 5
    assert [command[0] for command in commands[5:]] == list(range(5, 500))


def line(message: Mapping[str, Any], step: int) -> np.ndarray:
    """A known field: each request's seed draws a direction, and the chunk is a straight line from the state; a given prefix is kept."""
    speed = 0.01 * (-1) ** (step // 8)
    prefix = message.get(wire.ACTION_PREFIX, np.zeros((0, 1)))[: message.get(wire.INFERENCE_DELAY, 0)]
    start = prefix[-1] if len(prefix) else message["observation/state"]
    rest = start + speed * np.arange(1, HORIZON + 1 - len(prefix))[:, None]
    return np.concatenate([prefix, rest])


@pytest.mark.parametrize("delay", range(9))
@pytest.mark.parametrize("realtime", [True, False])
def test_a_hand_over_with_the_remainder_has_no_jump_and_one_without_has(delay: int, realtime: bool) -> None:
    link = Link(line, [delay])
    link.metadata["extensions"] = [wire.ACTION_PREFIX] if realtime else []
    commands = np.array(link.run(link.executor(), 200))
    jumps = abs(np.diff(commands[delay + 8 :], axis=0)).max()
    if realtime or delay == 0:
        assert jumps <= 0.01 + 1e-6
    else:
        assert jumps > 0.01 + 1e-6


def test_the_remainder_is_absolute_and_starts_at_the_observations_step() -> None:
    """Relative rows are decoded once, against the state of their observation."""
    link = Link(lambda message, step: np.full((HORIZON, 2), 0.5), [3])
    link.metadata |= {"extensions": [wire.ACTION_PREFIX, wire.DEADLINE_MS], "state_key": "observation/state"}
    executor = link.executor(2, relative_to_state=[1])
    for step in range(19):
        link.deliver()
        executor.observe({"observation.state": np.array([7.0, float(step)])})
        action = executor.next()
        if step >= 3:
            assert action.tolist() == [0.5, (0.5 if step < 11 else 8.5)]
        link.tick()
    first, second = link.sent[:2]
    assert wire.ACTION_PREFIX not in first and first[wire.DEADLINE_MS] == pytest.approx(HORIZON * DT * 1e3)
    assert second[wire.INFERENCE_DELAY] == 3 and second[wire.ACTION_PREFIX].dtype == np.float32
    assert np.array_equal(second[wire.ACTION_PREFIX], np.full((8, 2), 0.5))


LAGGING = {"high": [0.9, 1e9], "velocity": [0.07, 1e9], "acceleration": [0.02, 1e9]}


@pytest.mark.parametrize("after", [False, True], ids=["observed before the command", "observed after it"])
def test_the_remainder_is_what_the_robot_executes_within_its_limits(after: bool) -> None:
    """Rows beyond the limits: the next chunk must go on from the commands, not from the wishes."""
    link = Link(lambda message, step: 0.1 * (step + np.arange(HORIZON))[:, None] * [1.0, 1.0], [2])
    link.metadata["extensions"] = [wire.ACTION_PREFIX]
    executor, commands, sent = link.executor(2, limits=LAGGING), [], {}
    for step in range(60):
        link.deliver()
        if after:
            commands.append(executor.next())
        known = len(link.sent)
        executor.observe({"observation/state": np.zeros(2)})
        if len(link.sent) > known and wire.ACTION_PREFIX in link.sent[-1]:
            sent[step] = link.sent[-1]
        if not after:
            commands.append(executor.next())
        link.tick()
    assert len(sent) > 3 and executor.report.clamped[0] > 20
    for step, message in sent.items():
        told, until = message[wire.ACTION_PREFIX], message[wire.INFERENCE_DELAY]
        assert until == 2 and np.allclose(told[:until], np.array(commands[step : step + until]), atol=1e-6)
        assert (told[:, 0] <= 0.9 + 1e-6).all() and (abs(np.diff(told[:, 0])) <= 0.07 + 1e-6).all()


def test_a_row_that_will_be_refused_ends_the_remainder() -> None:
    link = Link(lambda message, step: np.array([[0.0]] * 11 + [[5.0]] * 5), [0])
    link.metadata["extensions"] = [wire.ACTION_PREFIX]
    link.run(link.executor(limits={"high": 1}, beyond_limits="refuse"), 9)
    assert link.sent[1][wire.ACTION_PREFIX].tolist() == [[0.0]] * 3, "rows 8, 9 and 10 of the first chunk"


def test_relative_actions_without_a_state_are_refused() -> None:
    link = Link(stamped)
    executor = link.executor(relative_to_state=[0])
    executor.observe({"prompt": "press"})
    link.deliver()
    executor.next()
    assert "relative actions need the observation's state" in executor.report.last_fault


def test_overlapping_chunks_are_averaged_on_request() -> None:
    link = Link(lambda message, step: np.full((HORIZON, 1), float(len(link.sent))), [0])
    commands = link.run(link.executor(hand_over="ensemble"), 16)
    assert commands[7][0] == 1.0
    assert 1.45 < commands[8][0] < 1.5  # the older chunk weighs a little more


def test_a_clamp_is_counted_and_a_refusal_stands_still() -> None:
    link = Link(lambda message, step: np.array([[0.0, 5.0]] * HORIZON))
    executor = link.executor(2, limits={"high": [1, 1]})
    assert link.run(executor, 8)[-1].tolist() == [0.0, 1.0]
    assert executor.report.clamped.tolist() == [0, 8]
    link = Link(lambda message, step: np.array([[0.0, 5.0]] * HORIZON))
    executor = link.executor(2, limits={"high": [1, 1]}, beyond_limits="refuse")
    assert link.run(executor, 8)[-1].tolist() == [0.0, 0.0]
    assert executor.report.refused > 0 and "in dimensions [1] was refused" in executor.report.last_fault


def test_the_stricter_of_the_policys_and_the_robots_limits_wins() -> None:
    link = Link(lambda message, step: np.array([[5.0, 5.0]] * HORIZON))
    link.metadata["limits"] = {"high": [1.0, 3.0]}
    assert link.run(link.executor(2, limits={"high": 2}), 2)[-1].tolist() == [1.0, 2.0]


def test_limits_in_the_radians_of_an_arm_that_was_trained_in_degrees_are_not_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    link = Link(stamped)
    names = ["pan.pos", "grip.pos"]
    link.metadata |= {"state_range": {"min": [-90.0, 0.0], "max": [90.0, 100.0]}, "action_names": names, "state_names": names}
    link.executor(2, limits={"velocity": 0.05})
    assert "do not suit its range in training, -90 .. 90, radians for degrees?" in caplog.text
    caplog.clear()
    link.executor(2, limits={"velocity": [2.0, 3.0]})
    assert caplog.text == ""
    link.metadata["state_names"] = ["x", "y"]
    link.executor(2, limits={"velocity": 0.05})
    assert caplog.text == "", "the state is not the joints that are commanded"
    link.metadata["units"] = {"pan.pos": "deg"}
    link.executor(2, limits={"velocity": 2.0, "units": "degrees"})
    with pytest.raises(ConfigError, match="found rad for dimension 0, which the policy has in deg"):
        link.executor(2, limits={"velocity": 0.05, "units": "rad"})


def test_arrays_that_the_robot_fills_again_are_not_changed_under_way() -> None:
    link = Link(stamped)
    state = np.zeros(1)
    link.executor().observe({"observation/state": state})
    state[:] = 5.0
    assert link.sent[0]["observation/state"][0] == 0.0


def test_a_slow_camera_is_read_only_when_an_observation_is_due() -> None:
    link, read = Link(stamped), []
    executor = link.executor()

    def camera() -> dict[str, Any]:
        read.append(link.step)
        return {}

    for _ in range(20):
        executor.observe(camera)
        link.deliver()
        executor.next()
        link.tick()
    assert read == [0, 8, 16]


def test_a_refused_observation_is_not_sent_and_the_loop_can_go_on() -> None:
    link = Link(stamped)
    link.metadata |= {"cameras": {"base": "image"}}
    executor = link.executor()
    with pytest.raises(ObservationError, match="found no image"):
        executor.observe({})
    assert executor.next()[0] == 0.0 and link.sent == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"control_hz": 0}, "control_hz must be a number above 0"),
        ({"control_hz": "50"}, "control_hz must be a number above 0"),
        ({"initial_command": [0.0, np.nan]}, "initial_command must be 2 finite numbers"),
        ({"initial_command": [0.0]}, "initial_command must be 2 finite numbers"),
        ({"execution_horizon": 17}, r"execution_horizon must be a whole number in 1 \.\. 16"),
        ({"hand_over": "jump"}, "hand_over must be one of auto, realtime, ensemble, switch"),
        ({"hand_over": "realtime"}, "knows no real-time hand-over"),
        ({"limits": {"low": 1, "high": 0}}, "low must not be above high"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], line: str) -> None:
    link = Link(stamped)
    link.metadata["robot_action_dim"] = 2
    with pytest.raises(ConfigError, match=line):
        link.executor(2, **options)


def test_another_control_rate_than_the_trainings_is_said(caplog: pytest.LogCaptureFixture) -> None:
    link = Link(stamped)
    link.metadata["fps"] = 10
    link.executor()
    assert "trained at 10 control steps a second and is executed at 50" in caplog.text


class Blocking:
    """A policy whose every call waits for the test."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.gate = threading.Event()
        self.error: BaseException | None = None

    def infer(self, observation: Mapping[str, Any]) -> ActionChunk:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return ActionChunk(np.ones((100, 1), np.float32))


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("error", [None, SystemExit(3)])
def test_a_policy_runs_in_a_thread_and_next_never_waits_for_it(error: BaseException | None) -> None:
    policy, now = Blocking(), [0.0]
    policy.error = error
    with Executor(policy, control_hz=50, initial_command=[0.0], clock=lambda: now[0]) as executor:
        for step in range(3):
            now[0] = step * DT
            executor.observe({})
            assert executor.next()[0] == 0.0
        policy.gate.set()
        wait_for(lambda: (not executor.due and executor.report.chunks == 1) or executor.report.failures == 1)
        now[0] += DT
        assert executor.next()[0] == (0.0 if error else 1.0)
        assert "SystemExit" in executor.report.last_fault if error else not executor.report.last_fault


def test_a_policy_of_asyncio_runs_in_the_running_loop() -> None:
    class Waiting:
        def __init__(self) -> None:
            self.metadata: dict[str, Any] = {}

        async def infer(self, observation: Mapping[str, Any]) -> ActionChunk:
            await asyncio.sleep(0)
            return ActionChunk(np.ones((100, 1), np.float32))

    async def loop() -> float:
        with Executor(Waiting(), control_hz=50, initial_command=[0.0]) as executor:
            for _ in range(3):
                executor.observe({})
                action = executor.next()
                await asyncio.sleep(executor.seconds_left())
        return float(action[0])

    assert asyncio.run(loop()) == 1.0


def test_over_a_real_network_a_server_that_dies_and_returns_executes_no_row_twice_or_late(start_server: Any, fake_policy: Any) -> None:
    """The fake policy's row h is the state + h, and the state is the control step: so each action says when it is meant for."""
    server = start_server(fake_policy(seconds=0.05, horizon=32))
    pictures = {f"observation.images.{name}": np.zeros((8, 8, 3), np.uint8) for name in ("front", "wrist")}
    step, options = -1, {"control_hz": 50, "initial_command": np.full(3, -1.0), "execution_horizon": 8}

    with PolicyClient(server.url, timeout_seconds=0.5) as policy, Executor(policy, clock=lambda: step * DT, **options) as executor:

        def run_until(held: bool, steps: int) -> None:
            nonlocal step
            for _ in range(1000):
                step += 1
                executor.observe({**pictures, "observation.state": np.full(3, step), "prompt": "press"})
                action = executor.next()
                assert executor.command.step == step and (executor.command.held or action[0] == step)
                steps -= executor.command.held == held
                if steps <= 0:
                    return
                time.sleep(DT)
            raise AssertionError(executor.report)

        run_until(False, 20)
        server.stop()
        run_until(True, 20)
        start_server(server.policy, port=server.port)
        run_until(False, 20)
    assert executor.report.chunks >= 2 and executor.report.failures >= 1
