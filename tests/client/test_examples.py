"""The 50-Hz program and the guide's loop, against a local server that takes 100 ms for a chunk."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def slow_server(start_server: Any, fake_policy: Any) -> Any:
    return start_server(fake_policy(seconds=0.1, horizon=32))


def test_the_program_for_a_50_hz_arm_keeps_its_rate(slow_server: Any, repository: Path) -> None:
    program = repository / "examples" / "robot_at_50hz.py"
    code = [line for line in program.read_text().splitlines() if line.strip()]
    assert len(code) <= 30
    command = [sys.executable, program, slow_server.url, "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    counts = {name: float(value) for name, value in re.findall(r"(\w+)=(\d+)", done.stdout)}
    assert counts["steps"] + counts["skipped_rows"] > 0 and 40 <= counts["steps"] <= 50
    assert counts["chunks"] >= 2 and 5 <= counts["inference_delay"] <= 12
    assert counts["holds"] < counts["steps"] / 2 and counts["failures"] == 0


def test_the_guides_loop_runs(slow_server: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "docs" / "guides" / "robot_at_50hz.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (limits,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert set(json.loads(limits)) == {"low", "high", "velocity", "acceleration", "increments", "units"}
    (tmp_path / "arm.json").write_text(limits)
    monkeypatch.chdir(tmp_path)

    class Robot:
        def __init__(self) -> None:
            self.commands: list[np.ndarray] = []
            self.began = time.monotonic()

        def position(self) -> np.ndarray:
            return np.zeros(3)

        def works(self) -> bool:
            return len(self.commands) < 40

        def observe(self) -> dict[str, Any]:
            pictures = {f"observation.images.{name}": np.zeros((8, 8, 3), np.uint8) for name in ("front", "wrist")}
            return {**pictures, "observation.state": np.zeros(3, np.float32), "prompt": "press"}

        def apply(self, command: np.ndarray) -> None:
            self.commands.append(command)

    robot = Robot()
    exec(compile(block.replace("ws://HOST:8000", slow_server.url), "guide", "exec"), {"robot": robot})
    assert time.monotonic() - robot.began >= 39 / 50
    assert 0 < robot.commands[-1][0] <= 2.9 and robot.commands[-1][2] <= 0.08
