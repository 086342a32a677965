"""Tests of openpi's client, in a separate environment, against the server."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_server import METADATA

from pi0fm.serve.keys import read_keys

NEEDS = ["openpi-client==0.1.2", "typing-extensions"]  # its own metadata forgets the second
PYTHONS = ("3.11", "3.10")  # it needs numpy below 2
PROGRAM = """
import json, sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy(sys.argv[1], api_key="s3cret")
def observation(number):
    return {
        "observation/exterior_image_1_left": np.full((8, 8, 3), number, np.uint8),
        "observation/joint_position": np.zeros(2, np.float64),
        "observation/gripper_position": np.float32([1]),
        "prompt": "press",
    }
broker = ActionChunkBroker(policy, action_horizon=2)
one_by_one = [broker.infer(observation(10 * number))["actions"].tolist() for number in range(4)]
whole = policy.infer(observation(5))
try:
    WebsocketClientPolicy(sys.argv[1], api_key="wrong")
    wrong = "accepted"
except Exception as error:
    wrong = str(error)
try:
    policy.infer({"prompt": "press"})
    refused = "answered"
except RuntimeError as error:
    refused = str(error)
print(json.dumps({
    "metadata": sorted(policy.get_server_metadata()), "one_by_one": one_by_one, "whole": whole["actions"].tolist(),
    "keys": sorted(whole), "wrong": wrong, "refused": refused, "numpy": np.__version__,
}))
"""


@pytest.fixture(scope="module")
def openpi_python(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with openpi-client; skips where there is none or the registry is not reached."""
    folder = tmp_path_factory.mktemp("openpi") / "venv"
    tried = [
        subprocess.run([repository / ".ci" / "find-python", version], capture_output=True, text=True, check=False) for version in PYTHONS
    ]
    found = next((one.stdout.strip() for one in tried if one.returncode == 0), None)
    if found is None:
        pytest.skip("openpi-client needs Python 3.10 or 3.11, and none is here")
    subprocess.run([found, "-m", "venv", folder], check=True, timeout=120)
    fetched = subprocess.run(
        [folder / "bin" / "pip", "install", "--quiet", *NEEDS], capture_output=True, text=True, check=False, timeout=240
    )
    if fetched.returncode:
        pytest.skip(f"openpi-client cannot be fetched here: {fetched.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


@pytest.mark.timeout(400)
def test_openpis_own_client_is_answered_and_sees_no_extension(openpi_python: Path, start_server: Any, tmp_path: Path) -> None:
    keys = tmp_path / "droid.yaml"
    keys.write_text(
        "observation/exterior_image_1_left: observation.images.front\n"
        "observation/joint_position: observation.state\nobservation/gripper_position: observation.state\n"
    )
    server = start_server(token="s3cret", keys=read_keys(keys, METADATA))
    command = [openpi_python, "-I", "-c", PROGRAM, server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["numpy"].startswith("1.") and {"action_horizon", "cameras"} <= set(found["metadata"])
    # FakePolicy: actions[h] = state + h + the picture's first byte; a chunk serves two steps, so pictures 0 and 2 are asked about
    assert found["one_by_one"] == [[0, 0, 1], [1, 1, 2], [20, 20, 21], [21, 21, 22]]
    assert found["whole"] == [[5 + h, 5 + h, 6 + h] for h in range(4)]
    assert found["keys"] == ["actions", "policy_timing", "server_timing"]
    assert "401" in found["wrong"] and "found no observation/joint_position" in found["refused"]
