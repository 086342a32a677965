"""Test of README.md's commands in order in an empty folder, and of its Python with the resulting policy.

The words are the README's; a few options behind them make each run small. No path is among those, so the test also shows that what
one command writes is where the next one looks.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readme_blocks import blocks, command_lines, pi0fm_words

from pi0fm.cli.main import main

SMALLER = {
    "demos": "--tasks handle-press-v3 --episodes 1 --num_workers 0",
    "train": "--steps 2 --global_batch_size 4 --num_workers 0 --threads 1 --precision float32",
    "eval": "--tasks handle-press-v3 --episodes 1 --max_steps 16 --num_workers 0 --videos_per_task 0",
    "serve": "--port 0 --threads 1 --max_batch_size 1",
}


def first_command(name: str) -> list[str]:
    """The README's first line of `pi0fm NAME`, made small."""
    words = next(words for command in command_lines() if (words := pi0fm_words(command)) and words[0] == name)
    return [*words, *SMALLER[name].split()]


def run(name: str) -> dict[str, Any]:
    """The result that the command prints as its last line."""
    if name == "train":  # a process of its own: accelerate keeps the precision of whatever trained before in this one
        command = [sys.executable, "-m", "pi0fm.cli.main", *first_command(name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(first_command(name)) == 0
    return dict(json.loads(printed.getvalue().splitlines()[-1]))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Path]:
    """An empty folder with configs/ in it, as the current directory; decoded frames are kept there too."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(repository / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def results(workplace: Path) -> dict[str, dict[str, Any]]:
    """What the first three commands print, by command; run once."""
    return {name: run(name) for name in ("demos", "train", "eval")}


@pytest.fixture(scope="module")
def namespace(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the README's Python blocks see: one namespace, as in one session."""
    return {}


def test_record_train_evaluate(workplace: Path, results: dict[str, dict[str, Any]]) -> None:
    assert results["demos"]["episodes"] == 1
    assert results["train"]["steps"] == 2
    assert (workplace / results["train"]["bundle"] / "manifest.json").is_file()
    assert results["eval"]["episodes"] == 1 and results["eval"]["crashes"] == 0
    assert (workplace / results["eval"]["report"]).stat().st_size > 1000


def test_the_python_blocks_run(namespace: dict[str, Any]) -> None:
    for block in blocks("python"):
        if "PolicyClient" not in block.text:
            exec(compile(block.text, "README.md", "exec"), namespace)
    chunk = namespace["chunk"]
    assert chunk.actions.shape == (16, 4) and chunk.actions.dtype == np.float32 and np.isfinite(chunk.actions).all()


def test_a_robot_is_driven_over_the_network(workplace: Path, namespace: dict[str, Any]) -> None:
    executed: list[np.ndarray] = []

    class Robot:
        def observe(self) -> dict[str, Any]:
            return dict(namespace["observation"])

        def apply(self, action: np.ndarray) -> None:
            executed.append(action)

        def works(self) -> bool:
            return len(executed) < 16

    client = next(block.text for block in blocks("python") if "PolicyClient" in block.text)
    command = [sys.executable, "-m", "pi0fm.cli.main", *first_command("serve")]
    server = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, env=dict(os.environ), text=True)
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["ready"] is True
        address = re.search(r"ws://[\w.:]+", client)
        assert address is not None
        exec(compile(client.replace(address[0], ready["url"]), "README.md", "exec"), {"robot": Robot()})
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    assert server.returncode == 0
    assert len(executed) == 16 and all(action.shape == (4,) for action in executed)
