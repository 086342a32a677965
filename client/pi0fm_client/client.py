"""Ask a policy server for actions from the robot's computer.

Owns: requests, their one deadline, reconnection, the checks of a reply, and `RemotePolicy`, which stands for a local policy. Does not
know: torch, how the server works, how a connection is made (connection.py). It also speaks to openpi's servers.

    infer  --send--> its reply in time         -> an ActionChunk
                     refused by its number     -> ServingError; the connection goes on
                     text, or a wrong reply    -> ServingError; the connection is dropped
                     nothing in time           -> ServingError; the connection is dropped, a late reply could pass for the next one
                     Ctrl-C, cancellation      -> the connection is dropped, for the same reason
                     connection lost           -> connect again, send once more if time is left; lost again -> ServingError

All network work is done by an event loop, `AsyncPolicyClient`. `PolicyClient` runs one in a thread, where no Ctrl-C of the caller's can
interrupt a request half-way.
"""

import asyncio
import concurrent.futures
import math
import numbers
import secrets
import ssl
import threading
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar, final

import numpy as np

from pi0fm_client import arguments, wire
from pi0fm_client.connection import Address, Connection, LostError, connect_to
from pi0fm_client.errors import ConfigError, ObservationError, ServingError
from pi0fm_client.types import ActionChunk, Observation

Result = TypeVar("Result")


