"""Reaching a policy server: the handshake, its first frame, and which faults pass with time.

Owns: trying again with a bounded pause, and one clear line for every way in which an address is no policy server. Does not know:
observations, replies (client.py).
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
_STATUS_LATER = (502, 503, 504)  # a server that warms up, or a proxy before one


@dataclass(frozen=True)
class Address:
    """Where a server is, its key, and the patience: for one frame, and for a connection."""

    url: str
    token: str | None = field(repr=False)
    timeout_seconds: float
    connect_timeout_seconds: float


class _NotYetError(Exception):
    """No server yet, for a reason that may pass."""


def reach(address: Address) -> tuple[ClientConnection, bytes]:
    """A connection and the server's first frame; a server that is not there yet is tried again until the time is over.

    Raises ServingError that names the address and what to check.
    """
    deadline = time.monotonic() + address.connect_timeout_seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return _greeted(address, _handshake(address, max(0.1, deadline - time.monotonic())))
        except _NotYetError as error:
            if time.monotonic() + pause >= deadline:
                waited = f"{address.connect_timeout_seconds:g} s"
                fault = f"no policy server at {address.url} in {waited} ({error})"
                raise ServingError(f"{fault}: check host and port, and that the server says ready") from None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def reason(error: ConnectionClosed) -> str:
    """Why a connection ended, in a few words."""
    return f"code {error.rcvd.code} {error.rcvd.reason}".strip() if error.rcvd is not None else "no closing frame"


def send_timed_out(error: ConnectionClosed) -> bool:
    """Whether a connection ended because the peer read nothing for `timeout_seconds`: the socket's bound on sends gives EAGAIN."""
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
        raise _explain(address.url, error) from None
    except OSError as error:  # refused, unreachable, unknown host, timed out
        raise _NotYetError(error.strerror or str(error) or type(error).__name__) from None
    _bound_sends(connection.socket, address.timeout_seconds)
    return connection


def _greeted(address: Address, connection: ClientConnection) -> tuple[ClientConnection, bytes]:
    """The connection with the metadata that the server sends first."""
    try:
        greeting = connection.recv(timeout=address.timeout_seconds)
    except ConnectionClosed as error:
        raise _NotYetError(f"it closed the connection: {reason(error)}") from None
    except TimeoutError:
        connection.close()
        raise ServingError(
            f"{address.url} sent no metadata in {address.timeout_seconds:g} s: it is no policy server, or it hangs"
        ) from None
    if isinstance(greeting, str):
        connection.close()
        raise ServingError(f"{address.url} is no policy server: its first frame is text, {greeting[:60]!r}; check host and port")
    return connection, greeting


def _explain(url: str, error: InvalidHandshake) -> Exception:
    """The fault of a handshake: to be tried again, or to be told."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status in _STATUS_LATER:
            return _NotYetError(f"HTTP {status}")
        if status in (401, 403):
            return ServingError(f"{url} refused the token (HTTP {status}): give the server's key as token=")
        return ServingError(f"{url} is no policy server: it answers a WebSocket handshake with HTTP {status}; check host, port and path")
    if isinstance(error.__cause__, EOFError | OSError):
        return _NotYetError("it closed the connection during the handshake")
    return ServingError(f"{url} is no policy server: {' '.join(str(error).split())[:120]}; check host and port")


def _bound_sends(connected: socket.socket, seconds: float) -> None:
    """Let a send to a peer that reads no more fail after `seconds`; websockets bounds only what it receives."""
    if sys.platform == "win32":
        value: bytes | int = int(seconds * 1000)
    else:
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
