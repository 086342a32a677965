"""Tests of the policy server behind Ray Serve: connections stay with their replica, robots add replicas, the end is clean."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from small_policies import saved, small_policy

from pi0fm.cli import serve as command
from pi0fm.options import parse
from pi0fm_client import PolicyClient
from pi0fm_client.errors import ConfigError, ServingError

__all__ = ["saved", "small_policy"]
SUPPORT = Path(__file__).resolve().parents[1] / "support" / "fakes"
PROGRAM = """
import sys
from pi0fm.cluster.serving import Replicas, serve_replicas
from pi0fm.serve.app import fault_of
from replica_app import build
serve_replicas(build, fault_of, Replicas(1, 2, 2, {}), "127.0.0.1", int(sys.argv[1]), lambda: print("{}", flush=True))
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--replicas", "-1"], "--replicas must be in 0..--most_replicas"),
        (["--replicas", "3", "--most_replicas", "2"], "--replicas must be in 0..--most_replicas"),
        (["--replicas", "1", "--robots_per_replica", "0"], "--robots_per_replica be >= 1"),
    ],
)
def test_numbers_of_replicas_that_cannot_be_are_refused(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace(".", "[.]")):
        parse(command.Options, ["--bundle", "b", *words])


@pytest.mark.parametrize("words", [["--live", "true"], ["--log_requests", "log"], ["--log_format", "json"]])
def test_what_belongs_to_one_server_is_refused_with_replicas(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="works with a single server only"):
        command.run(parse(command.Options, ["--bundle", "b", "--replicas", "2", *words]))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """`start(*words)`: a server in a separate process, when it is ready, and its first line."""
    pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'ray[serve]'", exc_type=ImportError)
    with ExitStack() as stack:

        def begin(*words: str) -> tuple[subprocess.Popen[str], str]:
            path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path, "PI0FM_TOKEN": "robot"}
            process = stack.enter_context(subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, next(line for line in process.stdout if line.startswith("{"))

        yield begin


def observation() -> dict[str, object]:
    pictures = {f"observation.images.{name}": np.zeros((8, 8, 3), np.uint8) for name in ("front", "wrist")}
    return {**pictures, "observation.state": np.zeros(3, np.float32), "prompt": "press"}


@pytest.mark.long
@pytest.mark.timeout(240)
def test_robots_stay_with_their_replica_and_more_robots_bring_another(start) -> None:
    _, ready = start("-c", PROGRAM, "8123")
    assert ready == "{}\n"
    with pytest.raises(ServingError):
        PolicyClient("ws://127.0.0.1:8123", connect_timeout_seconds=3)
    with ExitStack() as stack:
        robots = [stack.enter_context(PolicyClient("ws://127.0.0.1:8123", token="robot")) for _ in range(6)]
        first = [robot.infer(observation()).actions[0, 0] for robot in robots]
        end = time.monotonic() + 90
        while len({*first}) < 2 and time.monotonic() < end:
            stack.enter_context(late := PolicyClient("ws://127.0.0.1:8123", token="robot"))
            robots.append(late)
            first.append(late.infer(observation()).actions[0, 0])
            time.sleep(2)
        assert len({*first}) == 2, "a second replica was never added"
        for _ in range(5):
            assert [robot.infer(observation()).actions[0, 0] for robot in robots] == first


@pytest.mark.journey
@pytest.mark.timeout(240)
def test_a_bundle_is_served_by_replicas_and_left_on_sigterm(start, saved: Path) -> None:
    process, line = start("-m", "pi0fm.cli.main", "serve", "--bundle", str(saved), "--replicas", "1", "--port", "8124", "--device", "cpu")
    assert json.loads(line)["ready"] and json.loads(line)["replicas"] == 1
    with PolicyClient("ws://127.0.0.1:8124", token="robot", timeout_seconds=30) as policy:
        message = {"observation.images.base": np.zeros((40, 40, 3), np.uint8), "observation.state": np.zeros(4), "prompt": "press"}
        one, two = (policy.infer(message, noise_seed=3).actions for _ in range(2))
        assert np.array_equal(one, two) and one.shape == (4, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
