"""Tests of `pi0fm eval --follow.run`: the next bundle, the best one, an early stop; and of the run that saves the bundles."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from any_dataset import write_set
from small_policies import small_policy
from tiny_dataset import NETWORK

from pi0fm import files
from pi0fm.cli.main import main
from pi0fm.cluster import following
from pi0fm.cluster.following import bundles, follow
from pi0fm.eval.config import FollowConfig, FollowOptions
from pi0fm.policy.saved import bundle
from pi0fm.train.start.lease import hold_lease
from pi0fm_client.errors import ConfigError

__all__ = ["small_policy"]
SUCCESS = {100: 0.2, 200: 0.6, 300: 0.5, 400: 0.6, 500: 0.1}


@pytest.fixture
def leave(small_policy, tmp_path):
    """`leave(steps)` writes a bundle of the run in tmp_path / run, `leave(steps, "bundle")` that of its end."""

    def write(steps: int, name: str = "") -> Path:
        path = tmp_path / "run" / (name or f"bundles/step-{steps:09d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        config = replace(small_policy.config, training={"steps": str(steps)})
        bundle.save(path, small_policy.weights, config, small_policy.stats)
        return path

    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run/run.json", {})
    return write


def evaluating(asked: list[str], meanwhile=lambda steps: None):
    """An evaluation that finds SUCCESS; meanwhile: what the run does in that time."""

    def evaluate(config) -> None:
        steps = int(bundle.read(Path(config.policy))[0].training["steps"])
        asked.append(config.policy)
        figures = {"mean_success": SUCCESS[steps], "mean_interval": [0, 1], "episodes": 20, "crashes": 0}
        files.write_json(Path(config.output_dir) / "summary.json", figures)
        meanwhile(steps)

    return evaluate


def config(run: Path, **given) -> FollowConfig:
    return FollowConfig(tasks="reach-v3", follow=FollowOptions(run=run, **given))


def test_the_best_bundle_is_kept_and_every_one_is_judged_once(leave, tmp_path):
    run, asked = tmp_path / "run", []
    for steps in (100, 200, 300):
        leave(steps)
    leave(400, "bundle")
    found = follow(config(run), evaluating(asked))
    assert [row["steps"] for row in found["evaluations"]] == [100, 200, 300, 400] and not found["asked_to_stop"]
    assert found["best"]["steps"] == 200  # the earlier of two that are alike
    assert json.loads((run / "best.json").read_text()) == found["best"]
    assert set(bundles(run)) == {200, 400}
    assert follow(config(run), evaluating(asked))["best"] == found["best"] and len(asked) == 4
    assert set(bundles(run)) == {200, 400}


def test_a_run_that_trains_is_followed_and_asked_to_stop(leave, tmp_path, monkeypatch):
    """The run saves a bundle while the previous one is evaluated, and ends when it finds STOP."""
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.01)
    run, asked = tmp_path / "run", []

    def trains() -> None:
        with hold_lease(run):
            for _ in range(2000):
                if (run / "STOP").exists():
                    return
                time.sleep(0.01)

    training = threading.Thread(target=trains)
    training.start()

    def meanwhile(steps: int) -> None:
        assert not (run / "STOP").exists() or steps == 500
        if steps < 500:
            leave(steps + 100)

    while not (run / ".running").exists():
        pass
    leave(100)
    found = follow(config(run, patience=2, keep="all"), evaluating(asked, meanwhile))
    training.join()
    assert found["asked_to_stop"] and (run / "STOP").exists() and found["best"]["steps"] == 200
    assert set(bundles(run)) == {100, 200, 300, 400, 500}


def test_what_is_refused(tmp_path, leave, capsys, monkeypatch):
    monkeypatch.setattr(following, "SECONDS_TO_START", 0.01)
    with pytest.raises(ConfigError, match="found no run"):
        follow(config(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="ended without a bundle"):
        follow(config(tmp_path / "run"))
    words = ["eval", "--follow.run", str(tmp_path / "run"), "--tasks", "reach-v3"]
    for more, said in ((["--policy", "x"], "leave one of the two out"), (["--follow.patience", "-1"], "must be 0 or more")):
        assert main([*words, *more]) == 2 and said in capsys.readouterr().err


def test_a_run_leaves_bundles_on_its_way(tmp_path, capsys):
    root = write_set(tmp_path / "set", (8, 8))
    network = {"precision": "float32", "model": NETWORK, "steps": 4, "num_workers": 0, "threads": 1, "global_batch_size": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(network | {"execution_horizon": 4, "bundle_every": 2}))
    words = ["train", str(tmp_path / "run.yaml"), "--dataset.root", str(root), "--dataset.cache_dir", str(tmp_path / "cache")]
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    found = bundles(tmp_path / "run")
    assert {steps: path.name for steps, path in found.items()} == {2: "step-000000002", 4: "bundle"}
    assert bundle.load(found[2]).metadata["identity"] != bundle.load(found[4]).metadata["identity"]
    assert main([*words, "--output_dir", str(tmp_path / "other"), "--bundle_every", "-1"]) == 2
    assert "bundle_every must be >= 0" in capsys.readouterr().err
