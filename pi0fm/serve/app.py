"""The policy server as an ASGI application: openpi's WebSocket protocol at `/`, and `/healthz`.

Owns: who may connect, the order of frames on a connection, what a client learns of a fault. Does not know: sockets and signals
(server.py), batches (batcher.py), bytes (pi0fm_client.wire), how an observation is made (`to_observation`).

    client                                server
      |-- upgrade, Authorization: Api-Key .. ->|   401 for a wrong key, 503 before it is warm
      |<- metadata ----------------------------|
      |-- observation ------------------------>|   checked, queued, inferred with the neighbours
      |<- actions, server_timing, policy_timing|
      |-- observation ------------------------>|
      |<- "error 3f9a1c2e: ..." (text) --------|   then close 1011; every other client goes on
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast, final

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from pi0fm.serve.batcher import Batcher, RefusedError
from pi0fm_client import wire
from pi0fm_client.errors import ConfigError, ObservationError, ServingError
from pi0fm_client.types import ActionChunk, Observation, Policy

WARM_UP_IMAGE_SIZE = (224, 224)
CLOSE_INTERNAL_ERROR = 1011
logger = logging.getLogger(__name__)


def create_app(
    policy: Policy,
    *,
    to_observation: Callable[[Mapping[str, Any]], Observation],
    metadata: Mapping[str, Any],
    token: str | None = None,
    max_batch_size: int = 8,
    max_queue: int = 64,
    max_frame_bytes: int = wire.MAX_FRAME_BYTES,
    max_connections: int = 64,
) -> Starlette:
    """Build the application that serves `policy`; it warms up in its lifespan unless `warm_up` was awaited before.

    to_observation: raises ObservationError, whose line the client sees; it runs on the event loop.
    metadata: the first frame of every connection; the warm-up reads `cameras` (name -> key), `state_key`, `state_dim` and,
    when it is there, `image_size` [height, width]. token: printable ASCII that a client must send, None serves everyone.
    max_connections: further ones are answered 503, since each may hold a frame of max_frame_bytes.
    Raises ConfigError for a token or a size that cannot be used, ObservationError for metadata that cannot be sent.
    """
    check_token(token)
    greeting = {**metadata, "max_frame_bytes": max_frame_bytes}
    batcher = Batcher(policy, validate=to_observation, max_batch_size=max_batch_size, max_queue=max_queue)
    service = _Service(batcher, greeting, token, max_frame_bytes, max_connections)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await warm_up(app)
        yield
        await service.close()

    routes = [WebSocketRoute("/", service.handle_connection), Route("/healthz", service.healthz), Route("/", service.index)]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.service = service
    return app


async def warm_up(app: Starlette) -> float:
    """Run the policy once alone and once in a full batch, so that no client pays for compilation; returns seconds, 0 when done before.

    Raises ServingError when the policy fails on the synthetic observation, which means that it would fail on every other.
    """
    return await cast(_Service, app.state.service).warm_up()


def check_token(token: str | None) -> None:
    """Raise ConfigError for a token that a header cannot carry, or an empty one, which would protect nothing."""
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            "a token must be printable ASCII without blanks and not empty: give another one, or leave it out to serve everyone"
        )


def synthetic_observation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Make a message with black images and a zero state of the sizes in `metadata`. Raises ServingError when it has none."""
    try:
        height, width = metadata.get("image_size", WARM_UP_IMAGE_SIZE)
        message: dict[str, Any] = {key: np.zeros((height, width, 3), np.uint8) for key in metadata["cameras"].values()}
        message[metadata["state_key"]] = np.zeros(metadata["state_dim"], np.float32)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServingError(f"the metadata must name cameras, state_key and state_dim to warm up with, found fault with {error}") from None
    return {**message, "prompt": "warm up"}


