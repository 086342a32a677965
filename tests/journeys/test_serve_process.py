"""Tests of `pi0fm serve` in a separate process with a small policy: the ready line, a query, a signal, the exit code."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policies import saved, small_policy

from pi0fm_client import PolicyClient
from pi0fm_client.errors import ServingError

pytestmark = pytest.mark.journey
__all__ = ["saved", "small_policy"]

STAND_IN = """
import sys, time, types
import numpy as np
from pi0fm_client.types import ActionChunk, Observation

class Tiny:
    metadata = {"cameras": {"front": "image"}, "state_key": "state", "state_dim": 2, "image_size": [8, 8]}
    def observation(self, message):
        return Observation({"front": message["image"]}, message["state"], message["prompt"])
    def infer_batch(self, observations, noise_seeds=None):
        time.sleep(max(float(o.state[1]) for o in observations))
        return [ActionChunk(o.state[None] + 1) for o in observations]

loads = []
def load(path, options, guidance):
    loads.append(path)
    print("loading now", file=sys.stderr, flush=True)
    time.sleep(30 if str(path) == "slow" else 0)
    Tiny.metadata = Tiny.metadata | {"identity": f"{len(loads)}"}
    return Tiny()

stand_in = types.ModuleType("pi0fm.policy.saved.bundle")
stand_in.load = load
sys.modules["pi0fm.policy.saved.bundle"] = stand_in
from pi0fm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def served(bundle: str, tmp_path: Path, *words: str, open_files: int | None = None) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    command = [sys.executable, str(script), "serve", "--bundle", bundle, "--port", "0", *words]
    if open_files is not None:
        command = ["sh", "-c", f'ulimit -n {open_files} && exec "$@"', "sh", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_ready_answers_and_leaves_with_zero(number: signal.Signals, tmp_path: Path) -> None:
    with served("b", tmp_path) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["ready"] is True and ready["url"].startswith("ws://127.0.0.1:") and ready["bundle"] == "b"
        with PolicyClient(ready["url"]) as client:
            chunk = client.infer({"image": np.zeros((8, 8, 3), np.uint8), "state": np.float32([1, 0]), "prompt": ""})
            assert chunk.actions.tolist() == [[2.0, 1.0]]
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out == "" and "Traceback" not in err and err.endswith("stopped serving\n")


def test_a_signal_during_the_load_ends_it_with_zero(tmp_path: Path) -> None:
    with served("slow", tmp_path) as process:
        assert process.stderr is not None
        while "loading now" not in (line := process.stderr.readline()):
            assert line, "it ended before it loaded"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "" and "Traceback" not in err


def observation(number: float, seconds: float) -> dict[str, Any]:
    return {"image": np.zeros((8, 8, 3), np.uint8), "state": np.float32([number, seconds]), "prompt": ""}


def test_a_signal_throws_no_answer_away(tmp_path: Path) -> None:
    """Eight robots wait for two batches of half a second when the signal comes."""
    with served("b", tmp_path, "--max_batch_size", "4") as process, ThreadPoolExecutor(8) as threads:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        clients = [PolicyClient(url, reconnect=False) for _ in range(8)]
        chunks = [threads.submit(client.infer, observation(number, 0.5)) for number, client in enumerate(clients)]
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert [float(chunk.result().actions[0, 0]) for chunk in chunks] == [number + 1 for number in range(8)]
        for client in clients:
            with pytest.raises(ServingError, match="1001"):
                client.infer(observation(0, 0))
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err, err


def test_a_stuck_policy_does_not_keep_the_process(tmp_path: Path) -> None:
    with served("b", tmp_path) as process, ThreadPoolExecutor(1) as threads:
        assert process.stdout is not None
        client = PolicyClient(json.loads(process.stdout.readline())["url"], timeout_seconds=30, reconnect=False)
        asking = threads.submit(client.infer, observation(0, 1000))
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=28)
        assert time.monotonic() - began < 26 and asking.exception() is not None


def test_silent_sockets_cost_no_descriptor_that_a_robot_needs_and_no_log(tmp_path: Path) -> None:
    with served("b", tmp_path, open_files=256) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        silent = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(300)]
        with PolicyClient(url, connect_timeout_seconds=5) as client:
            assert client.infer(observation(3, 0)).actions[0, 0] == 4
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0 and len(err) < 20_000, err[-2000:]
        for each in silent:
            each.close()


def test_a_hangup_loads_the_bundle_anew(tmp_path: Path) -> None:
    with served("b", tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        with PolicyClient(url) as client:
            assert client.metadata["identity"] == "1" and client.infer(observation(3, 0)).actions[0, 0] == 4
            process.send_signal(signal.SIGHUP)
            while "serving 2 instead of 1" not in (line := process.stderr.readline()):
                assert line, "it ended"
        with PolicyClient(url) as client:
            assert client.metadata["identity"] == "2" and client.infer(observation(3, 0)).actions[0, 0] == 4


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, pi0fm_client.client; print(sorted({'torch', 'ray', 'transformers', 'uvicorn', 'starlette'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == "[]\n"


def test_what_a_process_served_is_replayed_and_its_page_shows_it(saved: Path, tmp_path: Path) -> None:
    words = ["serve", "--bundle", str(saved), "--port", "0", "--device", "cpu", "--threads", "1", "--live", "true"]
    command, environment = [sys.executable, "-m", "pi0fm.cli.main"], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words += ["--log_requests", str(tmp_path / "log")]
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with PolicyClient(url) as client:
                for value in range(3):
                    picture = np.full((40, 40, 3), value, np.uint8)
                    client.infer({"observation.images.base": picture, "observation.state": np.zeros(4), "prompt": "press"})
                with urllib.request.urlopen(url.replace("ws", "http", 1) + "/live/data", timeout=10) as page:
                    assert json.loads(page.read())["robots"][0]["prompt"] == "press"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    done = subprocess.run([*command, "replay", str(tmp_path / "log")], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] == found["identical"] == 3 and found["differs"] == []
