"""Tests of a calibrated bundle's alarm: its threshold by definition and by simulation, its file, its recipients."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from pi0fm.policy.sampling.best_of import BestOf
from pi0fm.policy.sampling.realtime import ActionPrefix
from pi0fm.policy.saved import bundle, calibration
from pi0fm.policy.saved.calibration import Calibration
from pi0fm.policy.saved.manifest import CALIBRATION, identity
from pi0fm_client.errors import BundleError, ConfigError


def made(path, **changes):
    facts = {"threshold": 1.0, "false_alarm_rate": 0.1, "episodes": 20, "chunks": 90, "stride": 2, "dataset": "demos"}
    facts |= {"of": identity(path), "robot": bundle.robot_names(path)[0], "sampling": "euler, 4 steps"}
    return Calibration(**facts | changes)


@pytest.fixture
def calibrated(saved, tmp_path):
    """A copy of the bundle, with a threshold of 1."""
    path = shutil.copytree(saved, tmp_path / "calibrated")
    calibration.write(path, made(path))
    return path


@pytest.mark.parametrize(
    ("count", "rate", "place"), [(9, 0.1, 9), (19, 0.1, 18), (20, 0.1, 19), (19, 0.05, 19), (40, 0.1, 37), (3, 0.5, 2)]
)
def test_the_threshold_is_the_definition(count, rate, place):
    values = np.random.default_rng(0).permutation(count) + 1.0
    assert calibration.threshold(values.tolist(), rate) == place == math.ceil((count + 1) * (1 - rate) - 1e-9)


@pytest.mark.parametrize(
    "draw", [np.random.Generator.standard_cauchy, np.random.Generator.exponential, np.random.Generator.standard_normal]
)
@pytest.mark.parametrize(("count", "rate"), [(19, 0.1), (30, 0.2)])
def test_new_episodes_raise_it_as_often_as_was_said_whatever_the_distribution(draw, count, rate):
    """Of independent episodes the chance is 1 - k / (n + 1): at most the rate, and less by 1 / (n + 1) at most."""
    random, trials = np.random.default_rng(1), 20_000
    known, fresh = draw(random, size=(trials, count)), draw(random, size=trials)
    alarms = np.mean([new > calibration.threshold(old.tolist(), rate) for old, new in zip(known, fresh, strict=True)])
    error = 4 * math.sqrt(rate * (1 - rate) / trials)
    assert rate - 1 / (count + 1) - error < alarms < rate + error


def test_too_few_episodes_and_rates_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"rate of 0\.1 needs 9 held-out episodes or more, found 8"):
        calibration.threshold([1.0] * 8, 0.1)
    assert [calibration.episodes_needed(rate) for rate in (0.1, 0.05, 0.5, 1 / 3)] == [9, 19, 1, 2]
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="must lie in"):
            calibration.episodes_needed(rate)


def test_a_calibrated_bundle_keeps_its_identity_and_says_when_a_chunk_is_an_alarm(calibrated, saved, observations):
    assert identity(calibrated) == identity(saved)
    plain = bundle.load(saved, device="cpu", precision="float32").infer_batch(observations, [1, 2, 3, 4])
    spreads = [chunk.scores["spread"] for chunk in plain]
    assert all("alarm" not in chunk.scores for chunk in plain) and len(set(spreads)) == 4
    middle = sorted(spreads)[1]
    calibration.write(calibrated, made(calibrated, threshold=middle))
    policy = bundle.load(calibrated, device="cpu", precision="float32")
    assert policy.metadata["alarm"] == {"threshold": middle, "false_alarm_rate": 0.1, "episodes": 20}
    found = policy.infer_batch(observations, [1, 2, 3, 4])
    assert [chunk.scores["alarm"] for chunk in found] == [float(spread > middle) for spread in spreads] and sum(
        spread > middle for spread in spreads
    ) == 2
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_array_equal(ours.actions, theirs.actions)
    assert policy.infer_best(observations[:1], BestOf(2), [1])[0].scores["alarm"] in (0.0, 1.0)


@pytest.mark.parametrize("guidance", ["guided", "guided_no_jacobian"])
def test_a_chunk_that_is_led_says_how_sure_the_policy_was_of_it(calibrated, observations, guidance):
    policy = bundle.load(calibrated, device="cpu", guidance=guidance)
    prefix = ActionPrefix(np.zeros((2, 3), np.float32), 1)
    led, free = policy.infer_batch(observations[:2], [1, 2], prefixes=[prefix, None])
    assert led.scores.keys() == free.scores.keys() == {"spread", "alarm"}
    assert free.scores["spread"] == pytest.approx(policy.infer_batch(observations[1:2], [2])[0].scores["spread"], rel=1e-3)


def test_a_threshold_for_other_flow_steps_is_not_used_and_that_is_said(calibrated, observations, capsys):
    policy = bundle.load(calibrated, device="cpu", num_flow_steps=3)
    assert "alarm" not in policy.metadata and "alarm" not in policy.infer_batch(observations[:1])[0].scores
    assert "was calibrated for robot, euler, 4 steps, loaded for robot, euler, 3 steps" in capsys.readouterr().err


def test_the_calibration_of_another_bundle_and_a_damaged_one_are_refused(calibrated):
    calibration.write(calibrated, made(calibrated, of="0" * 16))
    with pytest.raises(BundleError, match="must be of this bundle"):
        bundle.load(calibrated, device="cpu")
    for content in ("{}", "[1]", json.dumps({"threshold": "high"}), "{"):
        (calibrated / CALIBRATION).write_text(content)
        with pytest.raises(BundleError):
            calibration.read(calibrated)


def test_a_bundle_that_is_written_again_has_none(calibrated, small_policy, tmp_path):
    """Other weights have another spread: what a run writes over a calibrated bundle is not calibrated."""
    config = replace(small_policy.config, training={"steps": "8"})
    bundle.save(calibrated, small_policy.weights, config, small_policy.stats, keep_older=True)
    assert calibration.read(calibrated) is None and calibration.read(tmp_path / "calibrated-7") is not None
