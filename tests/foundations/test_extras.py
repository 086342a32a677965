"""Tests of pi0fm without extras: loading, verifying and serving a bundle work; other commands name the missing extra in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_policies import character_tokenizer, saved, small_policy
from without_extras import brought

from pi0fm.cli import main as command_line
from pi0fm_client import PolicyClient

pytestmark = pytest.mark.timeout(180)  # a process imports torch and transformers, on a machine that may be busy
__all__ = ["character_tokenizer", "saved", "small_policy"]

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"ray", "mujoco", "metaworld", "lerobot", "accelerate", "peft", "pyarrow", "matplotlib", "tensorboard", "av"}


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "support" / "without_extras.py"), *map(str, words)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "client")])
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})


def test_the_plain_package_brings_no_library_of_training_or_simulation() -> None:
    assert brought() & HEAVY == set()
    assert {"torch", "transformers", "starlette", "jinja2"} <= brought()


def test_without_extras_a_bundle_answers(saved: Path) -> None:
    process = start(ROOT / "examples" / "01_infer.py", saved)
    printed, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert len(printed.splitlines()) == 2  # its execution horizon


def test_without_extras_a_bundle_is_served(saved: Path) -> None:
    process = start("pi0fm", "serve", saved, "--port", 0, "--threads", 1, "--device", "cpu")
    try:
        assert process.stdout is not None and process.stderr is not None
        ready = process.stdout.readline()
        assert ready, process.stderr.read()
        with PolicyClient(json.loads(ready)["url"], timeout_seconds=20.0) as policy:
            assert policy.metadata["robot_action_dim"] == 3
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_without_extras_training_says_what_to_install() -> None:
    process = start("pi0fm", "train", "tiny", "--dataset.root", "nowhere")
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.endswith("found none; type pip install 'pi0fm[train]', or pi0fm[all]")


@pytest.mark.parametrize(("library", "extra"), [("ray", "train"), ("av", "train"), ("mujoco", "sim"), ("boto3", "s3"), ("torch", None)])
def test_each_library_of_an_extra_is_named_with_one_that_brings_it(library: str, extra: str | None) -> None:
    assert command_line.extra_with(library) == extra


def test_another_missing_module_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> int:
        raise ModuleNotFoundError("No module named 'pi0fm.gone'", name="pi0fm.gone")

    monkeypatch.setattr("pi0fm.cli.main.find", broken)
    with pytest.raises(ModuleNotFoundError):
        command_line.main(["train"])
