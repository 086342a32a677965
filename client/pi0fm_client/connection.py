"""Connect to a policy server: the handshake, the first frame, retries.

Owns: which faults are tried again, the pauses between tries, one line for each way in which an address is no policy server. Does not
know: observations, replies (client.py).
"""

import socket
import struct
import sys
import time
from dataclasses import dataclass, field

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from pi0fm_client.errors import ServingError
from pi0fm_client.wire import MAX_FRAME_BYTES

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
_STATUS_TRY_AGAIN = (502, 503, 504)  # a server that warms up, or a proxy before one


@dataclass(frozen=True)
class Address:
    """URL and key of a server, with the time-outs of one frame and of a connection."""

    url: str
    token: str | None = field(repr=False)
    timeout_seconds: float
    connect_timeout_seconds: float


class _TryAgainError(Exception):
    """The server cannot be reached now, but may be later."""


def connect_to(address: Address) -> tuple[ClientConnection, bytes]:
    """Return a connection and the server's first frame; retry until the time-out while the server is not there yet.

    Raises ServingError that names the address and what to check.
    """
    deadline = time.monotonic() + address.connect_timeout_seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return _receive_metadata(address, _handshake(address, max(0.1, deadline - time.monotonic())))
        except _TryAgainError as error:
            if time.monotonic() + pause >= deadline:
                waited = f"{address.connect_timeout_seconds:g} s"
                fault = f"no policy server at {address.url} in {waited} ({error})"
                raise ServingError(f"{fault}: check host and port, and that the server says ready") from None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def reason(error: ConnectionClosed) -> str:
    """Return the close code and reason of an ended connection."""
    return f"code {error.rcvd.code} {error.rcvd.reason}".strip() if error.rcvd is not None else "no closing frame"


def send_timed_out(error: ConnectionClosed) -> bool:
    """Whether a connection ended because the peer read nothing for `timeout_seconds`: the socket's send time-out gives EAGAIN."""
    return isinstance(error.__cause__, BlockingIOError)


def _handshake(address: Address, seconds: float) -> ClientConnection:
    try:
        # Entered by hand, because the connection outlives this function; calling connect() alone is deprecated by websockets.
        connection = connect(
            address.url,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            additional_headers={} if address.token is None else {"Authorization": f"Api-Key {address.token}"},
            open_timeout=seconds,
            close_timeout=1.0,  # a server that hangs must not hold up a robot that leaves
            proxy=None,
        ).__enter__()
    except InvalidURI:
        raise ServingError(f"{address.url!r} is no WebSocket address: write ws://HOST:PORT") from None
    except InvalidHandshake as error:
        raise _fault_of_handshake(address.url, error) from None
    except OSError as error:  # refused, unreachable, unknown host, timed out
        raise _TryAgainError(error.strerror or str(error) or type(error).__name__) from None
    _limit_send_time(connection.socket, address.timeout_seconds)
    return connection


def _receive_metadata(address: Address, connection: ClientConnection) -> tuple[ClientConnection, bytes]:
    """Return the connection and the metadata frame, which the server sends first."""
    try:
        greeting = connection.recv(timeout=address.timeout_seconds)
    except ConnectionClosed as error:
        raise _TryAgainError(f"it closed the connection: {reason(error)}") from None
    except TimeoutError:
        connection.close()
        raise ServingError(
            f"{address.url} sent no metadata in {address.timeout_seconds:g} s: it is no policy server, or it hangs"
        ) from None
    if isinstance(greeting, str):
        connection.close()
        raise ServingError(f"{address.url} is no policy server: its first frame is text, {greeting[:60]!r}; check host and port")
    return connection, greeting


def _fault_of_handshake(url: str, error: InvalidHandshake) -> Exception:
    """Return the exception for a failed handshake: one to retry, or one for the user."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status in _STATUS_TRY_AGAIN:
            return _TryAgainError(f"HTTP {status}")
        if status in (401, 403):
            return ServingError(f"{url} refused the token (HTTP {status}): give the server's key as token=")
        return ServingError(f"{url} is no policy server: it answers a WebSocket handshake with HTTP {status}; check host, port and path")
    if isinstance(error.__cause__, EOFError | OSError):
        return _TryAgainError("it closed the connection during the handshake")
    return ServingError(f"{url} is no policy server: {' '.join(str(error).split())[:120]}; check host and port")


def _limit_send_time(connected: socket.socket, seconds: float) -> None:
    """Make a send fail after `seconds` when the peer reads no more; websockets only limits receiving."""
    if sys.platform == "win32":
        value: bytes | int = int(seconds * 1000)
    else:
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
