"""One connection to a policy server: the handshake, the first frame, retries, one request after another.

Owns: which faults are retried, the pauses between tries, unrequested frames, one line for each way in which an address is no policy
server. Does not know: observations, replies (client.py).
"""

import asyncio
import logging
import os
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from pi0fm_client.errors import ServingError
from pi0fm_client.wire import MAX_FRAME_BYTES

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
UNKNOWN_HOST_SECONDS = 5.0  # without an address for a host's name until that is a fault, in place of a network that is not up yet
TOLD_SECONDS = 1.0  # without an answer before a line says that the client waits, and how long
CLOSE_SECONDS = 1.0  # a server that hangs must not hold up a robot that leaves
_STATUS_TRY_AGAIN = (502, 503, 504)  # a server that warms up, or a proxy before one
_CLOSE_TOO_BIG = 1009
_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH = 62, 64  # of OpenSSL's X509_V_ERR
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """URL and key of a server, the longest wait for its first frame; tls: whom to trust at wss://, None for the system's authorities."""

    url: str
    token: str | None = field(repr=False)
    greeting_seconds: float
    tls: ssl.SSLContext | None = None


class LostError(Exception):
    """The connection is gone, or can no longer be trusted. too_big: the server takes no frame of this size."""

    def __init__(self, reason: str, too_big: bool = False) -> None:
        super().__init__(reason)
        self.too_big = too_big


class _TryAgainError(Exception):
    """The server cannot be reached now, but may be later. unknown: its host's name has no address."""

    def __init__(self, reason: str, unknown: bool = False) -> None:
        super().__init__(reason)
        self.unknown = unknown


@final
class Connection:
    """An open connection and the server's first frame. A request is sent, then its reply received; anything else loses the connection."""

    def __init__(self, websocket: ClientConnection, greeting: bytes) -> None:
        self.greeting, self._websocket = greeting, websocket
        # A frame is always awaited, so that an unrequested one is noticed before the next request.
        self._next = _frame_of(websocket)

    async def send(self, frame: bytes) -> None:
        """Send a request. Raises LostError for a lost connection, and for one with an unrequested frame."""
        for _ in range(3):  # the event loop's passes from a readable socket to a finished recv()
            await asyncio.sleep(0)
        if self._next.done():
            await self.receive()
            raise LostError("it sent a frame that no request asked for")
        try:
            await self._websocket.send(frame)
        except ConnectionClosed as error:
            raise _lost(error) from None

    async def receive(self) -> bytes | str:
        """Return the next frame. Raises LostError when the connection ends first."""
        try:
            frame = await self._next
        except ConnectionClosed as error:
            raise _lost(error) from None
        self._next = _frame_of(self._websocket)
        return frame

    def drop(self) -> None:
        """End the connection at once, without a closing handshake; a reply that is on its way is never read."""
        self._next.cancel()
        self._websocket.transport.abort()

    async def close(self) -> None:
        """Say goodbye, within CLOSE_SECONDS."""
        await self._websocket.close()
        self.drop()


