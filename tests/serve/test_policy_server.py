"""Tests of the whole exchange with an independent client: bytes by hand, as in interop.md section 3."""

import logging
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect


def array_bytes(array: np.ndarray) -> bytes:
    """An array on the wire, written out by hand."""
    data = array.tobytes()
    return (
        b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc5"
        + struct.pack(">H", len(data))
        + data
        + b"\xc4\x05dtype\xa3"
        + array.dtype.str.encode()
        + b"\xc4\x05shape"
        + bytes([0x90 + array.ndim])
        + b"".join(b"\xcd" + struct.pack(">H", size) for size in array.shape)
    )


def text_bytes(text: str) -> bytes:
    return b"\xd9" + bytes([len(text)]) + text.encode()


def observation_bytes(state: float = 0.0, front: int = 0, **more: bytes) -> bytes:
    fields = {
        "observation.images.front": array_bytes(np.full((8, 8, 3), front, np.uint8)),
        "observation.state": array_bytes(np.full(3, state, np.float32)),
        "prompt": text_bytes("press the button"),
        **more,
    }
    return bytes([0x80 + len(fields)]) + b"".join(text_bytes(key) + value for key, value in fields.items())


def actions_of(reply: bytes | str) -> np.ndarray:
    assert isinstance(reply, bytes), reply
    encoded = msgpack.unpackb(reply)["actions"]
    assert encoded[b"__ndarray__"] is True
    return np.frombuffer(encoded[b"data"], encoded[b"dtype"]).reshape(encoded[b"shape"])


def talk(url: str, **options: Any) -> ClientConnection:
    return connect(url, compression=None, max_size=None, proxy=None, **options)


