"""Tests of replacing the served bundle, and of the server's metrics."""

import json
import re
import threading
import urllib.error
import urllib.request
from typing import Any

import msgpack
from test_policy_server import actions_of, observation_bytes, talk, text_bytes

from pi0fm_client import wire
from pi0fm_client.errors import BundleError


def ask(url: str, path: str, key: str | None = None, body: bytes | None = None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": f"Api-Key {key}"}
    request = urllib.request.Request(url.replace("ws://", "http://") + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def with_id(number: int) -> bytes:
    return observation_bytes(float(number), **{wire.REQUEST_ID: bytes([number]), wire.SESSION: text_bytes("arm")})


def test_a_bundle_is_swapped_between_two_requests_and_no_connection_is_dropped(start_server: Any, fake_policy: Any) -> None:
    first = fake_policy()
    first.metadata["identity"] = "one"
    loaded: list[str | None] = []

    def load(bundle: str | None) -> Any:
        loaded.append(bundle)
        second = fake_policy()
        second.metadata["identity"] = "two"
        if bundle == "another robot":
            second.metadata["state_dim"] = 7
        if bundle == "none":
            raise BundleError("no bundle at none")
        return second

    server = start_server(first, admin_token="adm1n", load=load)
    with talk(server.url) as robot:
        robot.recv()
        server.policy.gate.clear()
        robot.send(with_id(1))
        while not server.policy.batches:
            pass
        swapped: list[tuple[int, str]] = []
        swapping = threading.Thread(target=lambda: swapped.append(ask(server.url, "/swap", "adm1n", b'{"bundle": "new"}')))
        swapping.start()
        robot.send(with_id(2))
        server.policy.gate.set()
        first_reply = msgpack.unpackb(robot.recv(timeout=10))
        assert (first_reply[wire.REQUEST_ID], first_reply[wire.REPLY_IDENTITY]) == (1, "one")
        swapping.join(20)
        assert swapped == [(200, '{"identity":"two"}')] and loaded == ["new"]
        assert msgpack.unpackb(robot.recv(timeout=10))[wire.REQUEST_ID] == 2
        robot.send(with_id(3))
        assert msgpack.unpackb(robot.recv(timeout=10))[wire.REPLY_IDENTITY] == "two"
        for bundle, line in (("another robot", "found another state_dim"), ("none", "no bundle at none")):
            status, text = ask(server.url, "/swap", "adm1n", json.dumps({"bundle": bundle}).encode())
            assert status == 400 and line in text
        robot.send(with_id(4))
        assert msgpack.unpackb(robot.recv(timeout=10))[wire.REPLY_IDENTITY] == "two"


def test_only_the_administrators_key_swaps(start_server: Any) -> None:
    server = start_server(admin_token="adm1n", token="robot", load=lambda bundle: None)
    for key in (None, "robot", "wrong"):
        assert ask(server.url, "/swap", key, b"")[0] == 401
    assert ask(server.url, "/swap", "adm1n", b"x" * 5000)[0] == 413
    for body, found in (
        (b"[1]", "a list"),
        (b"{}", r"the keys \[\]"),
        (b'{"bundel": "/new"}', r"the keys \['bundel'\]"),
        (b'{"bundle": "/new", "x": 1}', r"the keys \['bundle', 'x'\]"),
        (b'{"bundle": null}', "'None' as the path"),
        (b'{"bundle": "a\\u0000b"}', r"'a.x00b' as the path"),
        (b"[" * 4000, "no JSON"),
        (b"\xff", "no JSON"),
    ):
        status, text = ask(server.url, "/swap", "adm1n", body)
        assert status == 400, "an administrator believes that the new one is served"
        assert re.search(rf'must be JSON {{"bundle": PATH}}.* found {found}', text), text
    assert ask(start_server().url, "/swap", "adm1n", b"")[0] == 401, "without a key of its own nobody swaps"


def test_what_a_server_did_is_counted(start_server: Any) -> None:
    server = start_server(token="robot")
    headers = {"Authorization": "Api-Key robot"}
    with talk(server.url, additional_headers=headers) as robot:
        robot.recv()
        for _ in range(3):
            robot.send(observation_bytes())
            actions_of(robot.recv())
        robot.send(b"\x80")
        robot.recv()
    assert ask(server.url, "/metrics")[0] == 401
    status, text = ask(server.url, "/metrics", "robot")
    assert status == 200
    for line in (
        "pi0fm_batch_size_count 3.0",
        'pi0fm_stage_seconds_count{stage="total"} 3.0',
        'pi0fm_refused_total{why="observation"} 1.0',
        'pi0fm_refused_total{why="key"} 1.0',
        "pi0fm_waiting 0.0",
    ):
        assert line in text.splitlines(), text
