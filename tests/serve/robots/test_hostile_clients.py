"""Tests of a client that breaks the rules: all others are answered, and no resource grows."""

import asyncio
import json
import logging
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import msgpack
import numpy as np
import pytest
from starlette.websockets import WebSocket, WebSocketState
from test_policy_server import actions_of, array_bytes, healthz, observation_bytes, talk, text_bytes
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pi0fm.serve import app, limits, sessions
from pi0fm.serve.metrics import Metrics
from pi0fm_client import wire


def raw(server: Any) -> socket.socket:
    """A WebSocket after its handshake, as a bare socket whose greeting is not read."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    key = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    connection.sendall((key + "Sec-WebSocket-Version: 13\r\n\r\n").encode())
    assert connection.recv(12) == b"HTTP/1.1 101"
    return connection


def frame(opcode: int, data: bytes, fin: bool = True) -> bytes:
    """A masked frame of at most 125 bytes; the mask is zero."""
    return bytes([opcode | (0x80 if fin else 0), 0x80 | len(data)]) + bytes(4) + data


def is_dropped(connection: socket.socket, seconds: float = 10.0) -> bool:
    """Read until the server ends the connection."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def answers(server: Any) -> bool:
    """A robot is answered, quickly."""
    began = time.monotonic()
    with talk(server.url) as robot:
        robot.recv()
        robot.send(observation_bytes(state=1.0))
        good = actions_of(robot.recv(timeout=5))[0, 0] == 1.0
    return bool(good) and time.monotonic() - began < 2


def refusal(server: Any, request: bytes) -> str:
    """The line that one bad request is answered with; it comes quickly, and the health check is not held up."""
    began = time.monotonic()
    with talk(server.url) as robot:
        robot.recv()
        robot.send(request)
        line = robot.recv(timeout=5)
    assert isinstance(line, str) and time.monotonic() - began < 2
    assert healthz(server.url)[0] == 200
    return line


def big_text(text: bytes) -> bytes:
    return b"\xdb" + struct.pack(">I", len(text)) + text


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        (big_text(b"k" * 10_000_000), b"\x01", "a key may have 200 characters, found 10000000"),
        (text_bytes("prompt"), big_text(b"p" * 10_000_000), "prompt may have 65536 characters, found 10000000"),
        (text_bytes("observation.state"), b"\x92\x91\x01\x92\x01\x02", "observation.state must be an array, or a flat list"),
        (text_bytes("observation.state"), b"\x81\xa1a\x01", "observation.state must be an array, a number or a text, found dict"),
        (text_bytes("pi0fm/deadline_sm"), b"\x01", "unknown extension 'pi0fm/deadline_sm': did you mean 'pi0fm/deadline_ms'?"),
        (text_bytes("pi0fm/deadline_ms"), b"\xcb\x7f\xf8" + bytes(6), "pi0fm/deadline_ms must be a number > 0, found nan"),
        (text_bytes("pi0fm/request_id"), b"\xc3", "pi0fm/request_id must be a whole number"),
        (text_bytes("pi0fm/session"), b"\x01", "pi0fm/session must be a text"),
    ],
    ids=["key", "prompt", "ragged", "map", "extension", "deadline", "id", "session"],
)
def test_a_key_or_a_value_that_costs_work_is_refused_before_it_does(start_server: Any, key: bytes, value: bytes, line: str) -> None:
    assert line in refusal(start_server(), b"\x81" + key + value)


def test_seventy_keys_are_too_many(start_server: Any) -> None:
    assert "64 keys, found 70" in refusal(
        start_server(), b"\xde\x00\x46" + b"".join(text_bytes(f"k{number}") + b"\x01" for number in range(70))
    )


def test_a_message_in_ten_thousand_fragments_is_dropped(start_server: Any) -> None:
    server = start_server()
    connection = raw(server)
    connection.sendall(frame(2, b"", fin=False) + frame(0, b"", fin=False) * 10_000)
    assert is_dropped(connection) and answers(server)


def test_a_flood_of_pings_is_dropped_whether_or_not_its_pongs_are_read(start_server: Any) -> None:
    server = start_server()
    connection = raw(server)
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            connection.sendall(frame(9, b"x" * 125) * 100)
    assert answers(server)


def test_a_few_pings_are_answered(start_server: Any) -> None:
    with talk(start_server().url) as robot:
        robot.recv()
        for _ in range(20):
            assert robot.ping().wait(5)


def test_a_thousand_requests_ahead_are_dropped(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.05))
    connection = raw(server)
    connection.sendall(frame(2, b"\x80") * 1000)
    assert is_dropped(connection) and answers(server)


