"""Test of the command line end to end: record, train on two Ray workers, resume, evaluate, serve, query.

Each step uses what the one before it left on disk, as a user's would. Sizes are the smallest that still go through every part.
"""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0fm.cli.main import main
from pi0fm_client import PolicyClient

TASK = "button-press-topdown-v3"
PI0FM = (sys.executable, "-m", "pi0fm.cli.main")


def command(*words: object) -> tuple[dict[str, Any], str]:
    """Run a command; its last line of standard output as JSON, and standard error."""
    done = subprocess.run([*PI0FM, *map(str, words)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def refused(*words: object) -> tuple[int, str]:
    """Exit code and the one line of a command that is refused; in this process, since it ends before anything is started."""
    complaint = io.StringIO()
    with redirect_stderr(complaint):
        code = main([str(word) for word in words])
    assert code != 0 and len(complaint.getvalue().strip().splitlines()) == 1
    return code, complaint.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("journey") / "dataset"
    result, _ = command("demos", "--tasks", TASK, "--episodes", 4, "--dataset.root", root, "--num_workers", 2)
    assert result["episodes"] == 4 and result["root"] == str(root)
    return root


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on two Ray workers, then resumed for 5 more in one process."""
    output = tmp_path_factory.mktemp("journey") / "run"
    words = ("train", "configs/quickstart.yaml", "--dataset.root", dataset, "--output_dir", output, "--batch_size", 8, "--log_every", 5)
    words += ("--dataset.cache_dir", output.parent / "frames", "--checkpoint_every", 10)
    result, shown = command(*words, "--steps", 20, "--num_workers", 2)
    assert result["steps"] == 20 and "left" in shown
    first = json.loads((output / "bundle" / "config.json").read_text())
    assert first["policy"]["training"]["steps"] == "20"
    code, complaint = refused(*words, "--steps", 25, "--num_workers", 0)
    assert code == 1 and "--resume true" in complaint
    result, shown = command(*words, "--steps", 25, "--num_workers", 0, "--resume", "true")
    assert result["steps"] == 25 and "resumed from step 20" in shown
    return output


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    process = subprocess.Popen([*PI0FM, "serve", "--bundle", str(run / "bundle"), "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["ready"] is True
    yield ready["url"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_a_run_leaves_metrics_checkpoints_and_both_bundles(run: Path) -> None:
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 25]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000000020", "step-000000025"]
    assert (run / "bundle" / "manifest.json").exists() and (run / "bundle-20" / "manifest.json").exists()
    assert any((run / "tensorboard").iterdir())


def test_the_bundle_knows_which_seeds_were_demonstrated(run: Path) -> None:
    policy = json.loads((run / "bundle" / "config.json").read_text())["policy"]
    low, high = policy["demonstration_seeds"][TASK]
    assert high - low >= 3
    code, complaint = refused("eval", "--policy", run / "bundle", "--tasks", TASK, "--first_seed", low, "--output_dir", run / "no")
    assert code == 2 and str(low) in complaint and not (run / "no").exists()


def test_two_episodes_are_judged(run: Path, tmp_path: Path) -> None:
    words = ("eval", "--policy", run / "bundle", "--tasks", TASK, "--episodes", 2, "--max_steps", 40, "--output_dir", tmp_path / "eval")
    result, _ = command(*words, "--metrics", run / "metrics.jsonl", "--num_workers", 2)
    assert set(result["success"]) == {TASK} and 0 <= result["mean_success"] <= 1 and result["crashes"] == 0
    rows = json.loads((tmp_path / "eval" / "episodes.json").read_text())
    assert [row["seed"] for row in rows] == [1, 2] and all(row["steps"] <= 40 for row in rows)
    page = Path(result["report"]).read_text()
    assert "data:video/mp4;base64," in page and "data:image/png;base64," in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_served_policy_answers_and_is_judged_over_the_socket(run: Path, server: str, tmp_path: Path) -> None:
    import pi0fm

    observation = {
        "observation.images.base": np.full((96, 96, 3), 127, np.uint8),
        "observation.state": np.zeros(4, np.float32),
        "prompt": "press the button from above",
    }
    local = pi0fm.load(str(run / "bundle"))
    with PolicyClient(server) as client:
        served = client.infer(observation, noise_seed=7)
    np.testing.assert_allclose(served.actions, local.infer(observation, noise_seed=7).actions, atol=1e-5)
    words = ("eval", "--policy", server, "--tasks", TASK, "--episodes", 2, "--max_steps", 24, "--output_dir", tmp_path / "served")
    result, _ = command(*words, "--num_workers", 0)
    assert result["episodes"] == 2 and result["crashes"] == 0
