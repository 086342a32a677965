"""Tests of the batcher: which requests share a batch, fail, or are refused."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pi0fm.serve.batcher import Batcher, RefusedError, Request
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.metrics import Metrics
from pi0fm.serve.pace import Pace
from pi0fm_client.types import ActionChunk, Observation


class GatedPolicy:
    """Answers the state itself, when the test opens the gate; a negative state raises."""

    def __init__(self, opened: bool = True, error: Exception | None = None, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.metadata: dict[str, Any] = {}
        self.batches: list[list[float]] = []
        self.seeds: list[Any] = []
        self.gate = threading.Event()
        self.error = error or RuntimeError("culprit")
        if opened:
            self.gate.set()

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        self.batches.append([float(observation.state[0]) for observation in observations])
        self.seeds.append(noise_seeds)
        time.sleep(self.seconds)
        assert self.gate.wait(10)
        if any(observation.state[0] < 0 for observation in observations):
            raise self.error
        return [ActionChunk(observation.state[None]) for observation in observations]


def ask(batcher: Batcher, state: float, noise_seed: int | None = None, **more: Any) -> Awaitable[ActionChunk]:
    return batcher.submit(Request(Observation({}, np.array([state], np.float32), ""), noise_seed, **more))


def run(policy: GatedPolicy, story: Callable[[Batcher], Awaitable[None]], max_batch_size: int = 3, max_queue: int = 8, **more: Any) -> None:
    async def main() -> None:
        batcher = Batcher(policy, ServingLimits(max_batch_size=max_batch_size, max_queue=max_queue, **more), Metrics())
        try:
            await story(batcher)
        finally:
            policy.gate.set()
            await batcher.drain()
            batcher.close()

    asyncio.run(main())


async def busy(batcher: Batcher, policy: GatedPolicy) -> asyncio.Task[ActionChunk]:
    """A first request that holds the worker until the gate opens."""
    first = asyncio.create_task(ask(batcher, 0))
    while not policy.batches:
        await asyncio.sleep(0.001)
    return first


def test_requests_that_arrive_during_an_inference_share_the_next_one() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(ask(batcher, number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        policy.gate.set()
        assert (await first).actions[0, 0] == 0
        assert [chunk.actions[0, 0] for chunk in await asyncio.gather(*others)] == [1, 2, 3, 4, 5]

    run(policy, story)
    assert policy.batches == [[0], [1, 2, 3], [4, 5]]
    assert policy.seeds == [None, None, None]


def test_a_policy_makes_its_shapes_before_its_first_batch_in_the_thread_that_serves() -> None:
    policy, made = GatedPolicy(), []
    policy.warm_up = lambda max_batch: made.append((max_batch, threading.current_thread().name, list(policy.batches)))

    async def story(batcher: Batcher) -> None:
        await batcher.warm_up(Observation({}, np.array([0], np.float32), ""))

    run(policy, story)
    ((max_batch, thread, batches),) = made
    assert (max_batch, batches) == (3, []) and thread.startswith("pi0fm-policy")
    assert policy.batches == [[0], [0], [0, 0, 0], [0, 0, 0]]


def test_only_the_culprit_of_a_failing_batch_fails() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(ask(batcher, number)) for number in (1, -2, 3)]
        await asyncio.sleep(0)
        policy.gate.set()
        await first
        answers = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(answers[1], RuntimeError) and str(answers[1]) == "culprit"
        assert [answers[place].actions[0, 0] for place in (0, 2)] == [1, 3]
        assert (await ask(batcher, 4)).actions[0, 0] == 4

    run(policy, story)
    assert policy.batches == [[0], [1, -2, 3], [1], [-2], [3], [4]]


def test_a_policy_that_raises_stop_iteration_does_not_stop_the_server() -> None:
    policy = GatedPolicy(error=StopIteration())

    async def story(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(ask(batcher, -1), 5)
        assert (await ask(batcher, 1)).actions[0, 0] == 1

    run(policy, story)


def test_a_full_queue_refuses_and_recovers() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        waiting = [asyncio.create_task(ask(batcher, number)) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="busy: 2 requests"):
            await ask(batcher, 3)
        policy.gate.set()
        await asyncio.gather(first, *waiting)
        assert (await ask(batcher, 4)).actions[0, 0] == 4

    run(policy, story, max_queue=2)


def test_a_client_that_left_costs_no_inference_and_no_place() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        gone, kept = (asyncio.create_task(ask(batcher, number)) for number in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        late = asyncio.create_task(ask(batcher, 3))
        await asyncio.sleep(0)
        policy.gate.set()
        await asyncio.gather(first, kept, late)

    run(policy, story, max_queue=2)
    assert policy.batches == [[0], [2, 3]]


def test_a_client_that_leaves_during_its_inference_harms_nobody() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        other = asyncio.create_task(ask(batcher, 1))
        await asyncio.sleep(0)
        first.cancel()
        policy.gate.set()
        assert (await other).actions[0, 0] == 1

    run(policy, story)


def test_seeds_stay_with_their_requests_and_neighbours_draw_fresh_ones() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(ask(batcher, 1, 7)), asyncio.create_task(ask(batcher, 2))]
        await asyncio.sleep(0)
        policy.gate.set()
        await asyncio.gather(first, *others)

    run(policy, story)
    assert policy.seeds[0] is None
    assert policy.seeds[1][0] == 7 and 0 <= policy.seeds[1][1] < 2**63


def test_closing_refuses_what_waits_and_what_comes_and_waits_for_no_inference() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        waiting = asyncio.create_task(ask(batcher, 1))
        await asyncio.sleep(0)
        batcher.close()
        with pytest.raises(RefusedError, match="shutting down"):
            await waiting
        with pytest.raises(RefusedError, match="shutting down"):
            await ask(batcher, 2)
        policy.gate.set()
        assert (await first).actions[0, 0] == 0

    run(policy, story)


def test_draining_answers_what_waits() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(ask(batcher, number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        policy.gate.set()
        await batcher.drain()
        assert [task.result().actions[0, 0] for task in (first, *others)] == [0, 1, 2, 3, 4, 5]

    run(policy, story)


def test_a_newer_observation_takes_the_place_of_its_sessions_older_one() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        old, other, new = (asyncio.create_task(ask(batcher, state, session=name)) for state, name in ((1, "a"), (2, "b"), (3, "a")))
        with pytest.raises(RefusedError, match="newer observation"):
            await old
        policy.gate.set()
        await asyncio.gather(first, other, new)

    run(policy, story, max_batch_size=1)
    assert policy.batches == [[0], [3], [2]], "in the place of the older one"


def test_a_deadline_that_cannot_be_kept_is_refused_at_once_with_the_estimate() -> None:
    policy = GatedPolicy(seconds=0.1)

    async def story(batcher: Batcher) -> None:
        await batcher.warm_up(Observation({}, np.zeros(1, np.float32), ""))
        began = time.perf_counter()
        with pytest.raises(RefusedError, match=r"50 ms are left, an answer takes about \d\d\d ms"):
            await ask(batcher, 1, latest=began + 0.0505)
        assert time.perf_counter() - began < 0.04
        first, queued = (asyncio.create_task(ask(batcher, state, latest=time.perf_counter() + 5)) for state in (2, 3))
        await asyncio.sleep(0.01)
        with pytest.raises(RefusedError, match="deadline"):  # behind two of 100 ms
            await ask(batcher, 4, latest=time.perf_counter() + 0.15)
        await asyncio.gather(first, queued)

    run(policy, story, max_batch_size=1)
    assert policy.batches[-2:] == [[2], [3]]


def test_a_deadline_that_passes_in_the_queue_costs_no_inference() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        late = asyncio.create_task(ask(batcher, 1, latest=time.perf_counter() + 0.05))
        await asyncio.sleep(0.1)
        policy.gate.set()
        with pytest.raises(RefusedError, match="0 ms are left"):
            await late
        await first

    run(policy, story)
    assert policy.batches == [[0]]


def test_a_stuck_policy_is_told_and_forgiven() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        assert batcher.stuck_seconds() is None
        await asyncio.sleep(0.15)
        assert (batcher.stuck_seconds() or 0) > 0.1
        with pytest.raises(RefusedError, match="stuck"):
            await ask(batcher, 1)
        policy.gate.set()
        await first
        assert batcher.stuck_seconds() is None and (await ask(batcher, 2)).actions[0, 0] == 2

    run(policy, story, stall_seconds=0.1)


def test_a_policy_that_was_slow_is_asked_again_although_its_estimate_says_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi0fm.serve.pace.TRUSTED_SECONDS", 0.1)
    policy = GatedPolicy(seconds=0.3)

    async def story(batcher: Batcher) -> None:
        await batcher.warm_up(Observation({}, np.zeros(1, np.float32), ""))
        policy.seconds = 0.0
        with pytest.raises(RefusedError, match="deadline"):
            await ask(batcher, 1, latest=time.perf_counter() + 0.2)
        for turn in range(5):
            await asyncio.sleep(0.15)
            assert (await ask(batcher, turn, latest=time.perf_counter() + 0.2)).actions[0, 0] == turn
        await ask(batcher, 9, latest=time.perf_counter() + 0.2)

    run(policy, story, max_batch_size=1)


def test_one_inference_that_was_paused_changes_no_estimate() -> None:
    pace = Pace(1)
    for seconds in (0.02, 0.02, 30.0):
        pace.inferred(1, seconds, 0.0)
    assert pace.seconds(1) == 0.02


async def closed_loop(batcher: Batcher, name: str, think: float, turns: int) -> None:
    """A robot that asks `think` seconds after each answer."""
    for turn in range(turns):
        await ask(batcher, turn, session=name)
        await asyncio.sleep(think)


def test_two_robots_in_a_closed_loop_share_their_batches() -> None:
    policy = GatedPolicy(seconds=0.03)

    async def story(batcher: Batcher) -> None:
        await batcher.warm_up(Observation({}, np.zeros(1, np.float32), ""))
        policy.batches.clear()
        await asyncio.gather(closed_loop(batcher, "a", 0.002, 20), closed_loop(batcher, "b", 0.002, 20))
        shared = sum(len(batch) == 2 for batch in policy.batches)
        assert shared >= 10, policy.batches

    run(policy, story)


def test_robots_that_were_answered_together_are_waited_for_together() -> None:
    """Four in a closed loop never fall into batches of one and three in turns, where a batch of four takes as long as one alone."""
    policy = GatedPolicy(seconds=0.03)

    async def story(batcher: Batcher) -> None:
        await batcher.warm_up(Observation({}, np.zeros(1, np.float32), ""))
        policy.batches.clear()
        await asyncio.gather(*(closed_loop(batcher, name, 0.002, 15) for name in "abcd"))
        assert sum(len(batch) == 4 for batch in policy.batches) >= 8, policy.batches

    run(policy, story, max_batch_size=4)


def test_a_lone_robot_waits_for_nobody_and_nor_does_one_whose_neighbour_has_left() -> None:
    pace = Pace(8)
    for size in (1, 8):
        pace.inferred(size, 0.03, 0.0)
    for name in ("a", "b"):
        for moment in (0.0, 0.03):
            pace.asked(name, moment)
            pace.answered(name, moment + 0.029)
    pace.asked("a", 0.0595)
    assert pace.wait_until(1, 0.0595, 0.0595) > 0.0595
    pace.forget("b")
    assert pace.wait_until(1, 0.0595, 0.0595) == 0.0595


def test_nobody_waits_where_a_batch_takes_as_long_as_its_members_in_turn() -> None:
    pace = Pace(8)
    for size in (1, 2, 8):
        pace.inferred(size, 0.03 * size, 0.0)
    for moment in (0.0, 0.03, 0.06):  # b asks 1 ms after each answer
        pace.asked("b", moment)
        pace.answered("b", moment + 0.029)
    assert pace.wait_until(1, 0.09, 0.0895) == 0.0895
    for size in (1, 2, 8):
        for _ in range(50):
            pace.inferred(size, 0.03, 0.0)
    assert 0.0895 < pace.wait_until(1, 0.0895, 0.0895) < 0.095
    assert pace.wait_until(1, 0.07, 0.0895) == 0.0895, "it has waited for long enough already"


def test_warm_up_runs_alone_and_in_a_full_batch() -> None:
    policy = GatedPolicy()
    run(policy, lambda batcher: batcher.warm_up(Observation({}, np.array([5], np.float32), "")))
    assert policy.batches == [[5], [5], [5, 5, 5], [5, 5, 5]], "once to compile, once to be timed"


def test_requests_for_one_number_of_candidates_share_a_batch_and_wait_for_no_other() -> None:
    class Choosing(GatedPolicy):
        def infer_best(self, observations: Sequence[Observation], options: Any, noise_seeds: Any = None) -> list[ActionChunk]:
            chunks = self.infer_batch(observations, noise_seeds)
            return [ActionChunk(chunk.actions + 100 * options.num_chunks, {}, {"spread": 0.5}) for chunk in chunks]

    policy = Choosing(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        asked = [(1, 2), (2, None), (3, 2), (4, 2), (5, 8), (6, None)]
        others = [asyncio.create_task(ask(batcher, state, candidates=number)) for state, number in asked]
        await asyncio.sleep(0)
        policy.gate.set()
        await first
        answers = await asyncio.gather(*others)
        assert [answer.actions[0, 0] for answer in answers] == [201, 2, 203, 204, 805, 6]

    run(policy, story, max_batch_size=4)
    assert policy.batches == [[0], [1, 3], [2, 6], [4], [5]]


def test_a_policy_that_answers_too_few_is_an_error() -> None:
    class Forgetful(GatedPolicy):
        def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
            return []

    async def story(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="1 given, 0 chunks"):
            await ask(batcher, 1)

    run(Forgetful(), story)
