"""The robot's client against a pi0fm server, against servers that misbehave, and against none."""

import base64
import hashlib
import http.server
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from scripted_server import websocket_server
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from pi0fm_client import PolicyClient, RemotePolicy, connection, wire
from pi0fm_client.errors import ObservationError, ServingError
from pi0fm_client.types import ActionChunk, Observation


def message(state: float = 0.0, front: int = 0) -> dict[str, Any]:
    return {
        "observation.images.front": np.full((8, 8, 3), front, np.uint8),
        "observation.state": np.full(3, state, np.float32),
        "prompt": "press the button",
    }


def observation(state: float) -> Observation:
    return Observation({"front": np.zeros((8, 8, 3), np.uint8)}, np.full(3, state, np.float32), "press the button")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_reply_is_an_action_chunk_with_its_timings(start_server: Any) -> None:
    with PolicyClient(start_server().url) as client:
        assert client.metadata["action_horizon"] == 4
        chunk = client.infer(message(state=2.0, front=1))
        assert isinstance(chunk, ActionChunk)
        assert chunk.actions.dtype == np.float32 and chunk.actions.shape == (4, 3) and chunk.actions[0, 0] == 3.0
        assert chunk.timings["infer_ms"] == 0.0 < chunk.timings["server_ms"] <= chunk.timings["round_trip_ms"]
        assert "previous_total_ms" not in chunk.timings and client.infer(message()).timings["previous_total_ms"] > 0


def test_a_seed_makes_a_chunk_reproducible_for_client_and_remote_policy_alike(start_server: Any) -> None:
    url = start_server().url
    with PolicyClient(url) as client, RemotePolicy(url) as remote:
        first, again, other = (client.infer(message(), noise_seed=seed).actions for seed in (7, 7, 8))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
        assert np.array_equal(remote.infer(message(), noise_seed=7).actions, first)
        assert np.array_equal(remote.infer_batch([observation(0.0)], [7])[0].actions, first)


def test_it_speaks_to_an_openpi_server() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(msgpack.packb({"model": "pi0"}))
        image = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "|u1", b"shape": [2, 2, 3]}
        assert connection.recv() == msgpack.packb({"observation/image": image, "prompt": "pick"})
        encoded = {b"__ndarray__": True, b"data": np.ones((5, 2), "<f8").tobytes(), b"dtype": "<f8", b"shape": [5, 2]}
        connection.send(msgpack.packb({"actions": encoded, "server_timing": {"infer_ms": 1.5}}))

    with websocket_server(handler) as url:
        with PolicyClient(url) as client:
            assert client.metadata == {"model": "pi0"}
            chunk = client.infer({"observation/image": np.zeros((2, 2, 3), np.uint8), "prompt": "pick"})
            assert np.array_equal(chunk.actions, np.ones((5, 2))) and chunk.actions.dtype == np.float32
            assert chunk.timings["infer_ms"] == chunk.timings["server_ms"] == 1.5
        with pytest.raises(ServingError, match="does not say cameras and state_key"):
            RemotePolicy(url)


def test_an_observation_object_is_not_sent_for_a_flat_map(start_server: Any) -> None:
    with PolicyClient(start_server().url) as client, pytest.raises(ObservationError, match="a flat map of keys, found Observation"):
        client.infer(observation(0.0))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ({"server_timing": {}}, r"the keys \['server_timing'\]"),
        ({"actions": [[1.0]]}, r"the keys \['actions'\]"),
        ({"actions": np.zeros(3, np.float32)}, r"an array of shape \[3\]"),
        ({"actions": np.zeros((2, 3), np.bool_)}, r"an array of shape \[2, 3\]"),
    ],
)
def test_a_reply_without_a_chunk_is_refused(reply: dict[str, Any], found: str) -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(wire.pack({}))
        connection.recv()
        connection.send(wire.pack(reply))

    refused = pytest.raises(ServingError, match=rf"must answer with actions \[H, A\], found {found}")
    with websocket_server(handler) as url, PolicyClient(url) as client, refused:
        client.infer({"prompt": "pick"})


