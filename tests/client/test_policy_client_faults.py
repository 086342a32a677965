"""Tests that a client returns the answer to its request or an error, in time, under any fault of caller, server or network."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from scripted_server import answer, websocket_server
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from pi0fm_client import AsyncPolicyClient, PolicyClient, connection, wire
from pi0fm_client.errors import ConfigError, ObservationError, ServingError

GRACE = 3.0  # seconds that a busy machine may add to a time-out; the faults of this file took 27 and 59


def state(value: float, **more: Any) -> dict[str, Any]:
    return {"state": value, **more}


def message(value: float) -> dict[str, Any]:
    return {
        "observation.images.front": np.zeros((8, 8, 3), np.uint8),
        "observation.state": np.full(3, value, np.float32),
        "prompt": "press",
    }


class StopError(BaseException):
    """What no `except Exception` catches."""


@contextmanager
def interrupted(kind: type[BaseException], seconds: float) -> Iterator[None]:
    """Raise `kind` in the main thread after `seconds`, as Ctrl-C would, and expect it."""

    def handler(*_: object) -> None:
        raise kind

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(kind):
            yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + GRACE


@pytest.mark.parametrize("kind", [KeyboardInterrupt, StopError])
def test_an_interrupted_request_leaves_no_answer_behind(kind: type[BaseException], start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.2))
    with PolicyClient(server.url) as client:
        for value in (1.0, 3.0):
            with interrupted(kind, 0.1):
                client.infer(message(value))
            assert client.infer(message(value + 1)).actions[0, 0] == value + 1


def test_a_cancelled_task_leaves_no_answer_behind(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.1))

    async def run() -> list[float]:
        async with AsyncPolicyClient(server.url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.infer(message(1.0)), 0.05)
            chunks = await asyncio.gather(*(client.infer(message(value)) for value in (2.0, 3.0, 4.0)))
            return [float(chunk.actions[0, 0]) for chunk in chunks]

    assert asyncio.run(run()) == [2.0, 3.0, 4.0]


def test_threads_that_share_a_client_get_their_own_answers(start_server: Any) -> None:
    wrong: list[float] = []
    with PolicyClient(start_server().url) as client:

        def ask(value: float) -> None:
            wrong.extend(float(each) for _ in range(20) if (each := client.infer(message(value)).actions[0, 0]) != value)

        threads = [threading.Thread(target=ask, args=(float(number),)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert wrong == []


def test_a_frame_that_nobody_asked_for_is_not_the_next_answer() -> None:
    connections = []

    def handler(connection: ServerConnection) -> None:
        connections.append(connection)
        connection.send(wire.pack({}))
        for request in connection:
            connection.send(answer(request))
            connection.send(answer(request))

    with websocket_server(handler) as url, PolicyClient(url) as client:
        for value in (1.0, 2.0, 3.0):
            assert client.infer(state(value)).actions[0, 0] == value
            time.sleep(0.05)  # the second frame is on its way
    assert len(connections) == 3

    with websocket_server(handler) as url, PolicyClient(url, reconnect=False) as client:
        client.infer(state(1.0))
        time.sleep(0.05)
        with pytest.raises(ServingError, match="a frame that no request asked for"):
            client.infer(state(2.0))


def test_replies_with_numbers_are_told_apart() -> None:
    """Repeated and reordered replies arrive before the right one, on one connection."""
    connections = []

    def handler(connection: ServerConnection) -> None:
        connections.append(connection)
        connection.send(wire.pack({"extensions": [wire.REQUEST_ID]}))
        old: list[bytes] = []
        for request in connection:
            for reply in [*old, answer(request)]:
                connection.send(reply)
            old = [answer(request), *old][:2]

    with websocket_server(handler) as url, PolicyClient(url) as client:
        assert [client.infer(state(value)).actions[0, 0] for value in (1.0, 2.0, 3.0, 4.0)] == [1.0, 2.0, 3.0, 4.0]
    assert len(connections) == 1


def test_a_refusal_by_number_keeps_the_connection() -> None:
    connections = []

    def handler(connection: ServerConnection) -> None:
        connections.append(connection)
        connection.send(wire.pack({"extensions": [wire.REQUEST_ID]}))
        for count, request in enumerate(connection):
            connection.send(answer(request, **({wire.REFUSED: "too late\nby 3 ms"} if count == 0 else {})))

    with websocket_server(handler) as url, PolicyClient(url) as client:
        with pytest.raises(ServingError, match=r"answered: too late by 3 ms$"):
            client.infer(state(1.0))
        assert client.infer(state(2.0)).actions[0, 0] == 2.0
    assert len(connections) == 1


@pytest.mark.parametrize("number", [None, 9, "1", 1.5])
def test_a_number_that_was_never_asked_is_refused(number: Any) -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({"extensions": [wire.REQUEST_ID]}))
        for request in connection:
            connection.send(answer(request, **{wire.REQUEST_ID: number}))

    with websocket_server(handler) as url, PolicyClient(url) as client, pytest.raises(ServingError, match="does not keep its protocol"):
        client.infer(state(1.0))


def gone(port: int) -> Iterator[None]:
    yield


def silent(port: int) -> Iterator[None]:
    """The kernel takes connections, as for a process that is stopped; nobody answers them."""
    with socket.create_server(("127.0.0.1", port)):
        yield


def closing(port: int) -> Iterator[None]:
    """Connections are taken and closed at once."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                with suppress(OSError):
                    listener.accept()[0].close()

        thread = threading.Thread(target=work)
        thread.start()
        yield
        over.set()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
        thread.join(5)