@final
class _Service:
    """State that the routes share. `_ready` is true between the warm-up and the end."""

    def __init__(
        self, batcher: Batcher, metadata: Mapping[str, Any], token: str | None, max_frame_bytes: int, max_connections: int
    ) -> None:
        self._batcher, self._metadata, self._max_frame_bytes = batcher, metadata, max_frame_bytes
        self._greeting = wire.pack(metadata)
        self._authorization = None if token is None else f"Api-Key {token}".encode()
        self._ready = False
        self._max_connections, self._connections = max_connections, 0

    async def warm_up(self) -> float:
        if self._ready:
            return 0.0
        began = time.perf_counter()
        try:
            await self._batcher.warm_up(synthetic_observation(self._metadata))
        except ServingError:
            raise
        except Exception as error:  # any fault of a policy means that it cannot be served
            logger.exception("the warm-up failed")
            raise ServingError(
                f"the policy failed on a synthetic observation ({type(error).__name__}: {error}): check the bundle"
            ) from error
        self._ready = True
        return time.perf_counter() - began

    async def close(self) -> None:
        self._ready = False
        await self._batcher.close()

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("OK\n") if self._ready else PlainTextResponse("warming up\n", 503)

    async def index(self, request: Request) -> Response:
        """Answer a browser at `/`."""
        return PlainTextResponse("a pi0fm policy server: speak WebSocket here (pi0fm_client), GET /healthz for its health\n", 426)

    async def handle_connection(self, websocket: WebSocket) -> None:
        """Serve one connection, from the handshake to its end."""
        if self._authorization is not None:
            given = websocket.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._authorization):
                await websocket.send_denial_response(PlainTextResponse("send the header Authorization: Api-Key <key>\n", 401))
                return
        if not self._ready:
            await websocket.send_denial_response(PlainTextResponse("warming up\n", 503))
            return
        if self._connections >= self._max_connections:
            full = f"this server takes {self._max_connections} connections at a time, and has them; close one, or raise --max_connections\n"
            await websocket.send_denial_response(PlainTextResponse(full, 503))
            return
        self._connections += 1
        try:
            await websocket.accept()
            await websocket.send_bytes(self._greeting)
            await self._exchange(websocket)
        except WebSocketDisconnect:
            return
        finally:
            self._connections -= 1

    async def _exchange(self, websocket: WebSocket) -> None:
        """Answer requests in turn. The next frame is awaited during the inference, which is how a lost client is noticed."""
        previous_total_ms: float | None = None
        incoming = asyncio.create_task(websocket.receive())
        answering: asyncio.Task[bytes | str] | None = None
        try:
            while (message := await incoming)["type"] == "websocket.receive":
                began = time.perf_counter()
                incoming = asyncio.create_task(websocket.receive())
                answering = asyncio.create_task(self._answer(message.get("bytes"), previous_total_ms))
                await asyncio.wait({incoming, answering}, return_when=asyncio.FIRST_COMPLETED)
                if incoming.done() and incoming.result()["type"] != "websocket.receive":
                    return
                reply = await answering
                if isinstance(reply, str):
                    await websocket.send_text(reply)
                    await websocket.close(CLOSE_INTERNAL_ERROR)
                    return
                await websocket.send_bytes(reply)
                previous_total_ms = _milliseconds_since(began)
        finally:
            incoming.cancel()
            if answering is not None:
                answering.cancel()

    async def _answer(self, frame: bytes | None, previous_total_ms: float | None) -> bytes | str:
        """Return the reply's bytes, or an error line; only an error in the client's own request says more than an id."""
        try:
            began = time.perf_counter()
            if frame is None:
                raise ObservationError("a request must be a binary frame, found text: send the msgpack bytes")
            message = wire.unpack(frame, max_bytes=self._max_frame_bytes)
            chunk = await self._batcher.submit(message, _pop_noise_seed(message))
            return _encode_reply(chunk, _milliseconds_since(began), previous_total_ms)
        except (ObservationError, RefusedError) as error:
            identifier = secrets.token_hex(4)
            line = " ".join(str(error).split())[:1000]
            logger.warning("error %s: %s", identifier, line)
            return f"error {identifier}: {line}"
        except Exception:  # a policy may raise anything, and none of it is a client's business
            identifier = secrets.token_hex(4)
            logger.exception("internal error %s", identifier)
            return f"internal error {identifier}"


def _pop_noise_seed(message: dict[str, Any]) -> int | None:
    """Remove `noise_seed` from a request and return it: a whole number in [0, 2**63), or None."""
    seed = message.pop("noise_seed", None)
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ObservationError(f"noise_seed must be a whole number in [0, 2**63), found {str(seed)[:40]}: leave it out for fresh noise")
    return int(seed)


def _encode_reply(chunk: ActionChunk, server_ms: float, previous_total_ms: float | None) -> bytes:
    """Encode openpi's reply. `server_timing.infer_ms` holds the wait in the queue too, `policy_timing.infer_ms` the inference alone."""
    if not np.isfinite(chunk.actions).all():
        raise RuntimeError("the policy answered an action that is not finite; no robot may be sent it")
    server_timing = {"infer_ms": server_ms}
    if previous_total_ms is not None:
        server_timing["prev_total_ms"] = previous_total_ms
    policy_timing = {"infer_ms": server_ms} | {name: float(value) for name, value in chunk.timings.items()}
    return wire.pack({"actions": chunk.actions, "server_timing": server_timing, "policy_timing": policy_timing})


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