def test_a_servers_error_is_raised_with_its_line_and_the_client_goes_on(start_server: Any) -> None:
    with PolicyClient(start_server().url) as client:
        with pytest.raises(ServingError, match=r"answered: error [0-9a-f]{8}: observation.state must be float32 \[3\]"):
            client.infer({"prompt": "no state"})
        with pytest.raises(ServingError, match=r"answered: internal error [0-9a-f]{8}$"):
            client.infer(message(state=666.0))
        assert client.infer(message(state=1.0)).actions[0, 0] == 1.0


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.4))
    with PolicyClient(server.url, timeout_seconds=0.1) as client:
        with pytest.raises(ServingError, match=rf"{server.url} (gave no answer in 0.1 s|answered: the deadline cannot be kept)"):
            client.infer(message(state=1.0))
        server.policy.seconds = 0.0
        time.sleep(0.4)
        assert client.infer(message(state=2.0)).actions[0, 0] == 2.0


def test_a_restarted_server_is_found_again(start_server: Any) -> None:
    first = start_server()
    with PolicyClient(first.url, connect_timeout_seconds=20) as client:
        client.infer(message())
        first.stop()
        threading.Timer(0.3, start_server, kwargs={"port": first.port}).start()
        assert client.infer(message(state=5.0)).actions[0, 0] == 5.0


def test_without_reconnection_a_lost_server_is_an_error(start_server: Any) -> None:
    server = start_server()
    with PolicyClient(server.url, reconnect=False) as client:
        server.stop()
        for line in ("closed the connection", "is gone and reconnect is off"):
            with pytest.raises(ServingError, match=line):
                client.infer(message())


def test_a_connection_that_breaks_at_every_observation_is_tried_twice() -> None:
    requests: list[bytes | str] = []

    def handler(connection: ServerConnection) -> None:
        connection.send(msgpack.packb({}))
        requests.append(connection.recv())
        connection.close_socket()

    with websocket_server(handler) as url, PolicyClient(url) as client:
        with pytest.raises(ServingError, match="twice for one observation"):
            client.infer(message())
        assert len(requests) == 2 and requests[0] == requests[1]


def test_no_server_is_an_error_that_names_the_address() -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    with pytest.raises(ServingError, match=f"no policy server at {url} in 0.3 s"):
        PolicyClient(url, connect_timeout_seconds=0.3)


def test_a_server_that_starts_later_is_waited_for(start_server: Any) -> None:
    port = free_port()
    threading.Timer(0.3, start_server, kwargs={"port": port}).start()
    with PolicyClient(f"ws://127.0.0.1:{port}", connect_timeout_seconds=20) as client:
        assert client.metadata["embodiment"] == "fake"