@pytest.mark.parametrize("behaviour", [gone, silent, closing])
def test_a_request_keeps_its_time_out_when_the_server_is_lost(behaviour: Callable[[int], Iterator[None]]) -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        with suppress(ConnectionClosed):
            connection.send(answer(connection.recv()))
            connection.recv()

    with websocket_server(handler) as url:
        client = PolicyClient(url, timeout_seconds=0.5)
        client.infer(state(1.0))
    with contextmanager(behaviour)(int(url.rpartition(":")[2])), client:
        for _ in range(2):
            with in_time(0.5), pytest.raises(ServingError, match=r"no policy server at|gave no answer in 0\.5 s"):
                client.infer(state(2.0))


def test_a_request_keeps_its_time_out_when_the_server_only_pings() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        connection.recv()
        with suppress(ConnectionClosed, OSError):
            for _ in range(40):
                connection.ping()
                time.sleep(0.05)

    silent = pytest.raises(ServingError, match=r"gave no answer in 0\.3 s")
    with websocket_server(handler) as url, PolicyClient(url, timeout_seconds=0.3) as client, in_time(0.3), silent:
        client.infer(state(1.0))


def test_the_time_spent_waiting_for_another_thread_counts(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.6))
    with PolicyClient(server.url, timeout_seconds=0.5) as client:
        results: list[BaseException] = []

        def ask() -> None:
            with pytest.raises(ServingError, match=r"gave no answer|answered:") as caught:  # or refused, by its deadline
                client.infer(message(1.0))
            results.append(caught.value)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        with in_time(0.5):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(5)
        assert len(results) == 3


def test_an_observation_past_its_deadline_is_never_sent_again() -> None:
    seen: list[float] = []

    def losing(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        seen.append(wire.unpack(connection.recv())["state"])  # type: ignore[arg-type]
        connection.close_socket()

    def serving(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        for request in connection:
            seen.append(wire.unpack(request)["state"])  # type: ignore[arg-type]
            connection.send(answer(request))

    with websocket_server(losing) as url:
        client = PolicyClient(url, timeout_seconds=0.4)
        with pytest.raises(ServingError):
            client.infer(state(1.0))
    sent = len(seen)
    with pytest.raises(ServingError, match="no policy server"):
        client.infer(state(2.0))
    with websocket_server(serving, int(url.rpartition(":")[2])), client:
        time.sleep(0.3)
        assert client.infer(state(3.0)).actions[0, 0] == 3.0
    assert seen[sent:] == [3.0]


def test_a_deadline_in_the_observation_shortens_the_time_out(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.5))
    with PolicyClient(server.url) as client:
        with in_time(0.1), pytest.raises(ServingError, match=r"gave no answer in 0\.1 s|the deadline cannot be kept"):
            client.infer({**message(1.0), wire.DEADLINE_MS: 100.0})
        for wrong in (0, -1.0, float("nan"), "100", True):
            with pytest.raises(ObservationError, match="deadline_ms must be a number above 0"):
                client.infer({**message(1.0), wire.DEADLINE_MS: wrong})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e300, None, "2", True, [2]])
