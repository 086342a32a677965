"""`pi0fm serve` as a process of its own, around a policy of a few lines: the ready line, a query, a signal, the exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pi0fm_client import PolicyClient

pytestmark = pytest.mark.journey

STAND_IN = """
import sys, time, types
import numpy as np
from pi0fm_client.types import ActionChunk, Observation

class Tiny:
    metadata = {"cameras": {"front": "image"}, "state_key": "state", "state_dim": 2, "image_size": [8, 8]}
    def observation(self, message):
        return Observation({"front": message["image"]}, message["state"], message["prompt"])
    def infer_batch(self, observations, noise_seeds=None):
        return [ActionChunk(o.state[None] + 1) for o in observations]

def load(path, options):
    print("loading now", file=sys.stderr, flush=True)
    time.sleep(30 if str(path) == "slow" else 0)
    return Tiny()

stand_in = types.ModuleType("pi0fm.policy.bundle")
stand_in.load = load
sys.modules["pi0fm.policy.bundle"] = stand_in
from pi0fm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def served(bundle: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    command = [sys.executable, str(script), "serve", "--bundle", bundle, "--port", "0"]
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
            chunk = client.infer({"image": np.zeros((8, 8, 3), np.uint8), "state": np.ones(2, np.float32), "prompt": ""})
            assert chunk.actions.tolist() == [[2.0, 2.0]]
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


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, pi0fm_client.client; print(sorted({'torch', 'ray', 'transformers', 'uvicorn', 'starlette'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == "[]\n"