def test_a_web_server_is_no_policy_server() -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(ServingError, match=r"takes no WebSocket there \(HTTP 404\): check host and port"):
            PolicyClient(f"ws://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


@pytest.mark.parametrize(
    ("greeting", "line"),
    [("hello", "first frame is text"), (b"\xc1", "speaks another protocol"), (None, "sent no metadata in 0.2 s")],
)
def test_another_websocket_server_is_no_policy_server(greeting: str | bytes | None, line: str) -> None:
    def handler(connection: ServerConnection) -> None:
        if greeting is not None:
            connection.send(greeting)
        with suppress(ConnectionClosed, TimeoutError):
            connection.recv(timeout=2)

    with websocket_server(handler) as url, pytest.raises(ServingError, match=line):
        PolicyClient(url, timeout_seconds=0.2)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8000", "policy"])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ServingError, match="is no WebSocket address: write ws://HOST:PORT"):
        PolicyClient(url)


def test_a_wrong_token_is_refused_at_once(start_server: Any) -> None:
    server = start_server(token="s3cret")
    with pytest.raises(ServingError, match=r"refused the token \(HTTP 401: send the header"):
        PolicyClient(server.url, token="other")
    with PolicyClient(server.url, token="s3cret") as client:
        assert client.infer(message()).actions.shape == (4, 3)


def test_another_path_is_no_wrong_token(start_server: Any) -> None:
    server = start_server(token="s3cret")
    with pytest.raises(ServingError, match=r"HTTP 404: the policy is served at /\): pi0fm and openpi serve at /, leave /infer out"):
        PolicyClient(server.url + "/infer", token="s3cret")


def test_a_client_that_waits_says_so_and_for_how_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(connection, "TOLD_SECONDS", 0.1)
    port = free_port()
    with pytest.raises(ServingError, match=r"no policy server at .* in 0\.5 s \(Connection refused\)"):
        PolicyClient(f"ws://127.0.0.1:{port}", connect_timeout_seconds=0.5)
    assert caplog.messages == [f"no answer from ws://127.0.0.1:{port} yet (Connection refused): trying for 0.5 s"]


def test_wss_to_a_plain_websocket_server_is_told_at_once() -> None:
    with websocket_server(lambda robot: None) as url:
        began = time.monotonic()
        with pytest.raises(ServingError, match="speaks no TLS: write ws://"):
            PolicyClient(url.replace("ws://", "wss://"))
        assert time.monotonic() - began < 10


def test_an_observation_beyond_the_servers_limit_is_not_sent(start_server: Any) -> None:
    with PolicyClient(start_server(max_frame_bytes=2000).url) as client:
        with pytest.raises(ObservationError, match="may take 2000 bytes"):
            client.infer({"observation.images.front": np.zeros((100, 100, 3), np.uint8)})
        assert client.infer(message()).actions.shape == (4, 3)


def test_a_limit_that_a_server_did_not_tell_is_named_when_it_is_met() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(msgpack.packb({}))
        with suppress(ConnectionClosed):
            connection.recv(timeout=5)  # websockets' own limit is 1 MiB

    with websocket_server(handler) as url, PolicyClient(url) as client, pytest.raises(ObservationError, match="takes no frame of 2000"):
        client.infer({"image": np.zeros(2_000_000, np.uint8)})


def test_a_server_that_reads_no_more_cannot_hold_a_robot() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def handshake_and_no_more() -> None:
            accepted.append(listener.accept()[0])
            request = b""
            while b"\r\n\r\n" not in request:
                request += accepted[0].recv(4096)
            key = next(line.split(b": ")[1] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
            accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            upgrade = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
            accepted[0].sendall(upgrade + accept + b"\r\n\r\n" + b"\x82\x01\x80")

        accepted: list[socket.socket] = []
        thread = threading.Thread(target=handshake_and_no_more)
        thread.start()
        client = PolicyClient(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeout_seconds=0.3)
        thread.join(10)
        with pytest.raises(ServingError, match=r"gave no answer in 0\.3 s"):
            client.infer({"image": np.zeros(20_000_000, np.uint8)})
        accepted[0].close()


def test_a_closed_client_says_so(start_server: Any) -> None:
    client = PolicyClient(start_server().url)
    client.close()
    with pytest.raises(ServingError, match="was closed"):
        client.infer(message())


def test_a_remote_policy_is_a_policy_whose_batch_the_server_sees_together(start_server: Any, fake_policy: Any) -> None:
    server = start_server(fake_policy(seconds=0.05))
    with RemotePolicy(server.url, connections=4) as policy:
        assert policy.metadata["state_dim"] == 3
        assert policy.infer_batch([]) == []
        policy.infer_batch([observation(0.0)] * 4)  # opens the connections
        server.policy.batches.clear()
        chunks = policy.infer_batch([observation(float(number)) for number in range(10)])
        assert [chunk.actions[0, 0] for chunk in chunks] == list(range(10))
        assert all(chunk.timings["round_trip_ms"] >= chunk.timings["server_ms"] >= 50 for chunk in chunks)
        assert sum(size for size, _ in server.policy.batches) == 10 and max(size for size, _ in server.policy.batches) >= 2
        seeded = [chunk.actions for chunk in policy.infer_batch([observation(0.0)] * 3, [5, 6, 5])]
        assert np.array_equal(seeded[0], seeded[2]) and not np.array_equal(seeded[0], seeded[1])


def test_a_remote_policy_refuses_what_the_server_could_not_read(start_server: Any) -> None:
    with RemotePolicy(start_server().url, connections=2) as policy:
        with pytest.raises(ObservationError, match="has the cameras"):
            policy.infer_batch([Observation({"top": np.zeros((8, 8, 3), np.uint8)}, np.zeros(3, np.float32), "")])
        with pytest.raises(ObservationError, match="one noise seed for each"):
            policy.infer_batch([observation(0.0)], [1, 2])
        with pytest.raises(ServingError, match="internal error"):
            policy.infer_batch([observation(0.0), observation(666.0)])
        assert policy.infer_batch([observation(1.0)])[0].actions[0, 0] == 1.0
