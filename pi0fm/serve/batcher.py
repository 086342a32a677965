"""Batch the requests of many robots for one policy: those that arrive during an inference share the next one.

Owns: the queue, the worker thread, the choice of a batch, the handling of a failed one. Does not know: sockets, frames, the policy.

An idle policy starts at once, unless measurements say that a session about to ask is worth waiting for (pace.py); a busy one collects.
Time runs to the right, max_batch_size is 3:

    client A   a---------------+                  b-----------------------------+
    client B      c - - - - - -+--------------+
    client C         d - - - - +--------------+
    worker     [ infer a      ][ infer c, d  ][ infer b ]
    queue         c  c,d         b  b                          full queue: refused at once

A session has one place in the queue: its newer observation takes the place of its older one, so taking turns is first come, first served.
A request that cannot keep its deadline is refused at once. A batch that fails is tried again one request at a time, and only the one that
fails is refused. A request whose client has gone is dropped before it costs an inference.
"""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, final

from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.metrics import Metrics
from pi0fm.serve.pace import Pace
from pi0fm_client.errors import ServingError
from pi0fm_client.types import ActionChunk, ActionPrefix, Observation, Policy, RobotReport

logger = logging.getLogger(__name__)


@final
class RefusedError(ServingError):
    """A request that was not inferred; its message is about the server's load, so a client may read it. why: a word for the metrics."""

    why = "internal"

    @classmethod
    def for_reason(cls, why: str, line: str) -> "RefusedError":
        """Make one."""
        error = cls(line)
        error.why = why
        return error


_STOPPING = "the server is shutting down: connect again in a moment"


@dataclass(frozen=True, eq=False)
class Request:
    """One observation to infer. noise_seed: None draws fresh noise. session: whose it is. latest: `time.perf_counter()` of its deadline.

    prefix: the remainder that the chunk continues, for a policy that can. candidates: chunks that the policy chooses the
    answer from; None is `infer_batch`. report, name, arrived: for taps: the robot's commands, its name, the time.
    """

    observation: Observation
    noise_seed: int | None = None
    session: Hashable = field(default_factory=object)
    latest: float | None = None
    prefix: ActionPrefix | None = None
    candidates: int | None = None
    report: RobotReport | None = None
    name: str = ""
    arrived: float = 0.0


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: Request
    answer: asyncio.Future[ActionChunk]
    since: float


Tap = Callable[[Sequence[Request], Sequence[int], Sequence[ActionChunk]], None]


