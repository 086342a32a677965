"""The policy server as an ASGI application: openpi's WebSocket protocol at `/`, and `/healthz`.

Owns: who may connect, the greeting, health, the drain. Does not know: sockets and signals (server.py), one connection's frames
(sessions.py), batches (batcher.py), how an observation is made (`to_observation`).

    upgrade    401 for a wrong key, 403 for a web page, 503 before it is warm, when it is full, and while it drains
    full       a connection that never asked makes room for a new one; else the new one is refused
    healthz    200, or 503 while it warms up, drains, or one inference takes longer than it may
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast, final

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from pi0fm.serve import door, sessions
from pi0fm.serve.batcher import Batcher
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.sessions import Session
from pi0fm_client import wire
from pi0fm_client.errors import ConfigError, ServingError
from pi0fm_client.types import Observation, Policy

WARM_UP_IMAGE_SIZE = (224, 224)
SECONDS_BEFORE_EVICTION = 5.0  # a robot that connected asks within milliseconds
DOOR_THREADS = 2
logger = logging.getLogger(__name__)


def create_app(
    policy: Policy,
    *,
    to_observation: Callable[[Mapping[str, Any]], Observation],
    metadata: Mapping[str, Any],
    options: ServingLimits,
    tokens: Sequence[str] = (),
    renamed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Starlette:
    """Build the application that serves `policy`; it warms up in its lifespan unless `warm_up` was awaited before.

    to_observation: raises ObservationError, whose line the client sees; it runs in threads.
    metadata: the first frame of every connection, without the paths in it; the warm-up reads `cameras` (name -> key), `state_key`,
    `state_dim` and, when it is there, `image_size` [height, width]. tokens: printable ASCII, a client must send one of them, none serves
    everyone. renamed: a message in the policy's own keys, see keys.py.
    Raises ConfigError for a token that cannot be used, ObservationError for metadata that cannot be sent.
    """
    for token in tokens:
        check_token(token)
    service = _Service(policy, to_observation, metadata, options, tokens, renamed)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await warm_up(app)
        yield
        service.close()

    routes = [WebSocketRoute("/", service.handle_connection), Route("/healthz", service.healthz), Route("/", service.index)]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.service = service
    return app


async def warm_up(app: Starlette) -> float:
    """Run the policy alone and in a full batch, so that no client pays for compilation; returns seconds, 0 when done before.

    Raises ServingError when the policy fails on the synthetic observation, which means that it would fail on every other.
    """
    return await cast(_Service, app.state.service).warm_up()


async def drain(app: Starlette) -> None:
    """Take no new connection, answer every request that arrived, then close each connection with 1001."""
    await cast(_Service, app.state.service).drain()


def check_token(token: str | None) -> None:
    """Raise ConfigError for a token that a header cannot carry, or an empty one, which would protect nothing."""
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            "a token must be printable ASCII without blanks and not empty: give another one, or leave it out to serve everyone"
        )


def without_paths(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `metadata` with the last name of each absolute path in it: where things are on a machine is no client's business."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(item) for key, item in value.items()}
        return Path(value).name if isinstance(value, str) and value.startswith("/") else value

    return {key: cleaned(value) for key, value in metadata.items()}


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
        self,
        policy: Policy,
        to_observation: Callable[[Mapping[str, Any]], Observation],
        metadata: Mapping[str, Any],
        options: ServingLimits,
        tokens: Sequence[str],
        renamed: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self._to_observation, self._metadata, self._options = to_observation, metadata, options
        self._batcher = Batcher(policy, options)
        self._door = door.Door(to_observation, options.max_frame_bytes, renamed)
        extensions = [*door.EXTENSIONS, *([wire.REPLY_IDENTITY] if wire.IDENTITY in metadata else [])]
        self._greeting = wire.pack({**without_paths(metadata), "max_frame_bytes": options.max_frame_bytes, wire.EXTENSIONS: extensions})
        self._authorizations = [f"Api-Key {token}".encode() for token in tokens]
        self._ready = self._draining = False
        self._sessions: set[Session] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(DOOR_THREADS, "pi0fm-door")

    async def warm_up(self) -> float:
        if self._ready:
            return 0.0
        began = time.perf_counter()
        try:
            await self._batcher.warm_up(self._to_observation(synthetic_observation(self._metadata)))
        except ServingError:
            raise
        except Exception as error:  # any fault of a policy means that it cannot be served
            logger.exception("the warm-up failed")
            raise ServingError(
                f"the policy failed on a synthetic observation ({type(error).__name__}: {error}): check the bundle"
            ) from error
        self._ready = True
        return time.perf_counter() - began

    async def drain(self) -> None:
        self._draining = True
        await asyncio.gather(*(session.leave(sessions.CLOSE_GOING_AWAY, "the server stops") for session in self._sessions))

    def close(self) -> None:
        self._ready = False
        self._batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def healthz(self, request: Request) -> Response:
        fault = self._unavailable()
        return PlainTextResponse(f"{fault}\n", 503) if fault else PlainTextResponse("OK\n")

    async def index(self, request: Request) -> Response:
        """Answer a browser at `/`."""
        return PlainTextResponse("a pi0fm policy server: speak WebSocket here (pi0fm_client), GET /healthz for its health\n", 426)

    async def handle_connection(self, websocket: WebSocket) -> None:
        """Serve one connection, from the handshake to its end."""
        address = websocket.client.host if websocket.client else ""
        refused = self._refusal(websocket) or self._make_room(address)
        if refused is not None:
            await websocket.send_denial_response(refused)
            return
        identity = self._metadata.get(wire.IDENTITY)
        session = Session(websocket, address, self._batcher, self._door, self._threads, identity, self._options.idle_seconds)
        self._sessions.add(session)
        try:
            await websocket.accept()
            await session.run(self._greeting)
        except WebSocketDisconnect:
            return
        finally:
            self._sessions.discard(session)

    def _unavailable(self) -> str | None:
        if not self._ready:
            return "warming up"
        if self._draining:
            return "shutting down"
        stuck = self._batcher.stuck_seconds()
        return None if stuck is None else f"one inference has taken {stuck:.0f} s"

    def _refusal(self, websocket: WebSocket) -> Response | None:
        """Return the answer to whoever may not connect. Every key is compared, in a time that tells nothing of them."""
        if "origin" in websocket.headers:  # a page that a user of the robot's network looks at must not move the robot
            return PlainTextResponse("a web page may not speak to a policy server\n", 403)
        given = websocket.headers.get("authorization", "").encode("latin-1")
        fitting = sum(hmac.compare_digest(given, known) for known in self._authorizations)  # a sum, since it looks at each
        if self._authorizations and not fitting:
            return PlainTextResponse("send the header Authorization: Api-Key <key>\n", 401)
        fault = self._unavailable()
        return PlainTextResponse(f"{fault}\n", 503) if fault else None

    def _make_room(self, address: str) -> Response | None:
        """Return None where there is a place, after closing the oldest connection that never asked, if that makes one."""
        options, crowd = self._options, list(self._sessions)
        most, whose, option = options.max_connections, "", "max_connections"
        if len(crowd) < most:
            crowd = [session for session in crowd if session.address == address]
            most, whose, option = options.max_connections_of_address or max(1, most // 2), " of one address", "max_connections_of_address"
        if len(crowd) < most:
            return None
        now = time.monotonic()
        silent = [session for session in crowd if not session.has_asked and now - session.began > SECONDS_BEFORE_EVICTION]
        if not silent:
            full = f"this server takes {most} connections{whose} at a time, and has them; close one, or raise --{option}\n"
            return PlainTextResponse(full, 503)
        oldest = min(silent, key=lambda session: session.began)
        self._sessions.discard(oldest)
        logger.warning("the server is full: a connection of %s that never asked makes room", oldest.address)
        leaving = asyncio.create_task(oldest.leave(sessions.CLOSE_TRY_AGAIN, "made room for another client"))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        return None
