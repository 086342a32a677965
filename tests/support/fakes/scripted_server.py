"""A policy server that follows a test's script, on the websockets library, independent of pi0fm's server."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from websockets.sync.server import ServerConnection, serve

from pi0fm_client import wire


@contextmanager
def websocket_server(handler: Callable[[ServerConnection], None], port: int = 0) -> Iterator[str]:
    """Serve each connection with `handler`; gives the URL."""
    with serve(handler, "127.0.0.1", port, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join(10)


def answer(request: bytes | str, **extra: Any) -> bytes:
    """A reply whose actions [2, 1] are the request's state, and that repeats its number when it has one."""
    assert isinstance(request, bytes)
    message = wire.unpack(request)
    number = {wire.REQUEST_ID: message[wire.REQUEST_ID]} if wire.REQUEST_ID in message else {}
    return wire.pack({"actions": np.full((2, 1), message["state"], np.float32), **number, **extra})
