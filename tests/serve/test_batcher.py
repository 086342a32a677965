"""Who shares a batch, who fails, who is refused."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pi0fm.serve.batcher import Batcher, RefusedError
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import ActionChunk, Observation


class GatedPolicy:
    """Answers the state itself, when the test opens the gate; a negative state raises."""

    def __init__(self, opened: bool = True, error: Exception | None = None) -> None:
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
        assert self.gate.wait(10)
        if any(observation.state[0] < 0 for observation in observations):
            raise self.error
        return [ActionChunk(observation.state[None]) for observation in observations]


def validate(message: Any) -> Observation:
    if "state" not in message:
        raise ObservationError("state is missing")
    return Observation({}, np.array([message["state"]], np.float32), "")


def run(policy: GatedPolicy, story: Callable[[Batcher], Awaitable[None]], max_batch_size: int = 3, max_queue: int = 8) -> None:
    async def main() -> None:
        batcher = Batcher(policy, validate=validate, max_batch_size=max_batch_size, max_queue=max_queue)
        try:
            await story(batcher)
        finally:
            policy.gate.set()
            await batcher.close()

    asyncio.run(main())


async def busy(batcher: Batcher, policy: GatedPolicy) -> asyncio.Task[ActionChunk]:
    """A first request that holds the worker until the gate opens."""
    first = asyncio.create_task(batcher.submit({"state": 0}))
    while not policy.batches:
        await asyncio.sleep(0.001)
    return first


def test_requests_that_arrive_during_an_inference_share_the_next_one() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(batcher.submit({"state": number})) for number in range(1, 6)]
        await asyncio.sleep(0)
        policy.gate.set()
        assert (await first).actions[0, 0] == 0
        assert [chunk.actions[0, 0] for chunk in await asyncio.gather(*others)] == [1, 2, 3, 4, 5]

    run(policy, story)
    assert policy.batches == [[0], [1, 2, 3], [4, 5]]
    assert policy.seeds == [None, None, None]


def test_only_the_culprit_of_a_failing_batch_fails() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(batcher.submit({"state": number})) for number in (1, -2, 3)]
        await asyncio.sleep(0)
        policy.gate.set()
        await first
        answers = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(answers[1], RuntimeError) and str(answers[1]) == "culprit"
        assert [answers[place].actions[0, 0] for place in (0, 2)] == [1, 3]
        assert (await batcher.submit({"state": 4})).actions[0, 0] == 4

    run(policy, story)
    assert policy.batches == [[0], [1, -2, 3], [1], [-2], [3], [4]]


def test_a_policy_that_raises_stop_iteration_does_not_stop_the_server() -> None:
    policy = GatedPolicy(error=StopIteration())

    async def story(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(batcher.submit({"state": -1}), 5)
        assert (await batcher.submit({"state": 1})).actions[0, 0] == 1

    run(policy, story)


def test_a_wrong_observation_never_reaches_the_queue() -> None:
    policy = GatedPolicy()

    async def story(batcher: Batcher) -> None:
        with pytest.raises(ObservationError, match="state is missing"):
            await batcher.submit({})

    run(policy, story)
    assert policy.batches == []


def test_a_full_queue_refuses_and_recovers() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        waiting = [asyncio.create_task(batcher.submit({"state": number})) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="busy: 2 requests"):
            await batcher.submit({"state": 3})
        policy.gate.set()
        await asyncio.gather(first, *waiting)
        assert (await batcher.submit({"state": 4})).actions[0, 0] == 4

    run(policy, story, max_queue=2)


def test_a_client_that_left_costs_no_inference_and_no_place() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        gone, kept = (asyncio.create_task(batcher.submit({"state": number})) for number in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        late = asyncio.create_task(batcher.submit({"state": 3}))
        await asyncio.sleep(0)
        policy.gate.set()
        await asyncio.gather(first, kept, late)

    run(policy, story, max_queue=2)
    assert policy.batches == [[0], [2, 3]]


def test_a_client_that_leaves_during_its_inference_harms_nobody() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        other = asyncio.create_task(batcher.submit({"state": 1}))
        await asyncio.sleep(0)
        first.cancel()
        policy.gate.set()
        assert (await other).actions[0, 0] == 1

    run(policy, story)


def test_seeds_stay_with_their_requests_and_neighbours_draw_fresh_ones() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        others = [asyncio.create_task(batcher.submit({"state": 1}, 7)), asyncio.create_task(batcher.submit({"state": 2}))]
        await asyncio.sleep(0)
        policy.gate.set()
        await asyncio.gather(first, *others)

    run(policy, story)
    assert policy.seeds[0] is None
    assert policy.seeds[1][0] == 7 and 0 <= policy.seeds[1][1] < 2**63


def test_closing_refuses_what_waits_and_what_comes() -> None:
    policy = GatedPolicy(opened=False)

    async def story(batcher: Batcher) -> None:
        first = await busy(batcher, policy)
        waiting = asyncio.create_task(batcher.submit({"state": 1}))
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        policy.gate.set()
        await closing
        assert (await first).actions[0, 0] == 0
        with pytest.raises(RefusedError, match="shutting down"):
            await waiting
        with pytest.raises(RefusedError, match="shutting down"):
            await batcher.submit({"state": 2})

    run(policy, story)


def test_warm_up_runs_alone_and_in_a_full_batch() -> None:
    policy = GatedPolicy()
    run(policy, lambda batcher: batcher.warm_up({"state": 5}))
    assert policy.batches == [[5], [5, 5, 5]]


def test_a_policy_that_answers_too_few_is_an_error() -> None:
    class Forgetful(GatedPolicy):
        def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
            return []

    async def story(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="1 given, 0 chunks"):
            await batcher.submit({"state": 1})

    run(Forgetful(), story)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_size"):
        Batcher(GatedPolicy(), validate=validate, max_batch_size=0, max_queue=1)