@final
class Batcher:
    """Run `policy.infer_batch` in one thread. All methods belong to one event loop.

    taps: told each batch that was inferred, with its seeds and its answers; they must not wait.
    """

    def __init__(self, policy: Policy, options: ServingLimits, metrics: Metrics, taps: Sequence[Tap] = ()) -> None:
        self._policy, self._stall_seconds, self._metrics, self._taps = policy, options.stall_seconds, metrics, taps
        self._max_batch_size, self._max_queue = options.max_batch_size, options.max_queue
        self._pace = Pace(options.max_batch_size)
        self._waiting: dict[Hashable, _Waiting] = {}
        self._arrival = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._inferring: tuple[float, int] | None = None  # since when, how many
        self._closed = False
        self._worker = Worker("pi0fm-policy")

    async def submit(self, request: Request) -> ActionChunk:
        """Return the policy's chunk for one observation.

        Raises RefusedError for a deadline that cannot be kept, a newer request of the same session, a full queue, a stuck policy or a
        server that stops, and the policy's exception.
        """
        self._refuse(request)
        now = time.perf_counter()
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), now)
        older = self._waiting.get(request.session)
        if older is not None:
            _fail(older, RefusedError.for_reason("newer", "a newer observation of this session took its place"))
        self._waiting[request.session] = waiting
        self._pace.asked(request.session, now)
        self._metrics.waiting.set(len(self._waiting))
        self._arrival.set()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            return await waiting.answer
        finally:
            if self._waiting.get(request.session) is waiting:  # the client has gone
                del self._waiting[request.session]

    def forget(self, session: Hashable) -> None:
        """Expect no further request of a session."""
        self._pace.forget(session)
        self._arrival.set()

    def stuck_seconds(self) -> float | None:
        """Return how long the running inference has taken, where that is longer than `stall_seconds`."""
        elapsed = 0.0 if self._inferring is None else time.perf_counter() - self._inferring[0]
        return elapsed if elapsed > self._stall_seconds else None

    async def warm_up(self, observation: Observation) -> None:
        """Run the policy alone and in a full batch, in the serving thread: once to compile, once to be timed. Raises its exceptions.

        A policy that compiles or records by shape has a method `warm_up(max_batch)`, which makes all its shapes; it runs first.
        """
        make_shapes = getattr(self._policy, "warm_up", None)
        if make_shapes is not None:
            await self._worker.run(lambda: make_shapes(self._max_batch_size))
        for size in sorted({1, self._max_batch_size}):
            for _ in range(2):
                began = time.perf_counter()
                await self._infer([Request(observation)] * size)
            ended = time.perf_counter()
            self._pace.inferred(size, ended - began, ended)

    async def drain(self) -> None:
        """Wait until every request that was accepted is answered."""
        while self._running is not None and not self._running.done():
            await asyncio.wait([self._running])

    def close(self) -> None:
        """Refuse waiting and further requests. A running inference goes on in its thread, which ends with the process."""
        self._closed = True
        for waiting in list(self._waiting.values()):
            _fail(waiting, RefusedError.for_reason("stopping", _STOPPING))
        self._waiting.clear()
        self._worker.close()

    def _refuse(self, request: Request) -> None:
        if self._closed:
            raise RefusedError.for_reason("stopping", _STOPPING)
        stuck = self.stuck_seconds()
        if stuck is not None:
            line = f"the policy is stuck: one inference has taken {stuck:.0f} s; look at the server, and ask again"
            raise RefusedError.for_reason("stuck", line)
        if request.session in self._waiting:
            return
        if len(self._waiting) >= self._max_queue:
            line = f"the server is busy: {self._max_queue} requests wait already; ask less often, or raise --max_queue"
            raise RefusedError.for_reason("busy", line)
        if request.latest is None:
            return
        now = time.perf_counter()
        if self._is_probe(now):
            return
        remaining = 0.0 if self._inferring is None else self._inferring[0] + self._pace.seconds(self._inferring[1]) - now
        _refuse_late(request, now, self._pace.estimate(len(self._waiting), remaining))

    def _is_probe(self, now: float) -> bool:
        """Tell whether the next request is inferred despite the estimate: nobody waits, and the estimate may be of a slow moment."""
        return self._inferring is None and not self._waiting and self._pace.is_stale(now)

    async def _run(self) -> None:
        while self._waiting:
            await self._gather()
            candidates = next(iter(self._waiting.values())).request.candidates if self._waiting else None
            alike = [session for session, one in self._waiting.items() if one.request.candidates == candidates]
            most = max(1, self._max_batch_size // (candidates or 1))
            batch = [self._waiting.pop(session) for session in alike[:most]]
            await self._answer([waiting for waiting in batch if self._in_time(waiting)])

    async def _gather(self) -> None:
        """Wait for sessions that are about to ask, as long as that shortens the sum of all waits and no deadline is missed by it."""
        free_since = time.perf_counter()
        while 0 < len(self._waiting) < self._max_batch_size:
            now = time.perf_counter()
            until = self._pace.wait_until(len(self._waiting), free_since, now)
            taking = self._pace.seconds(len(self._waiting) + 1)
            latest = [waiting.request.latest - taking for waiting in self._waiting.values() if waiting.request.latest is not None]
            until = min([until, *latest])
            if until <= now:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), until - now)
            except TimeoutError:
                return

    def _in_time(self, waiting: _Waiting) -> bool:
        """Refuse a request whose deadline passed in the queue."""
        now = time.perf_counter()
        try:
            _refuse_late(waiting.request, now, 0.0 if self._is_probe(now) else self._pace.seconds(1))
        except RefusedError as error:
            _fail(waiting, error)
        return not waiting.answer.done()

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Infer for the requests that still wait; when that fails, for each alone."""
        batch = [waiting for waiting in batch if not waiting.answer.done()]
        if not batch:
            return
        began = time.perf_counter()
        self._inferring = began, len(batch)
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.batch_size.observe(len(batch))
        for waiting in batch:
            self._metrics.stage.labels("wait").observe(began - waiting.since)
        requests = [waiting.request for waiting in batch]
        seeds = self._seeds(requests)
        try:
            chunks = await self._infer(requests, seeds)
        except Exception as error:  # noqa: BLE001 - any exception of a policy is its client's answer, and must not end this loop
            if len(batch) == 1:
                _fail(batch[0], error)
                return
            logger.warning("a batch of %d failed (%s): each is tried alone", len(batch), type(error).__name__)
            for waiting in batch:
                await self._answer([waiting])
            return
        finally:
            self._inferring = None
        ended = time.perf_counter()
        self._pace.inferred(len(batch), ended - began, ended)
        for tap in self._taps:
            tap(requests, seeds or [], chunks)
        self._metrics.stage.labels("infer").observe(ended - began)
        for waiting, chunk in zip(batch, chunks, strict=True):
            if waiting.request.session not in self._waiting:  # here, since the next batch is chosen before any client hears of this one
                self._pace.answered(waiting.request.session, ended)
            if not waiting.answer.done():
                waiting.answer.set_result(chunk)

    def _seeds(self, requests: Sequence[Request]) -> list[int] | None:
        if not self._taps and all(request.noise_seed is None for request in requests):
            return None
        # A neighbour that asked for no seed gets a fresh one, so that both can share the batch.
        return [secrets.randbelow(2**63) if request.noise_seed is None else request.noise_seed for request in requests]

    async def _infer(self, requests: Sequence[Request], seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        chunks: list[ActionChunk] = await self._worker.run(lambda: infer(self._policy, requests, seeds))
        if len(chunks) != len(requests):
            raise RuntimeError(f"a policy must answer each observation once: {len(requests)} given, {len(chunks)} chunks returned")
        return chunks


def infer(policy: Policy, requests: Sequence[Request], seeds: Sequence[int] | None) -> list[ActionChunk]:
    """Return the policy's chunks for requests of one number of candidates."""
    observations, prefixes = [request.observation for request in requests], [request.prefix for request in requests]
    candidates, called = requests[0].candidates, cast(Any, policy)
    more = {} if all(prefix is None for prefix in prefixes) else {"prefixes": prefixes}
    if candidates is None:
        chunks: list[ActionChunk] = called.infer_batch(observations, seeds, **more)
    else:
        from pi0fm.policy.sampling.best_of import BestOf  # torch is there where a policy can choose

        chunks = called.infer_best(observations, BestOf(candidates), seeds)
    return chunks