def test_silent_sockets_lock_nobody_out_and_are_dropped(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    assert answers(server) and healthz(server.url)[0] == 200
    gone = sum(is_dropped(connection, 0.001) for connection in silent)
    assert gone >= 300 - limits.SILENT_SOCKETS
    monkeypatch.setattr(limits, "SILENT_SECONDS", 0.1)
    assert all(is_dropped(connection, 5) for connection in silent)


def test_half_a_request_has_its_time(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENT_SECONDS", 0.2)
    connection = socket.create_connection(("127.0.0.1", start_server().port))
    connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    assert is_dropped(connection)


def test_a_full_server_closes_the_oldest_that_never_asked(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(max_connections=3, max_connections_of_address=2)
    with talk(server.url) as idle, talk(server.url) as robot:
        idle.recv(), robot.recv()
        robot.send(observation_bytes())
        robot.recv()
        with pytest.raises(InvalidStatus) as refused:
            talk(server.url).__enter__()
        assert b"2 connections of one address at a time" in refused.value.response.body
        monkeypatch.setattr(app, "SECONDS_BEFORE_EVICTION", 0.0)
        assert answers(server)
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        robot.send(observation_bytes(state=2.0))
        assert actions_of(robot.recv())[0, 0] == 2.0


@pytest.mark.parametrize("asks", [False, True], ids=["hello", "idle"])
def test_a_client_that_says_nothing_is_closed(start_server: Any, monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    monkeypatch.setattr(sessions, "HELLO_SECONDS", 60.0 if asks else 0.2)
    with talk(start_server(idle_seconds=0.2 if asks else 60.0).url) as robot:
        robot.recv()
        if asks:
            robot.send(observation_bytes())
            robot.recv()
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(timeout=5)
        assert closed.value.rcvd is not None and "silent for" in closed.value.rcvd.reason


def test_a_client_that_does_not_read_is_dropped(start_server: Any, fake_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A greeting of 16 MB fills every buffer between here and there."""
    monkeypatch.setattr(limits, "WRITE_SECONDS", 0.2)
    policy = fake_policy()
    policy.metadata["filler"] = "x" * 16_000_000
    server = start_server(policy)
    connection = raw(server)
    time.sleep(2.5)
    assert answers(server)
    received = 0
    connection.settimeout(5)
    try:
        while data := connection.recv(1 << 20):
            received += len(data)
    except ConnectionError:
        pass
    assert received < 16_000_000


def test_a_web_page_may_not_connect(start_server: Any) -> None:
    with pytest.raises(InvalidStatus) as refused:
        talk(start_server().url, origin="https://example.com").__enter__()
    assert refused.value.response.status_code == 403


def test_each_of_several_keys_is_good(start_server: Any) -> None:
    server = start_server(tokens=["one", "two"])
    for key, good in (("one", True), ("two", True), ("three", False)):
        try:
            with talk(server.url, additional_headers={"Authorization": f"Api-Key {key}"}):
                assert good
        except InvalidStatus as refused:
            assert not good and refused.response.status_code == 401


def test_the_greeting_tells_no_path(start_server: Any, fake_policy: Any) -> None:
    policy = fake_policy()
    policy.metadata["training"] = {"dataset": "/home/someone/data/press", "steps": "7"}
    with talk(start_server(policy).url) as robot:
        greeting = msgpack.unpackb(robot.recv())
    assert greeting["training"] == {"dataset": "press", "steps": "7"} and b"home" not in msgpack.packb(greeting)


def test_extensions_are_announced_and_old_clients_see_none(start_server: Any, fake_policy: Any) -> None:
    policy = fake_policy()
    policy.metadata["identity"] = "abc"
    with talk(start_server(policy).url) as robot:
        greeting = msgpack.unpackb(robot.recv())
        assert greeting["identity"] == "abc"
        assert greeting["extensions"] == [wire.REQUEST_ID, wire.DEADLINE_MS, wire.SESSION, wire.JPEG, wire.REPORT, wire.REPLY_IDENTITY]
        robot.send(observation_bytes())
        assert not [key for key in msgpack.unpackb(robot.recv()) if key.startswith("pi0fm/")]
        robot.send(observation_bytes(**{wire.REQUEST_ID: b"\x07", wire.SESSION: text_bytes("arm"), wire.DEADLINE_MS: b"\xcd\x10\x00"}))
        reply = msgpack.unpackb(robot.recv())
        assert reply[wire.REQUEST_ID] == 7 and reply[wire.REPLY_IDENTITY] == "abc" and "actions" in reply


def test_a_newer_request_of_a_session_and_a_deadline_are_refused_with_the_id_and_the_connection_goes_on(start_server: Any) -> None:
    server = start_server()

    def ask(number: int, **more: bytes) -> bytes:
        return observation_bytes(float(number), **{wire.REQUEST_ID: bytes([number]), wire.SESSION: text_bytes("arm"), **more})

    server.policy.gate.clear()
    try:
        with talk(server.url) as robot:
            robot.recv()
            robot.send(ask(1))
            while not server.policy.batches:
                time.sleep(0.001)
            robot.send(ask(2, **{wire.DEADLINE_MS: b"\xcd\x10\x00"}))
            robot.send(ask(3))
            refused = msgpack.unpackb(robot.recv(timeout=5))
            assert refused[wire.REQUEST_ID] == 2 and "newer observation" in refused[wire.REFUSED] and "actions" not in refused
            server.policy.gate.set()
            assert [msgpack.unpackb(robot.recv(timeout=5))[wire.REQUEST_ID] for _ in range(2)] == [1, 3]
    finally:
        server.policy.gate.set()


def test_a_stuck_policy_turns_the_health_check_red(start_server: Any) -> None:
    server = start_server(stall_seconds=0.1)
    server.policy.gate.clear()
    with talk(server.url) as robot:
        robot.recv()
        robot.send(observation_bytes())
        time.sleep(0.3)
        status, text = healthz(server.url)
        assert status == 503 and b"one inference has taken" in text
        server.policy.gate.set()
        assert actions_of(robot.recv()).shape == (4, 3)
    assert healthz(server.url)[0] == 200


def test_a_state_that_is_too_large_or_a_prompt_that_is_too_long_is_refused_at_the_door(start_server: Any, small_policy: Any) -> None:
    """The real chain: what its network could not take costs nobody a batch."""
    policy = small_policy.in_memory()
    server = start_server(policy)

    def request(prompt: str, *states: tuple[str, np.ndarray]) -> bytes:
        picture = array_bytes(np.zeros((8, 8, 3), np.uint8))
        fields = [("observation/images/base", picture), *((key, array_bytes(value)) for key, value in states)]
        return (
            bytes([0x81 + len(fields)]) + text_bytes("prompt") + big_text(prompt.encode()) + b"".join(text_bytes(k) + v for k, v in fields)
        )

    fine = ("observation/state", np.zeros(4, np.float32))
    assert "observation.state must be near" in refusal(server, request("go", (fine[0], np.full(4, 1e30, np.float32))))
    assert "must be finite" in refusal(server, request("go", (fine[0], np.full(4, 1e39))))
    assert "must fit into" in refusal(server, request("p" * 60_000, fine))
    assert "two spellings" in refusal(server, request("go", fine, ("observation.state", np.zeros(4, np.float32))))
    with talk(server.url) as robot:
        assert {wire.NUM_CANDIDATES, wire.UNCERTAINTY} <= set(msgpack.unpackb(robot.recv())["extensions"])
        robot.send(request("go", fine))
        assert actions_of(robot.recv()).shape == (4, 3)
        robot.send(b"\x84" + request("go", fine)[1:] + text_bytes(wire.NUM_CANDIDATES) + b"\x03")
        reply = robot.recv()
        assert actions_of(reply).shape == (4, 3) and msgpack.unpackb(reply)[wire.UNCERTAINTY] > 0
        robot.send(b"\x84" + request("go", fine)[1:] + text_bytes(wire.NUM_CANDIDATES) + b"\x7f")
        assert "must be in 1..32, alone, found 127" in robot.recv()


def test_a_client_that_goes_while_the_server_ends_does_not_disturb_the_end() -> None:
    async def lost(*_: Any) -> Any:
        raise OSError("the connection is gone")

    websocket = WebSocket({"type": "websocket"}, lost, lost)
    websocket.application_state = WebSocketState.CONNECTED
    session = sessions.Session(websocket, "127.0.0.1", Mock(), ThreadPoolExecutor(), 1.0, Metrics())
    asyncio.run(session.leave(1001, "the server stops"))


def test_a_burst_of_equal_log_lines_is_cut() -> None:
    limit = limits.RateLimit()
    records = [logging.LogRecord("server", logging.WARNING, "", 0, "client %d failed", (number,), None) for number in range(1000)]
    assert sum(limit.filter(record) for record in records) == limit.BURST
    other = logging.LogRecord("server", logging.WARNING, "", 0, "something else", (), None)
    assert limit.filter(other)
    limit._kinds["server", "client %d failed"] = (1.0, time.monotonic(), 980)
    last = logging.LogRecord("server", logging.WARNING, "", 0, "client %d failed", (7,), None)
    assert limit.filter(last) and last.getMessage() == "client 7 failed (and 980 lines like it)"


def test_a_log_of_objects_has_a_line_for_a_fault() -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        record = logging.LogRecord("server", logging.ERROR, "", 0, "request %d\nfailed", (7,), sys.exc_info())
    line = limits._AsJson().format(record)
    found = json.loads(line)
    assert "\n" not in line and found["message"] == "request 7\nfailed" and "ValueError: inner" in found["traceback"]


def test_open_files_are_raised_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (100, 4096))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda which, pair: found.append(pair))
    limits.fit_descriptors(64)
    assert found[0][1] == 4096 and 160 < found[0][0] < 4096
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (100, 100))
    with pytest.raises(limits.ServingError, match=r"64 connections need \d+ open files, found a limit of 100"):
        limits.fit_descriptors(64)
