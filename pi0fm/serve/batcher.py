"""Batch the requests of many robots for one policy: those that arrive during an inference share the next one.

Owns: the queue, the worker thread, the choice of a batch, the handling of a failed one. Does not know: sockets, messages, the policy.

There is no waiting window: an idle policy starts at once, a busy one collects. Time runs to the right, max_batch_size is 3:

    client A   a---------------+                  b-----------------------------+
    client B      c - - - - - -+--------------+
    client C         d - - - - +--------------+
    worker     [ infer a      ][ infer c, d  ][ infer b ]
    queue         c  c,d         b  b                          full queue: refused at once

A request is checked before it waits, so a wrong one never joins a batch. A batch that fails all the same is tried again one request
at a time, and only the one that fails is refused. A request whose client has gone is dropped before it costs an inference.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

from pi0fm_client.errors import ConfigError, ServingError
from pi0fm_client.types import ActionChunk, Observation, Policy

logger = logging.getLogger(__name__)


@final
class RefusedError(ServingError):
    """A request that was not queued; its message is about the server's load, so a client may read it."""


@dataclass(frozen=True, eq=False)
class _Request:
    observation: Observation
    noise_seed: int | None
    answer: asyncio.Future[ActionChunk]


@final
class Batcher:
    """Run `policy.infer_batch` in one thread. All methods belong to one event loop.

    validate: turns a client's map into an observation, or raises ObservationError; it runs on the event loop, so it must be quick.
    max_batch_size: the most observations in one inference, >= 1. max_queue: the most requests that wait, >= 1.
    """

    def __init__(
        self, policy: Policy, *, validate: Callable[[Mapping[str, Any]], Observation], max_batch_size: int, max_queue: int
    ) -> None:
        if max_batch_size < 1 or max_queue < 1:
            raise ConfigError(f"max_batch_size and max_queue must be >= 1, found {max_batch_size} and {max_queue}")
        self._policy, self._validate = policy, validate
        self._max_batch_size, self._max_queue = max_batch_size, max_queue
        self._waiting: deque[_Request] = deque()
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        # One thread, because a policy owns its device, and because compiled graphs and caches may belong to the thread that made them.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pi0fm-policy")

    async def submit(self, message: Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """Return the policy's chunk for one observation.

        noise_seed: makes the answer reproducible; None draws fresh noise.
        Raises ObservationError for a wrong observation, RefusedError for a full queue or a server that stops, and what the policy raised.
        """
        observation = self._validate(message)
        if self._closed:
            raise RefusedError("the server is shutting down: connect again in a moment")
        if len(self._waiting) >= self._max_queue:
            raise RefusedError(f"the server is busy: {self._max_queue} requests wait already; ask less often, or raise --max_queue")
        request = _Request(observation, noise_seed, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            return await request.answer
        finally:
            if request in self._waiting:  # the client has gone
                self._waiting.remove(request)

    async def warm_up(self, message: Mapping[str, Any]) -> None:
        """Run the policy on one observation, alone and in a full batch, in the serving thread. Raises what the policy raises."""
        observation = self._validate(message)
        for size in sorted({1, self._max_batch_size}):
            await self._infer([observation] * size, [None] * size)

    async def close(self) -> None:
        """Refuse the waiting requests, and let the running inference end."""
        self._closed = True
        while self._waiting:
            _fail(self._waiting.popleft(), RefusedError("the server is shutting down: connect again in a moment"))
        if self._running is not None:
            await asyncio.wait([self._running])
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while self._waiting:
            count = min(len(self._waiting), self._max_batch_size)
            await self._answer([self._waiting.popleft() for _ in range(count)])

    async def _answer(self, batch: Sequence[_Request]) -> None:
        """Infer for the requests that still wait; when that fails, for each alone."""
        batch = [request for request in batch if not request.answer.done()]
        if not batch:
            return
        try:
            chunks = await self._infer([request.observation for request in batch], [request.noise_seed for request in batch])
        except Exception as error:  # noqa: BLE001 - any exception of a policy is its client's answer, and must not end this loop
            if len(batch) == 1:
                _fail(batch[0], error)
                return
            logger.warning("a batch of %d failed (%s): each is tried alone", len(batch), type(error).__name__)
            for request in batch:
                await self._answer([request])
            return
        for request, chunk in zip(batch, chunks, strict=True):
            if not request.answer.done():
                request.answer.set_result(chunk)

    async def _infer(self, observations: Sequence[Observation], noise_seeds: Sequence[int | None]) -> list[ActionChunk]:
        seeds = None
        if any(seed is not None for seed in noise_seeds):
            # A neighbour that asked for no seed gets a fresh one, so that both can share the batch.
            seeds = [secrets.randbelow(2**63) if seed is None else seed for seed in noise_seeds]
        chunks = await asyncio.get_running_loop().run_in_executor(self._worker, self._infer_in_thread, observations, seeds)
        if len(chunks) != len(observations):
            raise RuntimeError(f"a policy must answer each observation once: {len(observations)} given, {len(chunks)} chunks returned")
        return chunks

    def _infer_in_thread(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None) -> list[ActionChunk]:
        """Call the policy, in the worker thread."""
        try:
            return self._policy.infer_batch(observations, noise_seeds)
        except StopIteration as error:  # a future refuses this one exception, so every client would wait for ever
            raise RuntimeError("the policy raised StopIteration") from error


def _fail(request: _Request, error: Exception) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)