@final
class AsyncPolicyClient:
    """One connection to a policy server, for asyncio; requests of several tasks take turns.

    url: `ws://HOST:PORT` or `wss://...`; no proxy of the environment is used. token: the server's key.
    timeout_seconds: for one `infer`, all it does included: waiting its turn, connecting again, sending, receiving.
    connect_timeout_seconds: for `connect`, during which a server may still be starting; a host's name without an address is a fault
    after 5 s, until it has had one.
    reconnect: connect again, and send once more, when the connection is lost; an inference changes nothing on a server, so that is safe.
    tls: of a wss:// address, whom to trust and which certificate to show (`--tls_clients`), None: the system's authorities.
    Raises ConfigError for an argument that cannot be used, ServingError for a text that is no address.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 10.0,
        connect_timeout_seconds: float = 60.0,
        reconnect: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_seconds = arguments.seconds("timeout_seconds", timeout_seconds)
        self._connect_seconds = arguments.seconds("connect_timeout_seconds", connect_timeout_seconds)
        if not isinstance(url, str) or not url.startswith(("ws://", "wss://")):
            raise ServingError(f"{arguments.shown(url)} is no WebSocket address: write ws://HOST:PORT")
        self._url, self._reconnect = url, arguments.switch("reconnect", reconnect)
        tls = arguments.encryption(tls, url)
        self._address = Address(url, arguments.token(token), self._timeout_seconds, tls)
        self._session, self._requests = secrets.token_hex(8), 0
        self._lock = asyncio.Lock()
        self._connection: Connection | None = None
        self._greeting: bytes | None = None
        self._metadata: dict[str, Any] = {}
        self._extensions: frozenset[str] = frozenset()
        self._shape: tuple[int, ...] | None = None
        self._open = True

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the policy, as the server sent them when the first connection was made."""
        return self._metadata

    async def connect(self) -> None:
        """Connect, so that `metadata` is known. Raises ServingError when no policy server can be reached in time."""
        async with self._lock:
            await self._connected(self._connect_seconds)

    async def infer(self, observation: Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """Ask for the chunk of one observation; `timings` holds `infer_ms` of the policy, `server_ms` and `round_trip_ms`.

        observation: the server's own keys to arrays, text and numbers; and keys that the server's `extensions` name (wire.py).
        DEADLINE_MS among them shortens the time-out of this request with any server. noise_seed: >= 0, the same seed and observation
        give the same chunk (openpi's servers ignore it). `previous_total_ms` is there from the second reply: the server's time for the
        one before. Raises ObservationError for an observation that cannot be sent, ServingError for every fault on the way or on
        the server, both within the time-out.
        """
        began = time.monotonic()
        message, seconds = self._message(observation, noise_seed)
        try:
            return await asyncio.wait_for(self._infer(message, began, seconds), seconds)
        except asyncio.TimeoutError:
            raise ServingError(
                f"{self._url} gave no answer in {seconds:g} s: see GET /healthz and its load, or raise timeout_seconds"
            ) from None

    async def close(self) -> None:
        """Close the connection; a request that waits fails, and the client cannot be used afterwards."""
        self._open = False
        if self._connection is not None:
            await self._connection.close()

    async def __aenter__(self) -> "AsyncPolicyClient":
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _message(self, observation: Mapping[str, Any], noise_seed: int | None) -> tuple[dict[str, Any], float]:
        """Return the request without the keys that each sending adds, and the seconds that it may take."""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation must be a flat map of keys, found {type(observation).__name__}: send {{'prompt': ...}}")
        message, seconds = dict(observation), self._timeout_seconds
        if wire.DEADLINE_MS in message:
            try:
                told = arguments.number(wire.DEADLINE_MS, message.pop(wire.DEADLINE_MS), "2000", 0.0, 1e3 * arguments.LONGEST_SECONDS)
            except ConfigError as error:
                raise ObservationError(str(error)) from None
            seconds = min(seconds, 1e-3 * told)
        if noise_seed is not None:
            if isinstance(noise_seed, bool) or not isinstance(noise_seed, numbers.Integral) or not 0 <= noise_seed < 2**63:
                raise ObservationError(f"noise_seed must be a whole number in [0, 2**63), found {str(noise_seed)[:40]}: or leave it out")
            message["noise_seed"] = int(noise_seed)
        return message, seconds

    async def _infer(self, message: Mapping[str, Any], began: float, seconds: float) -> ActionChunk:
        deadline = began + seconds
        async with self._lock:
            for last in (False, True):
                left = deadline - time.monotonic()
                if left <= 0:  # spent waiting for another caller
                    raise asyncio.TimeoutError
                connection = await self._connected(left)
                number, frame = self._pack(message, deadline)
                try:
                    await connection.send(frame)
                    reply = await self._reply(connection, number)
                    if wire.REFUSED not in reply:
                        return self._chunk(reply, began)
                except LostError as error:
                    self._drop()
                    if error.too_big:
                        raise ObservationError(f"{self._url} takes no frame of {len(frame)} bytes: send smaller images") from None
                    if not self._open:
                        raise ServingError(f"this client of {self._url} was closed: make a new PolicyClient") from None
                    if last or not self._reconnect:
                        twice = " twice for one observation" if last else ""
                        raise ServingError(f"{self._url} closed the connection{twice} ({error}): look at the server's log") from None
                except BaseException:
                    self._drop()
                    raise
                else:
                    raise ServingError(f"{self._url} answered: {_one_line(reply[wire.REFUSED])}")
        raise AssertionError("both tries return or raise")

    async def _connected(self, seconds: float) -> Connection:
        """Return the open connection, or a new one to the same policy."""
        if not self._open:
            raise ServingError(f"this client of {self._url} was closed: make a new PolicyClient")
        if self._connection is not None:
            return self._connection
        if self._greeting is not None and not self._reconnect:
            raise ServingError(f"the connection to {self._url} is gone and reconnect is off: make a new PolicyClient")
        fresh = await connect_to(self._address, seconds, first=self._greeting is None)
        try:
            if self._greeting is None:
                self._learn(fresh.greeting)
            elif fresh.greeting != self._greeting:
                raise ServingError(f"{self._url} now serves another policy: make a new PolicyClient, and reset the robot first")
        except ServingError:
            fresh.drop()
            raise
        self._connection = fresh
        return fresh

    def _learn(self, greeting: bytes) -> None:
        self._metadata = self._decode(greeting)
        named = self._metadata.get(wire.EXTENSIONS, ())
        self._extensions = frozenset(name for name in named if isinstance(name, str)) if isinstance(named, list) else frozenset()
        self._greeting = greeting

    def _pack(self, message: Mapping[str, Any], deadline: float) -> tuple[int, bytes]:
        """Return a new request's number and its frame. Raises ObservationError for keys that this server does not take."""
        asked = {key for key in message if isinstance(key, str) and key.startswith(wire.PREFIX)}
        asked |= {wire.JPEG for value in message.values() if isinstance(value, Mapping) and wire.JPEG in value}
        if not asked <= self._extensions:
            raise ObservationError(f"{self._url} does not know {', '.join(sorted(asked - self._extensions))}: leave it out")
        self._requests += 1
        extra = {
            wire.REQUEST_ID: self._requests,
            wire.SESSION: self._session,
            wire.DEADLINE_MS: max(1.0, (deadline - time.monotonic()) * 1e3),
        }
        frame = wire.pack({**message, **{key: value for key, value in extra.items() if key in self._extensions}})
        told = self._metadata.get("max_frame_bytes")
        limit = told if isinstance(told, int) else wire.MAX_FRAME_BYTES
        if len(frame) > limit:
            raise ObservationError(f"an observation may take {limit} bytes on {self._url}, found {len(frame)}: send smaller images")
        return self._requests, frame

    async def _reply(self, connection: Connection, number: int) -> dict[str, Any]:
        """Return the reply to request `number`; where replies carry one, passes over those to earlier requests."""
        while True:
            reply = await connection.receive()
            if isinstance(reply, str):
                raise ServingError(f"{self._url} answered: {_one_line(reply)}")
            found = self._decode(reply)
            answered = found.get(wire.REQUEST_ID, number if wire.REQUEST_ID not in self._extensions else None)
            if answered == number:
                break
            if not isinstance(answered, int) or answered > number:
                raise ServingError(f"{self._url} answered request {str(answered)[:20]} instead of {number}: it does not keep its protocol")
        expected = self._metadata.get(wire.IDENTITY)
        if wire.REPLY_IDENTITY in self._extensions and found.get(wire.REPLY_IDENTITY) != expected:
            self._greeting = b""  # of no server: this client answers no more
            raise ServingError(f"{self._url} now serves another policy: make a new PolicyClient, and reset the robot first")
        return found

    def _chunk(self, reply: Mapping[str, Any], began: float) -> ActionChunk:
        """Return the chunk in a reply. Raises ServingError unless it is finite and as long and wide as the last one."""
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind not in "fiu" or 0 in actions.shape:
            found = f"an array of shape {list(actions.shape)}" if isinstance(actions, np.ndarray) else f"the keys {sorted(reply)[:8]}"
            raise ServingError(f"{self._url} must answer with actions [H, A], found {found}: is it a policy server?")
        told = [self._metadata.get(name) for name in ("action_horizon", "robot_action_dim")]
        told = [known if isinstance(known, int) else size for known, size in zip(told, actions.shape, strict=True)]
        expected = tuple(told) if self._shape is None else self._shape
        if actions.shape != expected:
            raise ServingError(f"{self._url} must answer with actions {list(expected)}, found {list(actions.shape)}: look at its log")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)
        if not np.isfinite(actions).all():
            raise ServingError(f"{self._url} answered actions that are not finite: look at its log")
        self._shape = actions.shape
        timing = {name: _numbers(reply.get(name)) for name in ("server_timing", "policy_timing")}
        server_ms = timing["server_timing"].get("infer_ms", 0.0)
        timings = {"infer_ms": server_ms, "server_ms": server_ms, **timing["policy_timing"]}
        if "prev_total_ms" in timing["server_timing"]:
            timings["previous_total_ms"] = timing["server_timing"]["prev_total_ms"]
        scores = _numbers({"uncertainty": reply.get(wire.UNCERTAINTY), "alarm": reply.get(wire.ALARM)})
        if isinstance(candidates := reply.get(wire.SCORES), np.ndarray):
            scores |= {f"candidate_{index}": float(score) for index, score in enumerate(candidates.ravel())}
        return ActionChunk(actions, timings | {"round_trip_ms": (time.monotonic() - began) * 1e3}, scores)

    def _decode(self, frame: bytes) -> dict[str, Any]:
        try:
            return wire.unpack(frame)
        except ObservationError as error:
            raise ServingError(f"{self._url} is no policy server, or speaks another protocol: {error}") from None

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.drop()
            self._connection = None


