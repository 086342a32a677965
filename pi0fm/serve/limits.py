"""Bounds on sockets: their number, their time, and the bytes that they may send before a request is read.

Owns: the count of sockets by address, uvicorn's two protocols with these bounds, spare descriptors, the rate of log lines.
Does not know: the content of a request, batches.

    TCP accepted --- silent: at most SILENT_SECONDS, at most SILENT_SOCKETS, a newcomer pushes the oldest out ---> upgrade or answer
    upgraded    ---- at most MAX_FRAGMENTS a message, MAX_AHEAD messages unread, a few pings a second
    answering   ---- a client that does not read for WRITE_SECONDS is dropped
    closing     ---- CLOSING_SECONDS until the peer has read the end, then dropped
"""

import asyncio
import json
import logging
import resource
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from pi0fm.options import option
from pi0fm_client import wire
from pi0fm_client.errors import ConfigError, ServingError
from pi0fm_client.safety import StateCheck

SILENT_SECONDS = 10.0
SILENT_SOCKETS = 32
SILENT_SOCKETS_OF_ADDRESS = 24
REFUSED_SOCKETS = 16  # that were upgraded to be refused, and are about to close
WRITE_SECONDS = 10.0
CLOSING_SECONDS = 5.0
MAX_FRAGMENTS = 1024
MAX_AHEAD = 64
CONTROL_FRAMES = 64  # at once, and as many again in each CONTROL_SECONDS
CONTROL_SECONDS = 10.0
PIECE = 8192  # bytes that are parsed before the bounds are looked at: a thousand of the smallest frames, some milliseconds
LARGE_PIECE = 4 * PIECE  # the same while as much as a PIECE waits for the end of its frame, which is a picture's
BACKLOG = 32  # asyncio accepts this many sockets before it runs anything else
SPARE_DESCRIPTORS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """Options of a server: bounds on one policy and its clients. Raises ConfigError for a number out of range."""

    max_batch_size: int = option(8, "most observations in one inference")
    max_queue: int = option(64, "most requests that wait; a further one is refused")
    max_connections: int = option(64, "most robots that are connected at a time; a further one is refused")
    max_connections_of_address: int | None = option(None, "most of them from one address; empty takes half")
    max_frame_bytes: int = option(wire.MAX_FRAME_BYTES, "most bytes of one observation")
    idle_seconds: float = option(600.0, "a connection that sends nothing for so long is closed")
    state_check: StateCheck = option(
        "warn", "a state far outside the training's range: refuse it, warn of it in the log, once for each dimension, or off"
    )
    stall_seconds: float = option(10.0, "an inference that takes longer turns /healthz red, and requests are refused until it ends")

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "max_connections", "max_connections_of_address"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be >= 1, found {getattr(self, name)}")
        if not 1024 <= self.max_frame_bytes <= wire.MAX_FRAME_BYTES:
            raise ConfigError(f"--max_frame_bytes must lie in 1024..{wire.MAX_FRAME_BYTES}, found {self.max_frame_bytes}")
        for name in ("idle_seconds", "stall_seconds"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"--{name} must lie in (0, 1e6), found {getattr(self, name)}")


@final
class Sockets:
    """Sockets that have not been upgraded or answered yet, the oldest first, and those that are to end. `sweep` belongs to a timer."""

    def __init__(self, max_upgraded: int) -> None:
        self._max_upgraded = max_upgraded
        self._silent: OrderedDict[BoundedHttp, Hashable] = OrderedDict()
        self._upgraded: set[BoundedWebSocket] = set()

    def opened(self, protocol: "BoundedHttp") -> None:
        """Count a new socket, and push out the oldest silent one of its address, or of all, where there are too many."""
        address = protocol.client[0] if protocol.client else None
        self._silent[protocol] = address
        same = [other for other, theirs in self._silent.items() if theirs == address]
        if len(same) > SILENT_SOCKETS_OF_ADDRESS or len(self._silent) > SILENT_SOCKETS:
            oldest = same[0] if len(same) > SILENT_SOCKETS_OF_ADDRESS else next(iter(self._silent))
            logger.warning("too many silent connections: the oldest one of %s is dropped", self._silent.pop(oldest))
            oldest.transport.abort()

    def left(self, protocol: "BoundedHttp") -> None:
        """Count a socket as upgraded or gone."""
        self._silent.pop(protocol, None)

    def upgraded(self, channel: "BoundedWebSocket") -> None:
        """Watch a WebSocket until `lost`; one too many is dropped."""
        self._upgraded.add(channel)
        if len(self._upgraded) > self._max_upgraded:
            channel.transport.abort()

    def lost(self, channel: "BoundedWebSocket") -> None:
        """Watch it no longer."""
        self._upgraded.discard(channel)

    async def sweep(self) -> None:
        """Drop every connection whose time is over."""
        now = time.monotonic()
        protocols: list[BoundedHttp | BoundedWebSocket] = [*self._silent, *self._upgraded]
        for protocol in protocols:
            if protocol.overdue(now):
                protocol.transport.abort()


def bounded_protocols(max_connections: int) -> tuple[Sockets, Any, Any]:
    """Return the sockets, and factories of uvicorn's HTTP and WebSocket protocols that share them and keep this module's bounds."""
    sockets = Sockets(max_connections + REFUSED_SOCKETS)
    return sockets, partial(BoundedHttp, sockets), partial(BoundedWebSocket, sockets)