@final
class Worker:
    """One thread, because a policy owns its device, and because compiled graphs and caches may belong to the thread that made them.

    It is a daemon and no executor's: Python waits for an executor's threads when it ends, and a stuck policy would keep the process.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, call: Callable[[], Any]) -> Any:
        """Return the result of `call`, or raise its exception."""
        future = asyncio.get_running_loop().create_future()
        self._calls.put((future, call))
        return await future

    def close(self) -> None:
        """End the thread after the calls that it has."""
        self._calls.put(None)

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            future, call = job
            result: Any = None
            error: BaseException | None = None
            try:
                result = call()
            except BaseException as raised:  # noqa: BLE001 - the caller that awaits it decides
                # A future refuses StopIteration, so every client would wait for ever; an event loop ends by SystemExit.
                usual = isinstance(raised, Exception) and not isinstance(raised, StopIteration)
                error = raised if usual else RuntimeError(f"the policy raised {type(raised).__name__}")
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop has ended meanwhile
                return


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _refuse_late(request: Request, now: float, seconds: float) -> None:
    if request.latest is not None and now + seconds > request.latest:
        left = max(0.0, request.latest - now)
        line = f"the deadline cannot be kept: {left * 1e3:.0f} ms are left, an answer takes about {seconds * 1e3:.0f} ms; "
        raise RefusedError.for_reason("deadline", line + "ask earlier, or give it longer")


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