async def connect_to(address: Address, seconds: float, first: bool = False) -> Connection:
    """Connect and receive the first frame; try again for `seconds` while the server is not there yet.

    first: this client has not reached the server before: log after TOLD_SECONDS that it still waits, and take a host's name that has had
    no address for UNKNOWN_HOST_SECONDS as mistyped. One that had an address before is tried for all of `seconds`, since then the network
    is gone; so is one that the name server cannot tell of now. Raises ServingError that names the address and the likely cause.
    """
    faults, may_be_mistyped = ["it does not answer"], first

    def say() -> None:
        logger.warning("no answer from %s yet (%s): trying for %g s", address.url, faults[-1], seconds)

    timer = asyncio.get_running_loop().call_later(TOLD_SECONDS, say) if first and seconds > TOLD_SECONDS else None
    began = time.monotonic()
    deadline, pause = began + seconds, FIRST_PAUSE_SECONDS
    try:
        while (left := deadline - time.monotonic()) > 0:
            try:
                websocket = await asyncio.wait_for(_handshake(address), left)
                return Connection(websocket, await _greeting(address, websocket, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                break
            except _TryAgainError as error:
                faults.append(str(error))
                may_be_mistyped = may_be_mistyped and error.unknown
                if may_be_mistyped and time.monotonic() - began >= UNKNOWN_HOST_SECONDS:
                    raise _fault_of_name(address.url, str(error)) from None
            if time.monotonic() + pause >= deadline:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    finally:
        if timer is not None:
            timer.cancel()
    raise ServingError(
        f"no policy server at {address.url} in {seconds:g} s ({faults[-1]}): check host and port, and that the server says ready"
    ) from None


async def _handshake(address: Address) -> ClientConnection:
    encryption: dict[str, Any] = {} if address.tls is None else {"ssl": address.tls}
    try:
        return await connect(
            str(address.url),
            compression=None,
            max_size=MAX_FRAME_BYTES,
            max_queue=2,
            additional_headers={} if address.token is None else {"Authorization": f"Api-Key {address.token}"},
            open_timeout=None,
            ping_interval=None,  # openpi's server answers no ping while it infers; every request has its own time-out
            close_timeout=CLOSE_SECONDS,
            proxy=None,
            **encryption,
        )
    except ssl.SSLError as error:
        raise _fault_of_tls(address.url, error) from None
    except OSError as error:  # refused, unreachable, unknown host, timed out
        if isinstance(error, ConnectionResetError) and address.url.startswith("wss:"):
            raise await _fault_of_silence(address) from None
        of_name = isinstance(error, socket.gaierror)  # whose numbers are not the system's
        known = os.strerror(error.errno) if error.errno and error.errno > 0 and not of_name else error.strerror  # asyncio has other words
        unknown = of_name and error.errno != socket.EAI_AGAIN
        raise _TryAgainError(known or str(error) or type(error).__name__, unknown) from None
    except InvalidHandshake as error:
        if isinstance(error.__cause__, (EOFError, OSError)):
            raise await _fault_of_silence(address) from None
        raise _fault_of_handshake(address.url, error) from None
    except (InvalidURI, ValueError):  # ValueError: a port or a host name that no address can have
        raise ServingError(f"{address.url!r} is no WebSocket address: write ws://HOST:PORT") from None
    except WebSocketException as error:
        raise ServingError(f"{address.url} is no policy server: {_one_line(error)}; check host and port") from None


async def _greeting(address: Address, websocket: ClientConnection, left: float) -> bytes:
    """Return the metadata frame, which the server sends first; the connection is dropped unless it comes."""
    try:
        greeting = await asyncio.wait_for(websocket.recv(), min(left, address.greeting_seconds))
        if isinstance(greeting, str):
            raise ServingError(f"{address.url} is no policy server: its first frame is text, {greeting[:60]!r}; check host and port")
    except BaseException as error:
        websocket.transport.abort()
        if isinstance(error, ConnectionClosed):
            raise _TryAgainError(f"it closed the connection: {_lost(error)}") from None
        if isinstance(error, asyncio.TimeoutError):
            seconds = min(left, address.greeting_seconds)
            raise ServingError(f"{address.url} sent no metadata in {seconds:.2g} s: it is no policy server, or it hangs") from None
        raise
    return greeting


def _fault_of_handshake(url: str, error: InvalidHandshake) -> Exception:
    """Return the exception for a failed handshake: one to retry, or one for the user."""
    if not isinstance(error, InvalidStatus):
        return ServingError(f"{url} is no policy server: {_one_line(error)}; check host and port")
    status, line = error.response.status_code, _one_line((error.response.body or b"")[:1000].decode("utf-8", "replace"))
    found = f"HTTP {status}: {line}" if line.isprintable() and line[:1] not in ("", "<", "{") else f"HTTP {status}"
    if status in _STATUS_TRY_AGAIN:
        return _TryAgainError(found)
    if status == 401:
        return ServingError(f"{url} refused the token ({found}): give the server's key as token=, to a command in $PI0FM_TOKEN")
    if status in (403, 404):
        path = urlsplit(url).path
        wrong = f"pi0fm and openpi serve at /, leave {path} out" if path.strip("/") else "check host and port, and who may connect there"
        return ServingError(f"{url} takes no WebSocket there ({found}): {wrong}")
    return ServingError(f"{url} is no policy server: it answers a WebSocket handshake with {found}; check host, port and path")


def _fault_of_name(url: str, reason: str) -> ServingError:
    host = urlsplit(url).hostname
    return ServingError(
        f"{host} has had no address for {UNKNOWN_HOST_SECONDS:g} s ({reason.lower()}): correct the name in {url}, or write the server's "
        "number, ws://192.168.1.20:8000"
    )


def _fault_of_tls(url: str, error: ssl.SSLError) -> ServingError:
    """Return the line for a TLS handshake that failed; none of its causes passes with time."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH):
            host = urlsplit(url).hostname
            return ServingError(f"{url} has a certificate for another name than {host}: connect by the name in it, or make one for {host}")
        file = os.environ.get("SSL_CERT_FILE")
        if file is not None and not Path(file).is_file():
            return ServingError(f"$SSL_CERT_FILE must name the PEM file of the authorities to trust, found no file {file}: correct it")
        return ServingError(
            f"{url} has a certificate that is not trusted here ({error.verify_message}): put the file of its authority in $SSL_CERT_FILE, "
            "or give tls=ssl.create_default_context(cafile=FILE)"
        )
    if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return _fault_of_plain(url)
    reason = (error.reason or _one_line(error)).replace("_", " ").lower()
    return ServingError(
        f"{url} and this client found no common TLS ({reason}): the server may ask for a client's certificate, which tls= gives, or the "
        "two know no common version"
    )


async def _fault_of_silence(address: Address) -> Exception:
    """Return the exception for a server that closed instead of answering a handshake: TLS that does not fit, or a server that starts."""
    encrypted = address.url.startswith("wss:")
    try:
        if not encrypted:
            anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # only asked whether it speaks TLS; nothing is sent
            anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
            await _first_bytes(address.url, anyone, None)
            return ServingError(f"{address.url} speaks TLS: write wss://")
        if await _first_bytes(address.url, address.tls or ssl.create_default_context()) == b"":  # asked nothing yet, a server waits
            return ServingError(f"{address.url} ends TLS at once: it asks for a client's certificate that it trusts; give tls= with one")
    except ssl.SSLError as error:
        if encrypted:
            return _fault_of_tls(address.url, error)
    except (OSError, asyncio.TimeoutError):
        pass
    with suppress(OSError, asyncio.TimeoutError):
        if encrypted and (await _first_bytes(address.url, None, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/"):
            return _fault_of_plain(address.url)
    return _TryAgainError("it closed the connection during the handshake")


async def _first_bytes(url: str, context: ssl.SSLContext | None, request: bytes | None = b"") -> bytes:
    """Return the first bytes that a server sends after `request`; with None read nothing. Raises OSError, ssl.SSLError, TimeoutError."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    reader, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, port, ssl=context), CLOSE_SECONDS)
    try:
        writer.write(request or b"")
        return b"" if request is None else await asyncio.wait_for(reader.read(8), CLOSE_SECONDS)
    finally:
        writer.transport.abort()


def _fault_of_plain(url: str) -> ServingError:
    return ServingError(f"{url} speaks no TLS: write ws://, or start the server with a certificate")


def _lost(error: ConnectionClosed) -> LostError:
    """Name the close code and reason of an ended connection."""
    if error.rcvd is None:
        return LostError("no closing frame")
    return LostError(f"code {error.rcvd.code} {_one_line(error.rcvd.reason)}".strip(), error.rcvd.code == _CLOSE_TOO_BIG)


def _one_line(fault: object) -> str:
    return " ".join(str(fault).split())[:120]


def _frame_of(websocket: ClientConnection) -> "asyncio.Future[bytes | str]":
    """Await the next frame from now on. Its error is retrieved here, since asyncio logs one that is never retrieved."""
    frame = asyncio.ensure_future(websocket.recv())
    frame.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return frame