@pytest.mark.parametrize("name", ["timeout_seconds", "connect_timeout_seconds"])
def test_a_time_out_that_is_none_is_refused_at_construction(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a number above 0"):
        PolicyClient("ws://127.0.0.1:1", **{name: value})


@pytest.mark.parametrize("url", ["ws://127.0.0.1:99999", f"ws://{'a' * 300}:1", 7])
def test_an_address_that_cannot_be_is_refused_in_time(url: Any) -> None:
    with in_time(0.5), pytest.raises(ServingError, match=r"is no WebSocket address|no policy server"):
        PolicyClient(url, connect_timeout_seconds=0.5)


def test_a_token_that_no_header_carries_is_refused() -> None:
    with pytest.raises(ConfigError, match="token must be printable ASCII"):
        PolicyClient("ws://127.0.0.1:1", token="schlüssel\n")


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "7", True])
def test_a_seed_that_no_server_takes_is_refused(seed: Any, start_server: Any) -> None:
    with PolicyClient(start_server().url) as client, pytest.raises(ObservationError, match="noise_seed must be a whole number"):
        client.infer(message(1.0), noise_seed=seed)


def test_a_client_closed_by_another_thread_ends_its_request(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=1.0))
    client = PolicyClient(server.url)
    threading.Timer(0.1, client.close).start()
    with in_time(0.3), pytest.raises(ServingError, match="was closed"):
        client.infer(message(1.0))


REPLIES: list[tuple[dict[str, Any], str]] = [
    ({"actions": np.full((2, 1), np.nan)}, "not finite"),
    ({"actions": np.full((2, 1), -np.inf)}, "not finite"),
    ({"actions": np.full((2, 1), 1e39)}, "not finite"),
    ({"actions": np.zeros((0, 1))}, r"must answer with actions \[H, A\]"),
    ({"actions": np.zeros((3, 1))}, r"actions \[2, 1\], found \[3, 1\]"),
    ({"actions": np.zeros((2, 2))}, r"actions \[2, 1\], found \[2, 2\]"),
]


@pytest.mark.parametrize(("wrong", "line"), REPLIES)
@pytest.mark.parametrize("greeting", [{}, {"action_horizon": 2, "robot_action_dim": 1}])
def test_actions_that_are_no_chunk_of_this_policy_are_refused(greeting: dict[str, Any], wrong: dict[str, Any], line: str) -> None:
    """A server that tells no sizes is held to those of its first answer."""

    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack(greeting))
        for request in connection:
            connection.send(answer(request, **({} if b"good" in request else wrong)))  # type: ignore[operator]

    with websocket_server(handler) as url, PolicyClient(url) as client:
        assert client.infer(state(5.0, prompt="good")).actions.shape == (2, 1)
        with pytest.raises(ServingError, match=line):
            client.infer(state(5.0))
        assert client.infer(state(6.0, prompt="good")).actions[0, 0] == 6.0


def test_what_a_foreign_server_says_besides_is_read_with_care() -> None:
    odd: dict[str, Any] = {"server_timing": [1], "policy_timing": {"infer_ms": "fast", "encode_ms": 2, "nan": float("nan")}}

    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({"max_frame_bytes": "many", "extensions": "all", "action_horizon": "long"}))
        for request in connection:
            connection.send(answer(request, **odd))

    with websocket_server(handler) as url, PolicyClient(url) as client:
        timings = client.infer(state(1.0)).timings
        assert timings["encode_ms"] == 2.0 and timings["infer_ms"] == 0.0 and "nan" not in timings


@pytest.mark.parametrize("identity", ["other", None])
def test_another_bundle_behind_the_same_connection_is_noticed(identity: str | None) -> None:
    """The server was told to swap: same metadata, other weights."""

    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({"identity": "first", "extensions": [wire.REPLY_IDENTITY]}))
        for number, request in enumerate(connection):
            connection.send(answer(request, **{wire.REPLY_IDENTITY: "first" if number == 0 else identity}))

    with websocket_server(handler) as url, PolicyClient(url) as client:
        assert client.infer(state(1.0)).actions[0, 0] == 1.0
        for _ in range(2):
            with pytest.raises(ServingError, match="now serves another policy"):
                client.infer(state(2.0))


def test_another_bundle_behind_the_same_address_is_noticed(start_server: Any, fake_policy: Any) -> None:
    first, other = fake_policy(), fake_policy()
    first.metadata["identity"], other.metadata["identity"] = "first", "other"
    server = start_server(first)
    with PolicyClient(server.url) as client:
        server.stop()
        start_server(other, port=server.port)
        with pytest.raises(ServingError, match="now serves another policy"):
            client.infer(message(1.0))


