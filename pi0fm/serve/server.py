"""Run the application on a port: bound before the policy is loaded, opened after the warm-up, closed on a signal.

Owns: the listening socket, uvicorn's settings, the moment of readiness, signals. Does not know: the protocol, the policy.

    bind           load the policy    warm up     open, announce      serve ...       SIGINT or SIGTERM
    |--------------|------------------|-----------|-------------------|---------------|-----------------------------------------|
    a port in use                     nobody can connect              clients         answers to what was asked, 1001, exit code 0
    ends it here                                                                      exit code 1 where SECONDS_TO_END are not enough
"""

import asyncio
import errno
import faulthandler
import ipaddress
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import uvicorn
from starlette.applications import Starlette

from pi0fm.serve import limits
from pi0fm.serve.app import drain, reload, warm_up
from pi0fm_client.errors import ConfigError, ServingError

SECONDS_TO_DRAIN = 10.0
SECONDS_TO_LEAVE = 5
SECONDS_TO_END = 25.0  # the two above and the interpreter's own end


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


@dataclass(frozen=True)
class Certificates:
    """Files of TLS, in PEM: the server's chain and key, and the authorities that a client's certificate must come from, or None."""

    chain: Path
    key: Path
    clients: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return the TLS context. Raises ConfigError for files that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _check_pem(self.chain, "--tls_certificate", "CERTIFICATE-----")
        _check_pem(self.key, "--tls_key", "PRIVATE KEY-----")
        if self.clients is not None:
            _check_pem(self.clients, "--tls_clients", "CERTIFICATE-----")
        asked: list[bytes] = []

        def password() -> bytes:  # without it openssl asks at the terminal
            asked.append(b"")
            return b""

        try:
            context.load_cert_chain(self.chain, self.key, password)
            if self.clients is not None:
                context.load_verify_locations(self.clients)
                context.verify_mode = ssl.CERT_REQUIRED
        except (ssl.SSLError, ValueError) as error:
            what = f"{self.chain}, {self.key}" + (f" and {self.clients}" if self.clients else "")
            if asked:
                raise ConfigError(
                    f"--tls_key must be without a password, found {self.key} with one: type openssl pkey -in it -out another"
                ) from None
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"--tls_key must belong to the first certificate of {self.chain}, found another in {self.key}") from None
            raise ConfigError(f"TLS needs whole PEM files, found damage in one of {what}: copy them again") from None
        return context


def _check_pem(file: Path, option: str, word: str) -> None:
    """Raise ConfigError for a file that cannot be read, or holds no such block of PEM."""
    try:
        text = file.read_text("latin-1")
    except OSError as error:
        raise ConfigError(f"{option} must name a PEM file that can be read, found {file}: {error.strerror}") from None
    if word not in text:
        what = "certificate" if word.startswith("CERT") else "private key"
        raise ConfigError(f"{option} must name a PEM file with a {what} (a block -----BEGIN ... {word}), found none in {file}")


def url_of(bound: socket.socket, encrypted: bool = False) -> str:
    """Return the URL for a client on this machine, `ws://HOST:PORT` or `wss://HOST:PORT`."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:  # every interface: the loopback one is the one that this machine can always reach
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"{'wss' if encrypted else 'ws'}://{f'[{host}]' if address.version == 6 else host}:{port}"


def make_server(app: Starlette, options: limits.ServingLimits, certificates: Certificates | None = None) -> uvicorn.Server:
    """Configure uvicorn for `app`: frames and sockets bounded, no compression (images do not shrink, and it costs milliseconds)."""
    sockets, front, channel = limits.bounded_protocols(options.max_connections)
    config = uvicorn.Config(
        app,
        ws=channel,
        ws_max_size=options.max_frame_bytes,
        ws_per_message_deflate=False,
        http=front,
        loop="asyncio",
        lifespan="on",
        backlog=limits.BACKLOG,
        callback_notify=sockets.sweep,
        timeout_notify=1,
        proxy_headers=False,  # a client could give another's address
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_LEAVE,
        ssl_context_factory=None if certificates is None else lambda *_: certificates.context(),
    )
    return _DrainingServer(config, app)


@final
class _DrainingServer(uvicorn.Server):
    """A server that answers the requests that arrived before it closes its connections."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as uvicorn does, but give a TLS handshake as little time as any other silent socket."""
        await self.lifespan.startup()

        def protocol() -> asyncio.Protocol:
            make: Any = self.config.http_protocol_class
            made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
            return made

        loop, encryption = asyncio.get_running_loop(), self.config.ssl
        limit = None if encryption is None else limits.SILENT_SECONDS
        self.servers = [
            await loop.create_server(protocol, sock=sock, ssl=encryption, backlog=limits.BACKLOG, ssl_handshake_timeout=limit)
            for sock in sockets or []
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, drain, and end as uvicorn does."""
        for server in self.servers:
            server.close()
        try:
            await asyncio.wait_for(drain(self._app), SECONDS_TO_DRAIN)
        except TimeoutError:
            limits.logger.error("some requests were not answered within %g s of the end: they are dropped", SECONDS_TO_DRAIN)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end on a signal."""
        end_within(SECONDS_TO_END)
        super().handle_exit(sig, frame)


def end_within(seconds: float) -> None:
    """Make this process end after `seconds` with exit code 1, even if a policy holds the interpreter, unless it ends before."""
    faulthandler.dump_traceback_later(seconds, exit=True)


async def serve(server: uvicorn.Server, app: Starlette, bound: socket.socket, announce: Callable[[float], None]) -> None:
    """Warm up, open the port, call `announce` with the warm-up's seconds, and serve until `server.should_exit` or a signal.

    SIGHUP loads the bundle again. Raises ServingError when the warm-up fails, or when another process opened the port in the meantime.
    """
    seconds = await warm_up(app)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    swaps: list[asyncio.Task[None]] = []  # a loop keeps no reference to a task
    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: swaps.append(asyncio.create_task(reload(app))))
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
    end_within(SECONDS_TO_END)
    raise KeyboardInterrupt


def _bind_fault(host: str, port: int, error: OSError) -> ServingError:
    if error.errno == errno.EADDRINUSE:
        return ServingError(
            f"port {port} on {host} is in use: stop the process that holds it, or choose another with --port (0 takes a free one)"
        )
    return ServingError(f"cannot listen on {host} port {port} ({error.strerror}): give another --host or --port")
