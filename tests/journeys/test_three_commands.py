"""Test of three commands of a new user: from eight episodes of LeRobot's writer to a page and a served policy.

    pi0fm train tiny --dataset.root DATA    pi0fm eval --policy BUNDLE --dataset.root DATA    pi0fm serve BUNDLE

The arm is like an SO-101: five joints and a gripper, in degrees, two cameras.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pi0fm
from pi0fm_client import PolicyClient

pytestmark = pytest.mark.long
EPISODES, FRAMES, FPS, STEPS = 8, 60, 30, 200
JOINTS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]


def record(root: Path) -> Any:
    """Each episode reaches for a block at a different position, which both cameras see."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    joints = {"dtype": "float32", "shape": (len(JOINTS),), "names": JOINTS}
    camera = {"dtype": "video", "shape": (96, 128, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": joints, "action": joints, "observation.images.front": camera, "observation.images.wrist": camera}
    data = LeRobotDataset.create("local/arm", fps=FPS, features=features, root=root, robot_type="so101_follower", video_backend="pyav")
    for episode in range(EPISODES):
        goal = np.array([12 * episode - 42, 30, -40, 20, 5 * episode, 80], np.float32)
        for row in range(FRAMES):
            state, action = (goal * min(1, place / (FRAMES - 10)) for place in (row, row + 1))
            front = np.full((96, 128, 3), 60, np.uint8)
            front[30:60, 10 + 13 * episode : 26 + 13 * episode] = (200, 40, 40)
            wrist = np.roll(front, -row, axis=1)
            pictures = {"observation.images.front": front, "observation.images.wrist": wrist}
            data.add_frame({"observation.state": state, "action": action, "task": "reach for the block", **pictures})
        data.save_episode()
    data.finalize()
    return LeRobotDataset("local/arm", root=root, video_backend="pyav")


def typed(*words: str) -> dict[str, Any]:
    """The last line of a command that must end well."""
    done = subprocess.run([sys.executable, "-m", "pi0fm.cli.main", *words], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_data_set_becomes_a_served_policy_with_a_page(tmp_path: Path) -> None:
    data, root, out = record(tmp_path / "arm"), str(tmp_path / "arm"), tmp_path / "out"
    began = time.perf_counter()
    held = ("--validation.every", "100", "--validation.episodes", "2")
    trained = typed("train", "tiny", "--dataset.root", root, "--steps", str(STEPS), *held, "--output_dir", str(out))
    bundle = trained["bundle"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    errors = [line["validation_error"] for line in lines if "validation_error" in line]
    assert len(errors) == 2 and errors[1] < errors[0]
    typed("eval", "--policy", bundle, "--dataset.root", root, "--output_dir", str(tmp_path / "page"))
    assert "shoulder_pan" in (tmp_path / "page/report.html").read_text()
    command = [sys.executable, "-m", "pi0fm.cli.main", "serve", bundle, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            seconds = time.perf_counter() - began
            row = data[70]
            pictures = {key: (255 * row[key]).round().byte().permute(1, 2, 0).numpy() for key in row if "images" in key}
            with PolicyClient(ready["url"]) as client:
                served = client.infer(
                    {**pictures, "observation.state": row["observation.state"].numpy(), "prompt": row["task"]}, noise_seed=7
                )
        finally:
            server.terminate()
    chunk = pi0fm.load(bundle, device="cpu").infer(row, noise_seed=7)
    assert chunk.actions.shape == (16, len(JOINTS))
    np.testing.assert_allclose(chunk.actions, served.actions, rtol=1e-3, atol=1e-2)
    print(f"three commands: {seconds:.0f} s", file=sys.stderr)