def test_extensions_are_sent_when_the_greeting_names_them() -> None:
    seen: list[dict[str, Any]] = []
    names = [wire.REQUEST_ID, wire.SESSION, wire.DEADLINE_MS, wire.JPEG, wire.UNCERTAINTY, wire.ALARM, wire.SCORES, wire.NUM_CANDIDATES]

    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({"extensions": names}))
        for request in connection:
            seen.append(wire.unpack(request))  # type: ignore[arg-type]
            connection.send(answer(request, **{wire.UNCERTAINTY: 0.5, wire.ALARM: 1.0, wire.SCORES: np.float32([1, 2])}))

    with websocket_server(handler) as url, PolicyClient(url, timeout_seconds=2.0) as client:
        for _ in range(2):
            chunk = client.infer(state(1.0, image={wire.JPEG: b"\xff\xd8"}, **{wire.NUM_CANDIDATES: 2}))
        assert chunk.scores == {"uncertainty": 0.5, "alarm": 1.0, "candidate_0": 1.0, "candidate_1": 2.0}
        with pytest.raises(ObservationError, match="does not know pi0fm/action_prefix"):
            client.infer(state(1.0, **{wire.ACTION_PREFIX: np.zeros((1, 1), np.float32)}))
    assert [request[wire.REQUEST_ID] for request in seen] == [1, 2]
    assert seen[0][wire.SESSION] == seen[1][wire.SESSION] and 1000 < seen[0][wire.DEADLINE_MS] <= 2000
    assert seen[0]["image"] == {wire.JPEG: b"\xff\xd8"} and seen[0][wire.NUM_CANDIDATES] == 2


def test_a_server_without_extensions_is_sent_none() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        for request in connection:
            assert set(wire.unpack(request)) == {"state"}  # type: ignore[arg-type]
            connection.send(answer(request))

    with websocket_server(handler) as url, PolicyClient(url) as client:
        for wrong in ({wire.NUM_CANDIDATES: 2}, {"image": {wire.JPEG: b""}}):
            with pytest.raises(ObservationError, match="does not know pi0fm/"):
                client.infer(state(1.0, **wrong))
        assert client.infer(state(1.0, **{wire.DEADLINE_MS: 1000.0})).actions[0, 0] == 1.0


def test_our_own_server_knows_what_the_client_sends(start_server: Any, fake_policy: Any) -> None:
    policy = fake_policy()
    policy.metadata["identity"] = "first"
    with PolicyClient(start_server(policy).url) as client:
        assert {wire.REQUEST_ID, wire.DEADLINE_MS, wire.SESSION, wire.REPLY_IDENTITY} <= set(client.metadata["extensions"])
        assert [client.infer(message(value)).actions[0, 0] for value in (1.0, 2.0)] == [1.0, 2.0]


def unknown_host(monkeypatch: pytest.MonkeyPatch, *answers: int | None) -> list[str]:
    """Let the resolver answer each question by a fault's number or, for None, by this machine's address; the last answer stays."""
    asked: list[str] = []
    real, left = socket.getaddrinfo, list(answers)

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "robot.example":
            return real(host, *rest, **more)
        asked.append(host)
        number = left.pop(0) if len(left) > 1 else left[0]
        if number is None:
            return real("127.0.0.1", *rest, **more)
        raise socket.gaierror(number, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connection, "UNKNOWN_HOST_SECONDS", 0.5)
    return asked


def test_a_host_without_an_address_is_a_fault_long_before_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = unknown_host(monkeypatch, socket.EAI_NONAME)
    with in_time(0.5), pytest.raises(ServingError, match=r"robot\.example has had no address for 0\.5 s \(.*\): correct"):
        PolicyClient("ws://robot.example:8000", connect_timeout_seconds=60)
    assert len(asked) > 1, "once more, since a network may just come up"


@pytest.mark.parametrize("answers", [[socket.EAI_AGAIN], [socket.EAI_NONAME, None, socket.EAI_NONAME]], ids=["no answer", "known once"])
def test_a_name_that_may_be_right_is_tried_for_the_whole_time(answers: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = unknown_host(monkeypatch, *answers)
    began = time.monotonic()
    with pytest.raises(ServingError, match=r"no policy server at ws://robot\.example:1 in 2 s"):
        PolicyClient("ws://robot.example:1", connect_timeout_seconds=2)
    assert time.monotonic() - began > 1.2 and len(asked) > 2


def test_a_client_that_was_connected_waits_for_its_network_to_return(
    start_server: Any, fake_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name that it knew has no address for longer than a mistyped one is tried."""
    port = start_server(fake_policy()).url.rpartition(":")[2]
    unknown_host(monkeypatch, None, *[socket.EAI_NONAME] * 4, None)
    with PolicyClient(f"ws://robot.example:{port}", timeout_seconds=30) as client:
        client.infer(message(1.0))
        client._client._drop()
        assert client.infer(message(2.0)).actions.size
