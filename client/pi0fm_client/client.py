"""Ask a policy server for actions from the robot's computer.

Owns: requests, time-outs, reconnection, and `RemotePolicy`, which stands for a local policy. Does not know: torch, how the server works,
how a connection is made (connection.py). It also speaks to openpi's servers.

    infer  --send--> reply in time             -> an ActionChunk
                     text                      -> ServingError with the server's line
                     nothing in time           -> ServingError; the connection is dropped, a late reply could pass for the next one
                     connection lost           -> connect again (0.1 s, 0.2 s, .. 2 s apart), send once more; lost again -> ServingError
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from pi0fm_client import connection, wire
from pi0fm_client.errors import ObservationError, ServingError
from pi0fm_client.types import ActionChunk, Observation

_CLOSE_TOO_BIG = 1009


@final
class PolicyClient:
    """One connection to a policy server, for one thread at a time.

    url: `ws://HOST:PORT` or `wss://...`; no proxy of the environment is used. token: the server's key.
    timeout_seconds: for one answer. connect_timeout_seconds: for a connection, during which a server may still be starting.
    reconnect: connect again, and send once more, when the connection is lost; an inference changes nothing on a server, so that is safe.
    Raises ServingError when no policy server can be reached in time; it connects at once, so that `metadata` is known.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 10.0,
        connect_timeout_seconds: float = 60.0,
        reconnect: bool = True,
    ) -> None:
        self._url, self._reconnect = url, reconnect
        self._timeout_seconds = timeout_seconds
        self._address = connection.Address(url, token, timeout_seconds, connect_timeout_seconds)
        self._connection: ClientConnection | None
        self._connection, self._greeting = connection.connect_to(self._address)
        self._metadata = self._decode(self._greeting)
        self._open = True

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the policy, as the server sent them when the connection was made."""
        return self._metadata

    def infer(self, observation: Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """Ask for the chunk of one observation; `timings` holds `infer_ms` of the policy, `server_ms` and `round_trip_ms`.

        observation: the server's own keys to arrays, text and numbers. noise_seed: >= 0, the same seed and observation give the same
        chunk (openpi's servers ignore it). `previous_total_ms` is there from the second reply: the server's time for the one before.
        Raises ObservationError for what cannot be sent, ServingError for everything that goes wrong on the way or on the server.
        """
        began = time.perf_counter()
        frame = wire.pack(observation if noise_seed is None else {**observation, "noise_seed": int(noise_seed)})
        limit = self._metadata.get("max_frame_bytes", wire.MAX_FRAME_BYTES)
        if len(frame) > limit:
            raise ObservationError(f"an observation may take {limit} bytes on {self._url}, found {len(frame)}: send smaller images")
        reply = self._exchange(frame)
        if isinstance(reply, str):
            self._disconnect()
            raise ServingError(f"{self._url} answered: {reply}")
        return self._chunk(self._decode(reply), began)

    def close(self) -> None:
        """Close the connection; the client cannot be used afterwards."""
        self._open = False
        self._disconnect()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, frame: bytes) -> bytes | str:
        """Send and receive; after a lost connection, connect and try once more."""
        if not self._open:
            raise ServingError(f"this client of {self._url} was closed: make a new PolicyClient")
        if self._connection is not None:
            try:
                return self._send_and_receive(self._connection, frame)
            except ConnectionClosed as error:
                self._disconnect()
                self._raise_if_too_big(error, frame)
                if not self._reconnect:
                    raise ServingError(
                        f"{self._url} closed the connection ({connection.reason(error)}): look at the server's log"
                    ) from None
        elif not self._reconnect:
            raise ServingError(f"the connection to {self._url} is gone and reconnect is off: make a new PolicyClient")
        fresh, greeting = connection.connect_to(self._address)
        if greeting != self._greeting:
            fresh.close()
            raise ServingError(f"{self._url} now serves another policy: make a new PolicyClient, and reset the robot first")
        self._connection = fresh
        try:
            return self._send_and_receive(fresh, frame)
        except ConnectionClosed as error:
            self._disconnect()
            self._raise_if_too_big(error, frame)
            raise ServingError(
                f"{self._url} closed the connection twice for one observation ({connection.reason(error)}): look at its log"
            ) from None

    def _send_and_receive(self, open_connection: ClientConnection, frame: bytes) -> bytes | str:
        deadline = time.monotonic() + self._timeout_seconds
        try:
            open_connection.send(frame)
            return open_connection.recv(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            pass
        except ConnectionClosed as error:
            if not connection.send_timed_out(error):
                raise
        self._disconnect()
        raise ServingError(
            f"{self._url} gave no answer in {self._timeout_seconds:g} s: see GET /healthz and its load, or raise timeout_seconds"
        )

    def _chunk(self, reply: Mapping[str, Any], began: float) -> ActionChunk:
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind not in "fiu":
            found = f"an array of shape {list(actions.shape)}" if isinstance(actions, np.ndarray) else f"the keys {sorted(reply)[:8]}"
            raise ServingError(f"{self._url} must answer with actions [H, A], found {found}: is it a policy server?")
        server_timing, policy_timing = (dict(reply.get(name) or {}) for name in ("server_timing", "policy_timing"))
        server_ms = server_timing.get("infer_ms", 0.0)
        timings = {"infer_ms": server_ms, "server_ms": server_ms, **policy_timing}
        if "prev_total_ms" in server_timing:
            timings["previous_total_ms"] = server_timing["prev_total_ms"]
        return ActionChunk(np.asarray(actions, np.float32), timings | {"round_trip_ms": (time.perf_counter() - began) * 1e3})

    def _decode(self, frame: bytes) -> dict[str, Any]:
        try:
            return wire.unpack(frame)
        except ObservationError as error:
            self._disconnect()
            raise ServingError(f"{self._url} is no policy server, or speaks another protocol: {error}") from None

    def _raise_if_too_big(self, error: ConnectionClosed, frame: bytes) -> None:
        if error.rcvd is not None and error.rcvd.code == _CLOSE_TOO_BIG:
            raise ObservationError(f"{self._url} takes no frame of {len(frame)} bytes: send smaller images") from None

    def _disconnect(self) -> None:
        lost, self._connection = self._connection, None
        if lost is not None:
            lost.close()


@final
class RemotePolicy:
    """A `pi0fm_client.types.Policy` on a server: a batch is sent over up to `connections` sockets, so the server infers it together.

    url, token, timeout_seconds, connect_timeout_seconds: as for PolicyClient. Raises what PolicyClient raises, and ServingError when
    the metadata does not say which keys an observation has (an openpi server's does not: use PolicyClient there).
    """

    def __init__(
        self,
        url: str,
        *,
        connections: int = 8,
        token: str | None = None,
        timeout_seconds: float = 10.0,
        connect_timeout_seconds: float = 60.0,
    ) -> None:
        self._options: dict[str, Any] = {
            "token": token,
            "timeout_seconds": timeout_seconds,
            "connect_timeout_seconds": connect_timeout_seconds,
        }
        self._url = url
        self._clients = [PolicyClient(url, **self._options)]
        self._threads = ThreadPoolExecutor(max_workers=max(1, connections), thread_name_prefix="pi0fm-remote")
        self._connections = max(1, connections)
        missing = [name for name in ("cameras", "state_key") if name not in self.metadata]
        if missing:
            self.close()
            raise ServingError(f"{url} does not say {' and '.join(missing)} in its metadata: use PolicyClient with the server's own keys")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the policy, as the server sent them."""
        return self._clients[0].metadata

    def infer(self, observation: Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """Ask for the chunk of one observation, as `PolicyClient.infer`."""
        return self._clients[0].infer(observation, noise_seed)

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int | None] | None = None) -> list[ActionChunk]:
        """Return one chunk for each observation, in order, with the `timings` of `PolicyClient.infer`."""
        if noise_seeds is not None and len(noise_seeds) != len(observations):
            raise ObservationError(f"a batch needs one noise seed for each observation, found {len(noise_seeds)} for {len(observations)}")
        seeds = [None] * len(observations) if noise_seeds is None else list(noise_seeds)
        requests = [(self._message(observation), seed) for observation, seed in zip(observations, seeds, strict=True)]
        width = min(self._connections, len(requests))
        while len(self._clients) < width:
            self._clients.append(PolicyClient(self._url, **self._options))
        shares = [self._threads.submit(_infer_all, self._clients[lane], requests[lane::width]) for lane in range(width)]
        faults = [fault for share in shares if (fault := share.exception()) is not None]
        if faults:
            raise faults[0]
        return [shares[index % width].result()[index // width] for index in range(len(requests))]

    def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            client.close()
        self._threads.shutdown(wait=False)

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _message(self, observation: Observation) -> dict[str, Any]:
        keys: Mapping[str, str] = self.metadata["cameras"]
        unknown = sorted(set(observation.images) - set(keys))
        if unknown:
            raise ObservationError(f"the policy on {self._url} has the cameras {sorted(keys)}, found {unknown}: rename or leave them out")
        images = {keys[name]: image for name, image in observation.images.items()}
        return {**images, self.metadata["state_key"]: observation.state, "prompt": observation.prompt}


def _infer_all(client: PolicyClient, requests: Sequence[tuple[Mapping[str, Any], int | None]]) -> list[ActionChunk]:
    return [client.infer(message, noise_seed) for message, noise_seed in requests]
