"""One robot's connection, from its greeting to its end.

Owns: the order of frames, time-outs, the report of a fault to a client. Does not know: who may connect, how a batch is chosen.

    client                                server
      |<- metadata ----------------------------|   the first request within HELLO_SECONDS, a later one within `idle_seconds`
      |-- observation ------------------------>|   checked (in a thread where that takes time), queued, inferred with the neighbours
      |<- actions, server_timing, policy_timing|
      |-- observation ------------------------>|
      |<- "error 3f9a1c2e: ..." (text) --------|   then close 1011; every other client goes on

with extensions:
      |-- pi0fm/session arm, request_id 7 ---->|   up to MAX_IN_FLIGHT at once, answered as they are ready
      |-- pi0fm/session arm, request_id 8 ---->|   takes the place of 7 where that still waits
      |<- request_id 7, pi0fm/refused: line ---|   so does a deadline that cannot be kept; the connection goes on
      |<- request_id 8, actions, ... ----------|
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, final

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pi0fm.serve import door
from pi0fm.serve.batcher import RefusedError, Request
from pi0fm.serve.door import ReceivedRequest
from pi0fm.serve.metrics import Metrics
from pi0fm.serve.served import ServedPolicy
from pi0fm_client import wire
from pi0fm_client.errors import ObservationError
from pi0fm_client.types import ActionChunk

HELLO_SECONDS = 60.0
CLOSE_REFUSED = 1008
MAX_IN_FLIGHT = 4
MAX_SESSIONS = 64
MAX_LINE = 1000
JUDGED = {wire.UNCERTAINTY: "spread", wire.ALARM: "alarm"}  # key of a reply: name among a chunk's scores
CLOSE_IDLE, CLOSE_GOING_AWAY, CLOSE_INTERNAL_ERROR, CLOSE_TRY_AGAIN = 1000, 1001, 1011, 1013
logger = logging.getLogger(__name__)


@final
class Session:
    """An accepted connection. address: whose it is, for the limits. served: asked at each request, since a swap changes it."""

    def __init__(
        self,
        websocket: WebSocket,
        address: str,
        served: Callable[[], ServedPolicy],
        threads: Executor,
        idle_seconds: float,
        metrics: Metrics,
    ) -> None:
        self._websocket, self.address, self._served, self._threads = websocket, address, served, threads
        self._idle_seconds, self._metrics = idle_seconds, metrics
        self.began = time.monotonic()
        self.has_requested = False
        self._reading = self._leaving = False
        self._answers: set[asyncio.Task[None]] = set()
        self._names: set[str] = set()
        self._counts: dict[str, Mapping[str, int]] = {}
        self._previous_total_ms: float | None = None

    async def run(self) -> None:
        """Greet, and answer until the client or the server ends it."""
        incoming: asyncio.Task[Any] | None = None
        try:
            await self._websocket.send_bytes(self._served().greeting)
            incoming = asyncio.create_task(self._websocket.receive())
            while await self._wait_for_frame(incoming) and (message := incoming.result())["type"] == "websocket.receive":
                incoming = asyncio.create_task(self._websocket.receive())
                if not self._leaving:
                    await self._start_answer(message.get("bytes"), incoming)
        except WebSocketDisconnect:
            return
        finally:
            for task in (incoming, *self._answers):
                if task is not None:
                    task.cancel()
            for name in self._names:
                self._served().batcher.forget((self, name))

    async def leave(self, code: int, reason: str) -> None:
        """Answer the requests that arrived, then close."""
        self._leaving = True
        while self._reading or self._answers:
            await asyncio.wait(self._answers) if self._answers else await asyncio.sleep(0.001)
        await self._close(code, reason)

    async def _wait_for_frame(self, incoming: "asyncio.Task[Any]") -> bool:
        """Wait for a frame; close, and return False, when a client that waits for no answer is silent for too long."""
        while not incoming.done():
            limit = self._idle_seconds if self.has_requested else HELLO_SECONDS
            done, _ = await asyncio.wait(
                {incoming, *self._answers}, timeout=None if self._answers else limit, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                await self._close(CLOSE_IDLE, f"silent for {limit:.0f} s")
                return False
        return True

    async def _start_answer(self, frame: bytes | None, incoming: "asyncio.Task[Any]") -> None:
        """Start to answer one frame, and return when the next one may be taken."""
        began, self.has_requested, self._reading = time.perf_counter(), True, True
        try:
            asked = await self._read(frame)
            self._metrics.stage.labels("read").observe(time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - nothing that a client sends may end the server, and no fault is sent to it
            await self._send_error(error)
            return
        finally:
            self._reading = False
        _raise_if_gone(incoming)
        answer = asyncio.create_task(self._answer(asked, began))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        # Without a session's name requests are answered one by one, as openpi does. The next frame is awaited meanwhile, which is how a
        # lost client is noticed.
        most = MAX_IN_FLIGHT if asked.session else 1
        while len(self._answers) >= most:
            awaited = self._answers if incoming.done() else {incoming, *self._answers}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            _raise_if_gone(incoming)

    async def _read(self, frame: bytes | None) -> ReceivedRequest:
        if frame is None:
            raise ObservationError("a request must be a binary frame, found text: send the msgpack bytes")
        reader, loop = self._served().reader, asyncio.get_running_loop()
        if len(frame) > door.QUICK_BYTES:
            asked = await loop.run_in_executor(self._threads, reader.read, frame)
        elif door.is_quick(message := reader.unpacked(frame)):
            asked = reader.parse(message)  # two changes of thread take longer than this
        else:
            asked = await loop.run_in_executor(self._threads, reader.parse, message)
        self._names.add(asked.session)
        if len(self._names) > MAX_SESSIONS:
            raise ObservationError(f"a connection may have {MAX_SESSIONS} sessions, found more: give each robot one name, and keep it")
        return asked

    async def _answer(self, asked: ReceivedRequest, began: float) -> None:
        """Infer and reply."""
        served = self._served()
        latest = None if asked.deadline_ms is None else began + asked.deadline_ms / 1e3
        extra: dict[str, Any] = {} if asked.request_id is None else {wire.REQUEST_ID: asked.request_id}
        if extra and served.identity is not None:
            extra[wire.REPLY_IDENTITY] = served.identity
        try:
            key = (self, asked.session)
            name = " ".join(filter(None, (self.address, asked.session[:40])))
            extras = (asked.prefix, asked.candidates, asked.report, name, began)
            request = Request(asked.observation, asked.noise_seed, key, latest, *extras)
            self._count(asked)
            chunk = await served.batcher.submit(request)
            if extra or asked.candidates is not None:  # a client that knows extensions
                extra |= {key: float(chunk.scores[name]) for key, name in JUDGED.items() if name in chunk.scores}
            await self._websocket.send_bytes(_encode_reply(chunk, _milliseconds_since(began), self._previous_total_ms, extra))
            self._metrics.count_scores(chunk.scores)
            ended = time.perf_counter()
            self._previous_total_ms = (ended - began) * 1e3
            self._metrics.stage.labels("total").observe(ended - began)
            if latest is not None and ended > latest:
                self._metrics.late.inc()
        except WebSocketDisconnect:
            return
        except RefusedError as error:
            if asked.request_id is None:
                await self._send_error(error)
            else:
                self._metrics.refused.labels(error.why).inc()
                await self._websocket.send_bytes(wire.pack({**extra, wire.REFUSED: _line(error)}))
        except Exception as error:  # noqa: BLE001 - a policy may raise anything, and none of it is a client's business
            await self._send_error(error)

    def _count(self, asked: ReceivedRequest) -> None:
        """Add the robot's counts since its last report."""
        if asked.report is not None:
            known = self._counts.get(asked.session, {})
            for name, count in asked.report.counts.items():
                self._metrics.robots.labels(name).inc(max(0, count - known.get(name, 0)))
            self._counts[asked.session] = asked.report.counts

    async def _send_error(self, error: Exception) -> None:
        """Send an error as openpi does, and close; only an error in the client's own request says more than an id."""
        identifier = secrets.token_hex(4)
        why = error.why if isinstance(error, RefusedError) else "observation" if isinstance(error, ObservationError) else "internal"
        self._metrics.refused.labels(why).inc()
        if isinstance(error, ObservationError | RefusedError):
            logger.warning("error %s: %s", identifier, _line(error))
            text = f"error {identifier}: {_line(error)}"
        else:
            logger.error("internal error %s", identifier, exc_info=error)
            text = f"internal error {identifier}"
        with suppress(WebSocketDisconnect):
            await self._websocket.send_text(text)
        await self._close(CLOSE_INTERNAL_ERROR)

    async def _close(self, code: int, reason: str = "") -> None:
        if self._websocket.application_state is WebSocketState.CONNECTED:
            with suppress(WebSocketDisconnect):  # it has gone meanwhile
                await self._websocket.close(code, reason)


def _raise_if_gone(incoming: "asyncio.Task[Any]") -> None:
    if incoming.done() and incoming.result()["type"] != "websocket.receive":
        raise WebSocketDisconnect


def _encode_reply(chunk: ActionChunk, server_ms: float, previous_total_ms: float | None, extra: dict[str, Any]) -> bytes:
    """Encode openpi's reply. `server_timing.infer_ms` holds the wait in the queue too, `policy_timing.infer_ms` the inference alone."""
    if not np.isfinite(chunk.actions).all():
        raise RuntimeError("the policy answered an action that is not finite; no robot may be sent it")
    server_timing = {"infer_ms": server_ms}
    if previous_total_ms is not None:
        server_timing["prev_total_ms"] = previous_total_ms
    policy_timing = {"infer_ms": server_ms} | {name: float(value) for name, value in chunk.timings.items()}
    return wire.pack({"actions": chunk.actions, "server_timing": server_timing, "policy_timing": policy_timing, **extra})


def _line(error: Exception) -> str:
    return " ".join(str(error)[: 4 * MAX_LINE].split())[:MAX_LINE]


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
