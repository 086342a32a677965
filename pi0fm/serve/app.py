"""The policy server as an ASGI application: openpi's WebSocket protocol at `/`, `/healthz`, `/metrics`, and `/swap`.

Owns: who may connect, health, the drain. Does not know: sockets and signals (server.py), one connection's frames (sessions.py), batches
(batcher.py), the policy (served.py).

    upgrade    401 for a wrong key, 403 for a web page, 404 at any path but /, 503 before it is warm, when full, and while it drains
    full       a connection that never asked makes room for a new one; else the new one is refused
    healthz    200, or 503 while it warms up, drains, or one inference takes longer than it may
    metrics    for clients with a key
    swap       POST with the administrator's key; JSON {"bundle": PATH}, or nothing for the bundle that was given at the start
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast, final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from pi0fm.serve import sessions
from pi0fm.serve.batcher import Tap
from pi0fm.serve.keys import Keys
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.metrics import Metrics
from pi0fm.serve.page.live import LivePage, basic_key
from pi0fm.serve.records.request_log import RequestLog
from pi0fm.serve.served import ServablePolicy, Serving
from pi0fm.serve.sessions import Session
from pi0fm_client import wire
from pi0fm_client.errors import ConfigError, Pi0fmError, ServingError

SECONDS_BEFORE_EVICTION = 5.0  # a robot that connected asks within milliseconds
DOOR_THREADS = 2
MAX_SWAP_BYTES = 4096
Load = Callable[[str | None], ServablePolicy]
logger = logging.getLogger(__name__)


def create_app(
    policy: ServablePolicy,
    options: ServingLimits,
    *,
    tokens: Sequence[str] = (),
    admin_token: str | None = None,
    load: Load | None = None,
    keys: Keys | None = None,
    log: RequestLog | None = None,
    live: bool = False,
) -> Starlette:
    """Build the application that serves `policy`; it warms up in its lifespan unless `warm_up` was awaited before.

    tokens: a client must send one of them, none serves everyone. admin_token: the key of /swap, None leaves that out.
    load: loads the policy of another bundle, None: of the first. keys: the robot's own names of columns.
    log: of the inferences; closed at the end. live: show the page of page/live.py.
    Raises ConfigError for a token that cannot be used, ObservationError for metadata that cannot be sent.
    """
    for token in (*tokens, *([] if admin_token is None else [admin_token])):
        check_token(token)
    service = _Service(policy, options, tokens, admin_token, load, keys, log, live)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await warm_up(app)
        yield
        service.close()

    routes = [
        WebSocketRoute("/", service.handle_connection),
        Route("/healthz", service.healthz),
        Route("/metrics", service.show_metrics),
        Route("/swap", service.handle_swap, methods=["POST"]),
        Route("/", service.index),
        WebSocketRoute("/{path:path}", service.refuse_path),
        *([] if service.live is None else service.live.routes()),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.service = service
    return app


async def warm_up(app: Starlette) -> float:
    """Run the policy alone and in a full batch, so that no client pays for compilation; returns seconds, 0 when done before.

    Raises ServingError when the policy fails on the synthetic observation, which means that it would fail on every other.
    """
    return await cast(_Service, app.state.service).serving.warm_up()


def fault_of(app: Starlette) -> str | None:
    """Return why the application cannot serve now, in a few words, or None."""
    return cast(_Service, app.state.service).fault()


async def drain(app: Starlette) -> None:
    """Take no new connection, answer every request that arrived, then close each connection with 1001."""
    await cast(_Service, app.state.service).drain()


async def reload(app: Starlette) -> None:
    """Load and serve again the bundle that was given at the start; a fault is logged, and the policy stays."""
    try:
        await cast(_Service, app.state.service).swap(None)
    except Exception as error:
        logger.error("the bundle was not loaded again: %s", error, exc_info=None if isinstance(error, Pi0fmError) else error)


def check_token(token: str, where: str = "a token") -> None:
    """Raise ConfigError for a token that a header cannot carry, or an empty one, which would protect nothing. The token is not told."""
    odd = next((at for at, letter in enumerate(token) if not (letter.isascii() and letter.isprintable()) or letter == " "), None)
    if odd is not None or not token:
        found = "nothing" if not token else f"U+{ord(token[odd or 0]):04X} as character {(odd or 0) + 1} of {len(token)}"
        raise ConfigError(
            f"{where} must be printable ASCII without blanks and not empty, found {found}: "
            "give another one (in a file a comment has a line of its own)"
        )


@final
class _Service:
    """State that the routes share."""

    def __init__(
        self,
        policy: ServablePolicy,
        options: ServingLimits,
        tokens: Sequence[str],
        admin_token: str | None,
        load: Load | None,
        keys: Keys | None,
        log: RequestLog | None,
        live: bool,
    ) -> None:
        self._options, self._tokens, self._admin_token, self._load = options, tokens, admin_token, load
        self._metrics, self._log = Metrics(), log
        self._threads = ThreadPoolExecutor(DOOR_THREADS, "pi0fm-door")
        self.live = LivePage(self._page_head, self._live_refusal, self._threads) if live else None
        self.serving = Serving(policy, options, self._metrics, keys, self._taps)
        self._draining = False
        self._sessions: set[Session] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    async def drain(self) -> None:
        self._draining = True
        await asyncio.gather(*(session.leave(sessions.CLOSE_GOING_AWAY, "the server stops") for session in self._sessions))

    def close(self) -> None:
        self.serving.is_warm = False
        self.serving.now.batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._log is not None:
            self._log.close()

    def _taps(self, policy: ServablePolicy) -> list[Tap]:
        """Return the listeners to a policy's batches."""
        taps: list[Tap] = [] if self._log is None else [partial(self._log.inferred, policy.metadata.get(wire.IDENTITY))]
        return taps if self.live is None else [*taps, partial(self.live.inferred, getattr(policy, "seen", None))]

    def _page_head(self) -> dict[str, Any]:
        """Return the head of the live page."""
        metadata, options = self.serving.now.policy.metadata, self._options
        found = {
            (sample.name, *sample.labels.values()): sample.value for metric in self._metrics.registry.collect() for sample in metric.samples
        }
        batches = found.get(("pi0fm_batch_size_count",), 0)
        return {
            "policy": {
                "name": metadata.get("embodiment", "policy"),
                "identity": metadata.get(wire.IDENTITY),
                "limits": metadata.get("limits") or {},
                **{name: metadata.get(name) or empty for name, empty in (("action_names", []), ("units", {}))},
            },
            "server": {
                "fault": self.fault(),
                "connections": len(self._sessions),
                "waiting": found.get(("pi0fm_waiting",), 0),
                "answers": found.get(("pi0fm_stage_seconds_count", "total"), 0),
                "mean_batch": found.get(("pi0fm_batch_size_sum",), 0) / batches if batches else 0,
                "late": found.get(("pi0fm_late_answers_total",), 0),
                "refused": {key[1]: value for key, value in found.items() if key[0] == "pi0fm_refused_total" and len(key) > 1},
                **{name: getattr(options, name) for name in ("max_connections", "max_queue", "max_batch_size")},
            },
        }

    def _live_refusal(self, headers: Mapping[str, str]) -> Response | None:
        key = basic_key(headers)
        if _has_key(headers if key is None else {"authorization": f"Api-Key {key}"}, self._tokens):
            return None
        refused = self._denied("key", 401, "give the server's key as the password")
        refused.headers["WWW-Authenticate"] = 'Basic realm="pi0fm", charset="UTF-8"'
        return refused

    async def swap(self, bundle: str | None) -> None:
        load = self._load
        if load is None:
            raise ServingError("this server was started with a policy, not with a bundle: it serves no other one")
        await self.serving.swap(lambda: load(bundle))

    async def healthz(self, request: Request) -> Response:
        fault = self.fault()
        return PlainTextResponse(f"{fault}\n", 503) if fault else PlainTextResponse("OK\n")

    async def index(self, request: Request) -> Response:
        """Answer a browser at `/`."""
        return PlainTextResponse("a pi0fm policy server: speak WebSocket here (pi0fm_client), GET /healthz for its health\n", 426)

    async def show_metrics(self, request: Request) -> Response:
        if not _has_key(request.headers, self._tokens):
            return self._denied("key", 401, "send the header Authorization: Api-Key <key>")
        self._metrics.connections.set(len(self._sessions))
        memory = getattr(self.serving.now.policy, "memory_bytes", None)
        self._metrics.gpu_memory.set(0 if memory is None else memory())
        self._metrics.unlogged.set(0 if self._log is None else self._log.dropped)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def handle_swap(self, request: Request) -> Response:
        if self._admin_token is None or not _has_key(request.headers, [self._admin_token]):
            return self._denied("key", 401, "send the header Authorization: Api-Key <the key in $PI0FM_ADMIN_TOKEN>")
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_SWAP_BYTES:
                return self._denied("observation", 413, f"a request to swap may have {MAX_SWAP_BYTES} bytes")
        try:
            await self.swap(_requested_bundle(body))
        except Pi0fmError as error:
            return PlainTextResponse(f"{' '.join(str(error).split())[:1000]}\n", 400)
        except Exception:
            logger.exception("a swap failed")
            return PlainTextResponse("the bundle could not be loaded: see the server's log\n", 500)
        return JSONResponse({"identity": self.serving.now.identity})

    async def handle_connection(self, websocket: WebSocket) -> None:
        """Serve one connection, from the handshake to its end."""
        address = websocket.client.host if websocket.client else ""
        refused = self._refusal(websocket) or self._make_room(address)
        if refused is not None:
            await _deny(websocket, refused)
            return
        session = Session(websocket, address, lambda: self.serving.now, self._threads, self._options.idle_seconds, self._metrics)
        self._sessions.add(session)
        try:
            await websocket.accept()
            await session.run()
        except WebSocketDisconnect:
            return
        finally:
            self._sessions.discard(session)
            if self.live is not None:
                self.live.left(session)

    async def refuse_path(self, websocket: WebSocket) -> None:
        """Tell a client that asks for the policy at another path."""
        await _deny(websocket, self._denied("path", 404, "the policy is served at /"))

    def fault(self) -> str | None:
        """Return the reason why no robot can be served, or None."""
        if not self.serving.is_warm:
            return "warming up"
        if self._draining:
            return "shutting down"
        stuck = self.serving.now.batcher.stuck_seconds()
        return None if stuck is None else f"one inference has taken {stuck:.0f} s"

    def _refusal(self, websocket: WebSocket) -> Response | None:
        """Return the refusal of a client that may not connect."""
        if "origin" in websocket.headers:  # a page that a user of the robot's network looks at must not move the robot
            return self._denied("origin", 403, "a web page may not speak to a policy server")
        if not _has_key(websocket.headers, self._tokens):
            return self._denied("key", 401, "send the header Authorization: Api-Key <key>")
        fault = self.fault()
        return self._denied("unavailable", 503, fault) if fault else None

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
        silent = [session for session in crowd if not session.has_requested and now - session.began > SECONDS_BEFORE_EVICTION]
        if not silent:
            full = f"this server takes {most} connections{whose} at a time, and has them; close one, or raise --{option}"
            return self._denied("full", 503, full)
        oldest = min(silent, key=lambda session: session.began)
        self._sessions.discard(oldest)
        logger.warning("the server is full: a connection of %s that never asked makes room", oldest.address)
        leaving = asyncio.create_task(oldest.leave(sessions.CLOSE_TRY_AGAIN, "made room for another client"))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        return None

    def _denied(self, why: str, status: int, line: str) -> Response:
        self._metrics.refused.labels(why).inc()
        return PlainTextResponse(f"{line}\n", status)


