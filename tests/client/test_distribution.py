"""Tests of the client's wheel, installed alone without torch, against a server of this process; pi0fm's wheel contains the client too."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0fm_client import PolicyClient

OLDEST = "3.10"
MAX_BYTES = 100_000
ASK = """
import importlib.util, json, sys
import numpy as np
from pi0fm_client import PolicyClient, RemotePolicy
from pi0fm_client.types import Observation

picture, state = np.full((8, 8, 3), 1, np.uint8), np.full(3, 2, np.float32)
flat = {"observation.images.front": picture, "observation.state": state, "prompt": "press"}
with PolicyClient(sys.argv[1]) as client, RemotePolicy(sys.argv[1]) as remote:
    one = client.infer(flat, noise_seed=5)
    other = remote.infer_batch([Observation({"front": picture}, state, "press")], [5])[0]
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2],
    "actions": one.actions.tolist(),
    "remote": other.actions.tolist(),
    "there": [name for name in ("torch", "pi0fm", "ray", "transformers") if importlib.util.find_spec(name)],
}))
"""


def run(*command: str | Path, **options: Any) -> str:
    """Standard output of a program that knows nothing of this one's environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=repository / "client")
    (built,) = folder.glob("*.whl")
    return built


def asked_from(python: Path, start_server: Any, folder: Path) -> dict[str, Any]:
    """What a client of that environment finds out about itself, after it got the answers that this process gets."""
    url = start_server().url
    found = json.loads(run(python, "-I", "-c", ASK, url, cwd=folder).splitlines()[-1])
    message = {
        "observation.images.front": np.full((8, 8, 3), 1, np.uint8),
        "observation.state": np.full(3, 2, np.float32),
        "prompt": "press",
    }
    with PolicyClient(url) as client:
        expected = client.infer(message, noise_seed=5).actions
    assert np.array_equal(np.float32(found["actions"]), expected)
    assert np.array_equal(np.float32(found["remote"]), expected)
    assert found["there"] == []
    return found


def test_the_wheel_is_small_and_holds_the_client_alone(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES
    packages = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"pi0fm_client"}


def test_the_wheel_alone_asks_a_server_without_torch(wheel: Path, start_server: Any, tmp_path: Path) -> None:
    """Needs no registry: the three libraries are this environment's, and nothing else of it can be imported."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    ours = Path(sysconfig.get_path("purelib"))
    theirs = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    zipfile.ZipFile(wheel).extractall(theirs)
    for name in ("numpy", "numpy.libs", "msgpack", "websockets"):
        if (ours / name).exists():
            (theirs / name).symlink_to(ours / name)
    asked_from(python, start_server, tmp_path)


@pytest.mark.timeout(300)
def test_the_wheel_alone_asks_a_server_from_the_oldest_python(wheel: Path, start_server: Any, repository: Path, tmp_path: Path) -> None:
    found = subprocess.run([repository / ".ci" / "find-python", OLDEST], capture_output=True, text=True, timeout=60, check=False)
    if found.returncode:
        pytest.skip(f"no Python {OLDEST} on this machine")
    run(found.stdout.strip(), "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needs = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    fetched = subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], capture_output=True, text=True, timeout=240, check=False)
    if fetched.returncode:
        pytest.skip(f"numpy for Python {OLDEST} cannot be fetched here: {fetched.stderr.strip().splitlines()[-1]}")
    assert asked_from(python, start_server, tmp_path)["python"] == OLDEST


def test_pi0fm_has_the_clients_version_and_all_that_it_needs(repository: Path) -> None:
    """pi0fm's wheel holds the client instead of requiring it (docs/adr/0026)."""
    whole, client = (tomllib.loads((repository / path / "pyproject.toml").read_text())["project"] for path in ("", "client"))
    assert whole["version"] == client["version"]
    names = [{need.split(">")[0].split("[")[0] for need in project["dependencies"]} for project in (client, whole)]
    assert names[0] <= names[1]