@final
class PolicyClient:
    """`AsyncPolicyClient` for programs without asyncio; safe to share between threads, whose requests take turns.

    Takes the same arguments, and raises the same errors. It connects at once, so that `metadata` is known.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 10.0,
        connect_timeout_seconds: float = 60.0,
        reconnect: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._client = AsyncPolicyClient(
            url,
            token=token,
            timeout_seconds=timeout_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            reconnect=reconnect,
            tls=tls,
        )
        self._seconds = float(timeout_seconds)
        self._loop = _LoopThread(self)
        try:
            self._loop.run(self._client.connect(), float(connect_timeout_seconds))
        except BaseException:
            self._loop.stop()
            raise

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the policy, as the server sent them when the first connection was made."""
        return self._client.metadata

    def infer(self, observation: Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """Ask for the chunk of one observation, as `AsyncPolicyClient.infer`."""
        return self._loop.run(self._client.infer(observation, noise_seed), self._seconds)

    def close(self) -> None:
        """Close the connection; the client cannot be used afterwards."""
        self._loop.close([self._client])

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@final
class RemotePolicy:
    """A `pi0fm_client.types.Policy` on a server: a batch is sent over up to `connections` sockets, so the server infers it together.

    url, token, timeout_seconds, connect_timeout_seconds, tls: as for PolicyClient. Raises as PolicyClient, and ServingError when
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
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "tls": tls,
            "token": token,
            "timeout_seconds": arguments.seconds("timeout_seconds", timeout_seconds),
            "connect_timeout_seconds": arguments.seconds("connect_timeout_seconds", connect_timeout_seconds),
        }
        self._url, self._connections = url, arguments.whole("connections", connections, 1, 1024)
        self._clients = [AsyncPolicyClient(url, **self._options)]
        self._loop = _LoopThread(self)
        try:
            self._loop.run(self._clients[0].connect(), self._options["connect_timeout_seconds"])
            missing = [name for name in ("cameras", "state_key") if name not in self.metadata]
            if missing:
                raise ServingError(
                    f"{url} does not say {' and '.join(missing)} in its metadata: use PolicyClient with the server's own keys"
                )
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts about the policy, as the server sent them."""
        return self._clients[0].metadata

    def infer(self, observation: Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """Ask for the chunk of one observation, as `AsyncPolicyClient.infer`."""
        return self._loop.run(self._clients[0].infer(observation, noise_seed), self._options["timeout_seconds"])

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int | None] | None = None) -> list[ActionChunk]:
        """Return one chunk for each observation, in order, with the `timings` of `AsyncPolicyClient.infer`."""
        if noise_seeds is not None and len(noise_seeds) != len(observations):
            raise ObservationError(f"a batch needs one noise seed for each observation, found {len(noise_seeds)} for {len(observations)}")
        seeds = [None] * len(observations) if noise_seeds is None else list(noise_seeds)
        requests = [(self._message(observation), seed) for observation, seed in zip(observations, seeds, strict=True)]
        if not requests:
            return []
        longest = self._options["timeout_seconds"] * len(requests) + self._options["connect_timeout_seconds"] * self._connections
        return self._loop.run(self._infer_all(requests), longest)

    def close(self) -> None:
        """Close every connection."""
        self._loop.close(self._clients)

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _infer_all(self, requests: Sequence[tuple[Mapping[str, Any], int | None]]) -> list[ActionChunk]:
        width = min(self._connections, len(requests))
        while len(self._clients) < width:
            client = AsyncPolicyClient(self._url, **self._options)
            await client.connect()
            self._clients.append(client)

        async def share(lane: int) -> list[ActionChunk]:
            return [await self._clients[lane].infer(message, seed) for message, seed in requests[lane::width]]

        shares = await asyncio.gather(*map(share, range(width)), return_exceptions=True)
        found: list[list[ActionChunk]] = []
        for each in shares:
            if isinstance(each, BaseException):
                raise each
            found.append(each)
        return [found[index % width][index // width] for index in range(len(requests))]

    def _message(self, observation: Observation) -> dict[str, Any]:
        keys: Mapping[str, str] = self.metadata["cameras"]
        unknown = sorted(set(observation.images) - set(keys))
        if unknown:
            raise ObservationError(f"the policy on {self._url} has the cameras {sorted(keys)}, found {unknown}: rename or leave them out")
        images = {keys[name]: image for name, image in observation.images.items()}
        return {**images, self.metadata["state_key"]: observation.state, "prompt": observation.prompt}


@final
class _LoopThread:
    """An event loop in a thread, which ends with its owner."""

    def __init__(self, owner: object) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="pi0fm-client", daemon=True)
        self._thread.start()
        self.stop = weakref.finalize(owner, _stop_loop, self._loop, self._thread)

    def run(self, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
        """Return the result of `work`, cancelled when the wait ends. It has a time-out of its own; `seconds` is against a dead thread."""
        if not self.stop.alive:
            work.close()
            raise ServingError("this client was closed: make a new PolicyClient")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds + 1.0)
        except concurrent.futures.TimeoutError:
            raise ServingError(
                f"the client's thread gave no answer in {seconds:g} s: make a client in each process, after a fork"
            ) from None
        except concurrent.futures.CancelledError:
            raise ServingError("this client was closed: make a new PolicyClient") from None
        finally:
            future.cancel()

    def close(self, clients: Sequence[AsyncPolicyClient]) -> None:
        """Close the clients in their own thread, then end it."""
        if self.stop.alive:
            for client in clients:
                self.run(client.close(), 1.0)
            self.stop()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(1.0)


def _one_line(text: object) -> str:
    return " ".join(str(text)[:4000].split())[:1000]


def _numbers(found: Any) -> dict[str, float]:
    """Return the finite numbers of a foreign map by their names."""
    items = found.items() if isinstance(found, Mapping) else ()
    return {
        str(name): float(value)
        for name, value in items
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    }