async def _deny(websocket: WebSocket, refused: Response) -> None:
    """Answer an upgrade with a refusal."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(refused)
    else:  # behind a proxy that knows no such answer, Ray Serve's
        await websocket.close(sessions.CLOSE_TRY_AGAIN if refused.status_code == 503 else sessions.CLOSE_REFUSED)


def _requested_bundle(body: bytes) -> str | None:
    """Return the bundle that a request to swap names, None for the one of the start. Raises ConfigError."""
    if not body:
        return None
    rule = 'a request to swap must be JSON {"bundle": PATH}, or empty for the bundle of the start'
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError(f"{rule}, found no JSON: correct the body") from None
    if not isinstance(asked, dict) or asked.keys() != {"bundle"}:
        found = f"the keys {str(sorted(asked))[:80]}" if isinstance(asked, dict) else f"a {type(asked).__name__}"
        raise ConfigError(f"{rule}, found {found}: send the one key bundle")
    bundle = asked["bundle"]
    if not isinstance(bundle, str) or not bundle or "\0" in bundle:
        raise ConfigError(f"{rule}, found {str(bundle)[:80]!r} as the path: name the folder of a bundle")
    return bundle


def _has_key(headers: Mapping[str, str], tokens: Sequence[str]) -> bool:
    """Tell whether one of the keys was sent. Each is compared, in a time that tells nothing of them."""
    given = headers.get("authorization", "").encode("latin-1")
    return not tokens or sum(hmac.compare_digest(given, f"Api-Key {token}".encode()) for token in tokens) > 0