def healthz(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url.replace("ws://", "http://") + "/healthz", timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_exchange_is_openpis(start_server: Any) -> None:
    server = start_server()
    with talk(server.url) as robot:
        assert robot.protocol.extensions == []
        metadata = msgpack.unpackb(robot.recv())
        assert metadata["action_horizon"] == 4 and metadata["cameras"]["front"] == "observation.images.front"
        robot.send(observation_bytes(state=2.0, front=5))
        first = robot.recv()
        assert np.array_equal(actions_of(first), 7.0 + np.arange(4, dtype=np.float32)[:, None] * np.ones(3, np.float32))
        decoded = msgpack.unpackb(first)
        assert set(decoded) == {"actions", "server_timing", "policy_timing"}
        assert set(decoded["server_timing"]) == {"infer_ms"} and decoded["policy_timing"] == {"infer_ms": 0.0}
        for _ in range(2):
            robot.send(observation_bytes())
            timing = msgpack.unpackb(robot.recv())["server_timing"]
            assert set(timing) == {"infer_ms", "prev_total_ms"}
            assert timing["infer_ms"] > 0 and timing["prev_total_ms"] > 0
    assert server.policy.batches == [(1, None)] * 3
    assert server.policy.threads == {"pi0fm-policy"}


def test_a_noise_seed_makes_a_reply_reproducible(start_server: Any) -> None:
    server = start_server()
    with talk(server.url) as robot:
        robot.recv()
        replies = []
        for seed in (3, 3, 4):
            robot.send(observation_bytes(noise_seed=bytes([seed])))
            replies.append(actions_of(robot.recv()))
        assert np.array_equal(replies[0], replies[1]) and not np.array_equal(replies[0], replies[2])
        robot.send(observation_bytes(noise_seed=b"\xff"))
        assert "noise_seed must be a whole number" in robot.recv()
    assert server.policy.batches == [(1, [3]), (1, [3]), (1, [4])]


BAD_FRAMES = {
    "garbage": (b"\xc1\xff garbage", "0xc1"),
    "cut": (observation_bytes()[:-3], "whole"),
    "object": (b"\x81\xa1x" + array_bytes(np.zeros(2, np.float32)).replace(b"<f4", b"|O8"), "dtype '|O8'"),
    "incomplete": (b"\x81\xa6prompt\xa1x", "observation.state must be float32"),
    "text": ("hello", "binary frame"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_frame_is_told_closes_its_connection_and_disturbs_nobody(start_server: Any, name: str) -> None:
    frame, line = BAD_FRAMES[name]
    server = start_server()
    with talk(server.url) as neighbour, talk(server.url) as robot:
        neighbour.recv()
        robot.recv()
        robot.send(frame)
        answer = robot.recv()
        assert isinstance(answer, str) and re.match(r"error [0-9a-f]{8}: ", answer) and line in answer and "\n" not in answer
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(timeout=5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
        neighbour.send(observation_bytes(state=1.0))
        assert actions_of(neighbour.recv())[0, 0] == 1.0


def test_a_policys_fault_is_an_id_for_the_client_and_a_traceback_in_the_log(start_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = start_server()
    with caplog.at_level(logging.ERROR, "pi0fm.serve.sessions"), talk(server.url) as robot:
        robot.recv()
        robot.send(observation_bytes(state=666.0))
        answer = robot.recv()
        assert isinstance(answer, str) and re.fullmatch(r"internal error [0-9a-f]{8}", answer)
        with pytest.raises(ConnectionClosed):
            robot.recv(timeout=5)
    record = next(record for record in caplog.records if answer in record.getMessage())
    assert record.exc_info is not None and "secret internals" in str(record.exc_info[1])


def test_an_action_that_is_not_finite_is_never_sent(start_server: Any) -> None:
    server = start_server()
    with talk(server.url) as robot:
        robot.recv()
        robot.send(observation_bytes(state=float("nan")))
        assert str(robot.recv()).startswith("internal error ")


@contextmanager
def busy(server: Any) -> Iterator[ClientConnection]:
    """A client whose inference lasts until the test opens the gate."""
    server.policy.gate.clear()
    try:
        with talk(server.url) as robot:
            robot.recv()
            robot.send(observation_bytes())
            while not server.policy.batches:
                time.sleep(0.001)
            yield robot
    finally:
        server.policy.gate.set()


def test_healthz_answers_during_an_inference(start_server: Any) -> None:
    server = start_server()
    with busy(server) as robot:
        assert healthz(server.url) == (200, b"OK\n")
        with pytest.raises(TimeoutError):  # still inferring, so the health check did not wait for it
            robot.recv(timeout=0)
        server.policy.gate.set()
        assert actions_of(robot.recv()).shape == (4, 3)


def test_eight_clients_get_their_own_answers_in_shared_batches(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.02))
    together = threading.Barrier(8)

    def one(number: int) -> list[float]:
        with talk(server.url) as robot:
            robot.recv()
            found = []
            for turn in range(5):
                together.wait(10)
                robot.send(observation_bytes(state=10.0 * number, front=turn))
                found.append(float(actions_of(robot.recv())[0, 0]))
            return found

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(one, range(8)))
    assert answers == [[10.0 * number + turn for turn in range(5)] for number in range(8)]
    sizes = [size for size, _ in server.policy.batches]
    assert sum(sizes) == 40 and max(sizes) > 1


def test_a_poisoned_neighbour_in_a_batch_fails_alone(start_server: Any) -> None:
    server = start_server()
    with busy(server) as first, talk(server.url) as good, talk(server.url) as bad:
        good.recv()
        bad.recv()
        good.send(observation_bytes(state=1.0))
        bad.send(observation_bytes(state=666.0))
        assert healthz(server.url)[0] == 200
        server.policy.gate.set()
        assert actions_of(first.recv())[0, 0] == 0.0
        assert actions_of(good.recv())[0, 0] == 1.0
        assert str(bad.recv()).startswith("internal error")
    assert server.policy.batches == [(1, None), (2, None), (1, None), (1, None)]


def test_a_client_that_left_is_dropped_from_the_queue(start_server: Any) -> None:
    server = start_server()
    with busy(server) as first, talk(server.url) as leaver:
        leaver.recv()
        leaver.send(observation_bytes(state=9.0))
        leaver.close()
        assert healthz(server.url)[0] == 200  # by then the server has read what came before
        server.policy.gate.set()
        first.recv()
        first.send(observation_bytes())
        first.recv()
    assert server.policy.batches == [(1, None)] * 2


def test_a_full_queue_is_told(start_server: Any) -> None:
    server = start_server(max_queue=1)
    with busy(server) as first, talk(server.url) as second, talk(server.url) as third:
        second.recv()
        third.recv()
        second.send(observation_bytes(state=1.0))
        assert healthz(server.url)[0] == 200  # by then the second one waits
        third.send(observation_bytes(state=2.0))
        answer = third.recv()
        assert isinstance(answer, str) and "the server is busy: 1 requests wait already" in answer
        server.policy.gate.set()
        assert actions_of(first.recv()).shape == (4, 3)
        assert actions_of(second.recv())[0, 0] == 1.0


def test_requests_sent_ahead_are_answered_in_order(start_server: Any) -> None:
    server = start_server()
    with talk(server.url) as robot:
        robot.recv()
        for number in range(5):
            robot.send(observation_bytes(state=float(number)))
        assert [actions_of(robot.recv())[0, 0] for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_frame_in_fragments_is_one_request(start_server: Any) -> None:
    frame = observation_bytes(state=3.0)
    with talk(start_server().url) as robot:
        robot.recv()
        robot.send([frame[:20], frame[20:21], frame[21:]])
        assert actions_of(robot.recv())[0, 0] == 3.0


def test_an_oversized_frame_closes_its_connection_only(start_server: Any) -> None:
    server = start_server(max_frame_bytes=4096)
    with talk(server.url) as neighbour, talk(server.url) as robot:
        neighbour.recv()
        assert msgpack.unpackb(robot.recv())["max_frame_bytes"] == 4096
        with pytest.raises(ConnectionClosed):
            robot.send(bytes(1_000_000))
            robot.recv(timeout=5)
        neighbour.send(observation_bytes(state=1.0))
        assert actions_of(neighbour.recv())[0, 0] == 1.0


def test_a_token_is_asked_for(start_server: Any) -> None:
    server = start_server(token="s3cret")
    for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Bearer s3cret"}, {"Authorization": "Api-Key s3cret "[:-2]}):
        with pytest.raises(InvalidStatus) as refused:
            talk(server.url, additional_headers=headers).__enter__()
        assert refused.value.response.status_code == 401
    with talk(server.url, additional_headers={"Authorization": "Api-Key s3cret"}) as robot:
        robot.recv()
        robot.send(observation_bytes())
        assert actions_of(robot.recv()).shape == (4, 3)
    assert healthz(server.url) == (200, b"OK\n")


def test_connections_are_bounded_and_a_closed_one_makes_room(start_server: Any) -> None:
    server = start_server(max_connections=2, max_connections_of_address=2)
    with talk(server.url) as one, talk(server.url) as other:
        one.recv(), other.recv()
        with pytest.raises(InvalidStatus) as refused:
            talk(server.url).__enter__()
        assert refused.value.response.status_code == 503
        assert b"takes 2 connections at a time" in refused.value.response.body
        assert healthz(server.url) == (200, b"OK\n")
    deadline = time.monotonic() + 5
    while True:  # the server sees the end of the others a moment later
        try:
            with talk(server.url) as robot:
                robot.recv()
            return
        except InvalidStatus:
            assert time.monotonic() < deadline


def test_a_server_that_stops_says_so_to_its_clients(start_server: Any) -> None:
    server = start_server()
    with talk(server.url) as robot:
        robot.recv()
        server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(timeout=5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_half_a_handshake_and_a_reset_harm_nobody(start_server: Any) -> None:
    server = start_server()
    idle = socket.create_connection(("127.0.0.1", server.port))
    idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
    with talk(server.url) as rude, talk(server.url) as robot:
        rude.recv()
        robot.recv()
        rude.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.close_socket()
        robot.send(observation_bytes())
        assert actions_of(robot.recv()).shape == (4, 3)
    idle.close()


def test_a_short_request_is_judged_at_once_and_what_takes_time_in_a_thread(start_server: Any, fake_policy: Any) -> None:
    policy, judged = fake_policy(), []
    to_observation = policy.observation
    policy.observation = lambda message: (judged.append(threading.current_thread().name), to_observation(message))[1]
    server = start_server(policy)
    judged.clear()
    long = b"\xda" + struct.pack(">H", 2000) + b"x" * 2000
    report = msgpack.packb({"pi0fm/report": {"steps": 3}})[1:]
    with talk(server.url) as robot:
        robot.recv()
        for frame in (observation_bytes(), observation_bytes(prompt=long), observation_bytes(front=7)):
            robot.send(frame)
            assert actions_of(robot.recv()).shape == (4, 3)
        robot.send(b"\x84" + observation_bytes()[1:] + report)
        assert actions_of(robot.recv()).shape == (4, 3)
    assert [name.startswith("pi0fm-door") for name in judged] == [False, True, False, False]
