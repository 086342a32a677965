import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from pi0fm.cluster import runtime
from pi0fm.cluster.runtime import ray_session
from pi0fm_client.errors import ClusterError, ConfigError


class SlowRay:
    """Ray's `init` that fails as a node on a busy machine does, `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls, self.stops = failures, 0, 0

    def init(self, *_: object, **__: object) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise Exception("The current node timed out during startup.\nThis could happen because the raylet failed.")

    def shutdown(self) -> None:
        self.stops += 1


@pytest.fixture
def slow(monkeypatch, request):
    fake = SlowRay(request.param)
    for name in ("RAY_ADDRESS", *runtime.TOKEN_VARIABLES):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile goes again
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "init", fake.init)
    monkeypatch.setattr(ray, "shutdown", fake.shutdown)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return fake


@pytest.mark.parametrize("slow", [1], indirect=True)
def test_a_node_that_is_slow_once_is_started_again(slow: SlowRay, capsys: pytest.CaptureFixture[str]) -> None:
    with ray_session():
        assert slow.calls == 2
    assert slow.stops == 2  # what half stood, and what stood
    assert "trying once more" in capsys.readouterr().err
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


@pytest.mark.parametrize("slow", [0], indirect=True)
def test_a_ray_of_our_own_has_a_token_of_its_own_unless_one_is_given(slow: SlowRay, monkeypatch) -> None:
    """Ray's own would be left in the home folder, and be shown to every cluster that is joined later."""
    with ray_session():
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 32 and "RAY_AUTH_MODE" not in os.environ
    assert "RAY_AUTH_TOKEN" not in os.environ
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with ray_session():
        assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("slow", [0], indirect=True)
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"),
        ray.exceptions.AuthenticationError("Token authentication is enabled but no authentication token was found. Ensure that"),
    ],
)
def test_a_cluster_that_lets_nobody_join_is_not_said_to_be_silent(slow: SlowRay, monkeypatch, error) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refused)
    with socket.create_server(("", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"'{address}' answers, but refuses this process .* RAY_AUTH_TOKEN here"),
            ray_session(address),
        ):
            pass


@pytest.mark.parametrize("slow", [0], indirect=True)
def test_a_head_on_the_loopback_alone_is_refused_at_once(slow: SlowRay, monkeypatch) -> None:
    """Ray would ask the machine's own address instead, and wait for minutes."""
    monkeypatch.setattr(runtime, "_network_address", lambda: "127.0.0.3")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"no Ray cluster answers at '{address}' \(127\.0\.0\.3: "), ray_session(address):
            pass


@pytest.mark.parametrize("slow", [0], indirect=True)
def test_the_token_of_a_ray_that_ended_meets_no_cluster_joined_later(slow: SlowRay, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: seen.append(os.environ.get("RAY_AUTH_TOKEN")))
    with ray_session():
        pass
    with socket.create_server(("", 0)) as listening, ray_session(f"127.0.0.1:{listening.getsockname()[1]}"):
        pass
    assert len(seen[0]) == 32 and seen[1] is None


@pytest.mark.parametrize("slow", [2], indirect=True)
def test_a_node_that_never_starts_is_one_line(slow: SlowRay) -> None:
    with pytest.raises(ClusterError, match="Ray must start on this machine") as caught, ray_session():
        pass
    assert slow.calls == 2 and "\n" not in str(caught.value)


def test_a_head_that_no_longer_answers_is_one_line(monkeypatch):
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    monkeypatch.setattr(runtime, "SECONDS_BETWEEN_HEAD_LOOKS", 0.0)
    head = runtime.RayHead()
    head.refuse_lost()
    listening.close()
    head.refuse_lost()  # it may come back
    monkeypatch.setattr(runtime, "SECONDS_WITHOUT_HEAD", 0.0)
    with pytest.raises(ClusterError, match=f"found no answer from its head at {address} .* with --resume true"):
        head.refuse_lost()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_cluster_is_joined_after_a_ray_of_our_own_and_the_other_way_round(tmp_path, monkeypatch) -> None:
    """Two real heads, each with a token that the other refuses, in one process one after the other."""
    for name in ("RAY_ADDRESS", *runtime.TOKEN_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def answered() -> int:
        return ray.get(ray.remote(num_cpus=0)(lambda: 7).remote(), timeout=120)

    short = tempfile.mkdtemp(prefix="ray-")  # the path of a socket has 107 letters at most
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 32}
    port = free_port()
    words = [f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--object-store-memory=83886080", f"--temp-dir={short}"]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", *words], env=os.environ | token, stdout=log, stderr=log
        )
    try:
        with ray_session(num_cpus=1):
            assert answered() == 7
        address = f"{ray.util.get_node_ip_address()}:{port}"
        wait_for(address, head)
        with pytest.raises(ConfigError, match=r"refuses this process .* RAY_AUTH_TOKEN"), ray_session(address):
            pass
        with monkeypatch.context() as given:
            for name, value in token.items():
                given.setenv(name, value)
            with ray_session(address):
                assert answered() == 7
        with ray_session(num_cpus=1):
            assert answered() == 7
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(short, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("", 0)) as listening:
        return int(listening.getsockname()[1])


def wait_for(address: str, head: subprocess.Popen[bytes]) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(600):
        assert head.poll() is None
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            time.sleep(3.0)  # it listens before its node has registered
            return
    raise AssertionError("the head never answered")
