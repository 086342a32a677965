"""Run the application on a port: bound before the policy is loaded, opened after the warm-up, closed on a signal.

Owns: the listening socket, uvicorn's settings, the moment of readiness, signals. Does not know: the protocol, the policy.

    bind           load the policy    warm up     open, announce      serve ...       SIGINT or SIGTERM
    |--------------|------------------|-----------|-------------------|---------------|
    a port in use                     nobody can connect              clients         1012 to clients, exit code 0
    ends it here
"""

import asyncio
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from pi0fm.serve.app import warm_up
from pi0fm_client.errors import ServingError
from pi0fm_client.wire import MAX_FRAME_BYTES

SECONDS_TO_LEAVE = 5


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket without listening yet; port 0 takes a free one. Raises ServingError for an address that cannot be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ServingError(
            f"--host {host} is no address of this machine ({error.strerror}): give 127.0.0.1, or 0.0.0.0 for every network"
        ) from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A server that restarts must not wait for the old connections' TIME_WAIT to pass.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _bind_fault(host, port, error) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL for a client on this machine, `ws://HOST:PORT`."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:  # every interface: the loopback one is the one that this machine can always reach
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"ws://[{host}]:{port}" if address.version == 6 else f"ws://{host}:{port}"


def make_server(app: Starlette, max_frame_bytes: int = MAX_FRAME_BYTES) -> uvicorn.Server:
    """Configure uvicorn for `app`: frames bounded, no compression (images do not shrink, and it costs milliseconds), no access log."""
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=max_frame_bytes,
        ws_per_message_deflate=False,
        http="h11",
        loop="asyncio",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_LEAVE,
    )
    return uvicorn.Server(config)


async def serve(server: uvicorn.Server, app: Starlette, bound: socket.socket, announce: Callable[[float], None]) -> None:
    """Warm up, open the port, call `announce` with the warm-up's seconds, and serve until `server.should_exit` or a signal.

    Raises ServingError when the warm-up fails, or when another process opened the port in the meantime.
    """
    seconds = await warm_up(app)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        announce(seconds)
    try:
        await serving
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _bind_fault(host, port, error) from None


@contextmanager
def until_stopped() -> Iterator[None]:
    """Make SIGINT and SIGTERM end the block without an error, whether it loads, warms up or serves.

    While uvicorn serves it takes the signals itself, closes the connections, and raises them again for this handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _bind_fault(host: str, port: int, error: OSError) -> ServingError:
    if error.errno == errno.EADDRINUSE:
        return ServingError(
            f"port {port} on {host} is in use: stop the process that holds it, or choose another with --port (0 takes a free one)"
        )
    return ServingError(f"cannot listen on {host} port {port} ({error.strerror}): give another --host or --port")