@final
class BoundedHttp(H11Protocol):
    """HTTP until the upgrade: a whole request within SILENT_SECONDS."""

    def __init__(self, sockets: Sockets, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sockets, self._opened = sockets, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the socket."""
        super().connection_made(transport)
        self._opened = time.monotonic()
        self._sockets.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no longer."""
        super().connection_lost(exc)
        self._sockets.left(self)

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Hand the socket over."""
        self._sockets.left(self)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Give the next request its own time."""
        self._opened = time.monotonic()
        super().on_response_complete()

    def overdue(self, now: float) -> bool:
        """Tell whether its request has taken too long to arrive, or its answer to be read."""
        answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        return not answering and now - self._opened > SILENT_SECONDS


@final
class BoundedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose fragments, pings, unread messages and unread answers are bounded."""

    def __init__(self, sockets: Sockets, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sockets = sockets
        self._ends: float | None = None
        self._control, self._control_at = 0.0, 0.0

    def connection_made(self, transport: Any) -> None:
        """Watch it until the handshake is through."""
        super().connection_made(transport)
        self._ends = time.monotonic() + SILENT_SECONDS
        self._sockets.upgraded(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch it no longer."""
        super().connection_lost(exc)
        self._sockets.lost(self)

    def pause_writing(self) -> None:
        """Give the client WRITE_SECONDS to read."""
        super().pause_writing()
        self._ends = time.monotonic() + WRITE_SECONDS

    def resume_writing(self) -> None:
        """Let it go on."""
        super().resume_writing()
        self._ends = None

    def overdue(self, now: float) -> bool:
        """Tell whether the handshake, a write or the end has taken too long."""
        if self.transport.is_closing():
            self._ends = min(self._ends or now + CLOSING_SECONDS, now + CLOSING_SECONDS)
        elif self.handshake_complete and self.writable.is_set():
            self._ends = None
        return self._ends is not None and now > self._ends

    def data_received(self, data: bytes) -> None:
        """Parse piece by piece, and stop at the first bound that is passed."""
        view, start = memoryview(data), 0
        while start < len(data):
            end = start + (PIECE if len(self.conn.reader.buffer) < PIECE else LARGE_PIECE)
            super().data_received(bytes(view[start:end]))
            if self.queue.qsize() > MAX_AHEAD:
                self._drop("sends further requests without reading the answers")
            if self.transport.is_closing():
                return
            start = end

    async def send(self, message: Any) -> None:
        """Count an answer to a refused upgrade as the end of its handshake, which uvicorn logs as an error otherwise."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True

    def handle_cont(self, event: Frame) -> None:
        """Bound the fragments of a message."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self._drop(f"sent a message in more than {MAX_FRAGMENTS} fragments")
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        """Bound pings, whose pongs may go unread."""
        self._count_control()
        super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        """Bound unsolicited pongs."""
        self._count_control()
        super().handle_pong(event)

    def _count_control(self) -> None:
        now = time.monotonic()
        rested = (now - self._control_at) * CONTROL_FRAMES / CONTROL_SECONDS
        self._control, self._control_at = max(0.0, self._control - rested) + 1, now
        if self._control > CONTROL_FRAMES:
            self._drop("sends too many pings")

    def _drop(self, what: str) -> None:
        if not self.transport.is_closing():
            logger.warning("%s %s: dropped", self.client[0] if self.client else "a client", what)
        self.transport.abort()


def fit_descriptors(max_connections: int) -> None:
    """Raise the process's limit of open files as far as the server may need. Raises ServingError where the system allows too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 64
    fixed = used + SILENT_SOCKETS + REFUSED_SOCKETS + BACKLOG + SPARE_DESCRIPTORS
    wanted = fixed + max_connections
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ServingError(
                f"{max_connections} connections need {wanted} open files, found a limit of {hard}; "
                f"type --max_connections {max(1, hard - fixed)}, or raise ulimit -n"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@final
class RateLimit(logging.Filter):
    """Let each kind of line through BURST times, then once a second, with the number of those left out."""

    BURST, KINDS = 20, 256

    def __init__(self) -> None:
        super().__init__()
        self._kinds: OrderedDict[tuple[str, str], tuple[float, float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is written."""
        kind, now = (record.name, str(record.msg)[:200]), time.monotonic()
        credit, at, left_out = self._kinds.pop(kind, (float(self.BURST), now, 0))
        credit = min(float(self.BURST), credit + now - at)
        written = credit >= 1
        self._kinds[kind] = (credit - 1, now, 0) if written else (credit, now, left_out + 1)
        if len(self._kinds) > self.KINDS:
            self._kinds.popitem(last=False)
        if written and left_out:
            record.msg, record.args = f"{record.getMessage()} (and {left_out} lines like it)", ()
        return written


@final
class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        return json.dumps(line | ({"traceback": self.formatException(record.exc_info)} if record.exc_info else {}))


def log_to_standard_error(form: str) -> None:
    """Write warnings and worse as `text` or `json`, each kind at a bounded rate."""
    handler = logging.StreamHandler()
    handler.setFormatter(_AsJson() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(RateLimit())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
