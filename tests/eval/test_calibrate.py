"""Tests of `pi0fm calibrate`: the episodes behind a threshold, and the alarms of an evaluation."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset
from eval_fakes import PointPolicy, point_setup
from small_policies import observations, saved, small_policy

from pi0fm.cli.main import main
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.eval.evaluate import in_this_process
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult
from pi0fm.eval.summary import summarize
from pi0fm.policy.saved import bundle, calibration

__all__ = ["observations", "saved", "small_policy"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset.written(tmp_path_factory)


def written(small_policy, path, dataset, held):
    """The bundle of a run on this data set that held these episodes out."""
    source = open_source(DatasetConfig(root=dataset), small_policy.config.embodiment)
    training = {"dataset_fingerprint": source.fingerprint, "held_out_episodes": held}
    bundle.save(path, small_policy.weights, replace(small_policy.config, training=training), small_policy.stats)
    return path


def test_the_threshold_is_of_the_largest_spread_of_each_held_out_episode(small_policy, dataset, tmp_path, capsys):
    path = written(small_policy, tmp_path / "bundle", dataset, "1,2")
    words = [str(path), "--dataset.root", str(dataset), "--false_alarm_rate", "0.4", "--device", "cpu", "--precision", "float32"]
    assert main(["calibrate", *words]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = calibration.read(path)
    assert (told["episodes"], told["trained_on"], found.stride, found.sampling) == (2, "no", 2, "euler, 4 steps")
    assert found.chunks == told["chunks"] == len(range(12, 21, 2)) + len(range(21, 28, 2))
    assert 0 < found.threshold == pytest.approx(told["largest_spreads"]["max"], rel=1e-4)
    again = calibration.threshold([told["largest_spreads"]["max"]] * 2, 0.4)
    assert again == told["largest_spreads"]["max"] and told["chunks_above"] == 0
    # the alarm is the bundle's from now on
    assert bundle.load(path, device="cpu").metadata["alarm"]["episodes"] == 2


def test_episodes_of_the_training_and_too_few_are_refused_before_a_picture_is_read(small_policy, dataset, tmp_path, capsys):
    path = written(small_policy, tmp_path / "bundle", dataset, "")
    words = [str(path), "--dataset.root", str(dataset)]
    assert main(["calibrate", *words]) == 2
    assert "trained on 3 of these 3; train with --validation.episodes N" in capsys.readouterr().err
    held = written(small_policy, tmp_path / "held", dataset, "1,2")
    assert main(["calibrate", str(held), *words[1:]]) == 2
    assert "needs 9 held-out episodes or more, found 2" in capsys.readouterr().err
    assert main(["calibrate", str(held), *words[1:], "--dataset.episodes", "[0,1]", "--false_alarm_rate", "0.5"]) == 2
    assert "trained on 1 of these 2" in capsys.readouterr().err


class Alarming(PointPolicy):
    """Raises an alarm at every second call."""

    def infer_batch(self, observations, noise_seeds=None):
        chunks = super().infer_batch(observations, noise_seeds)
        return [type(chunk)(chunk.actions, {}, {"spread": 1.0, "alarm": float(len(self.batches) % 2)}) for chunk in chunks]


def test_an_evaluation_counts_alarms_by_outcome():
    (watched,) = in_this_process([Episode("a", 1)], point_setup(policy=Alarming))
    assert watched.alarms == -(-np.ceil(watched.steps / 4) // 2) and watched.scores == () and watched.row()["alarms"] == watched.alarms
    (plain,) = in_this_process([Episode("a", 1)], point_setup())
    assert plain.alarms is None
    outcomes = [("success", 0), ("success", 2), ("failure", 5), ("crash", 3)]
    results = [EpisodeResult("push", seed, outcome, 8, 0.5, alarms=count) for seed, (outcome, count) in enumerate(outcomes)]
    found = summarize([*results, EpisodeResult("pull", 1, "success", 8, 0.5)], ["push", "pull"])
    assert found.json()["alarmed"] == {"push": {"success": [1, 2], "failure": [1, 1]}}
