"""Tests of a bundle of several robots: one network, and columns, widths, statistics and facts by robot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pi0fm
from pi0fm import files
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.policy.saved import bundle, robots
from pi0fm.policy.saved.manifest import write_manifest
from pi0fm.policy.saved.robots import Robot, Robots
from pi0fm_client.errors import BundleError, ConfigError, ObservationError
from pi0fm_client.types import Observation

CRANE = Embodiment("crane", {"wrist": "observation.images.hook"}, state="joints", state_dim=2, robot_action_dim=5)


@pytest.fixture(scope="session")
def own(small_policy) -> Robots:
    """The small policy's robot, and one that is wider in its actions and narrower in its state."""
    config = small_policy.config
    first = Robot(config.embodiment, config.fps, config.demonstration_seeds, config.camera_sources, config.training)
    random = np.random.default_rng(3)
    columns = [column_stats(random.normal(5, 7, (40, width)).astype(np.float32), name) for width, name in ((2, "state"), (5, "action"))]
    second = Robot(CRANE, 25.0, {"lift": [1, 4], "press": [7, 12]}, {"wrist": "gripperPOV:64x64"}, {"dataset": "sets/crane"})
    return {"arm": (first, small_policy.stats), "crane": (second, NormStats(*columns, 40))}


@pytest.fixture(scope="session")
def several(small_policy, own, tmp_path_factory) -> Path:
    """The bundle; copy it before changing it."""
    path = tmp_path_factory.mktemp("several") / "bundle"
    bundle.save(path, small_policy.weights, small_policy.config, small_policy.stats, own)
    return path


@pytest.fixture
def copy(several, tmp_path) -> Path:
    return Path(shutil.copytree(several, tmp_path / "copy"))


def test_what_was_saved_is_what_is_read(several, small_policy, own):
    assert bundle.robot_names(several) == ("arm", "crane")
    for name, (robot, stats) in own.items():
        config, found = bundle.read(several, name)
        assert config == replace(small_policy.config, **vars(robot))
        assert found.to_json() == stats.to_json()
    assert bundle.read(several)[0] == small_policy.config, "who names none, or knows of none, finds the first"


def test_each_robot_is_served_with_its_own_widths(several, small_policy, observations):
    arm, crane = (pi0fm.load(str(several), device="cpu", precision="float32", robot=name) for name in ("arm", "crane"))
    before = small_policy.in_memory().infer_batch(observations[:1], [1])[0]
    assert np.array_equal(arm.infer_batch(observations[:1], [1])[0].actions, before.actions)
    seen = {"observation/images/hook": np.zeros((8, 8, 3), np.uint8), "joints": np.zeros(2, np.float32), "prompt": "lift"}
    assert crane.infer(seen, noise_seed=1).actions.shape == (4, 5)
    with pytest.raises(ObservationError, match="unknown observation key"):
        arm.infer(seen)
    with pytest.raises(ObservationError, match=r"joints must be numbers \[2\]"):
        crane.infer_batch([Observation({"wrist": np.zeros((8, 8, 3), np.uint8)}, np.zeros(4, np.float32), "lift")])


def test_a_server_says_whom_it_serves(several, saved):
    known = bundle.load(several, device="cpu", robot="crane").metadata
    assert known == bundle.metadata(several, "crane")
    expected = {"robot": "crane", "robots": ["arm", "crane"], "embodiment": "crane", "state_key": "joints", "robot_action_dim": 5}
    expected |= {"fps": 25.0, "demonstration_seeds": {"press": [3, 12], "lift": [1, 4]}, "camera_sources": {"wrist": "gripperPOV:64x64"}}
    assert {name: known[name] for name in expected} == expected
    assert bundle.metadata(several)["robot"] == "arm"
    assert not {"robot", "robots"} & bundle.metadata(saved).keys(), "a bundle of one data set says what it always said"
    assert json.loads(json.dumps(known)) == known


def test_an_unknown_robot_is_refused_with_the_nearest(several, saved):
    with pytest.raises(
        ConfigError, match=r"--robot must be a robot of the bundle .*, found 'crate': did you mean 'crane'.* known: arm, crane"
    ):
        bundle.load(several, device="cpu", robot="crate")
    assert bundle.read(saved, "robot")[0] == bundle.read(saved)[0], "a bundle of one data set knows its robot by its embodiment"
    with pytest.raises(ConfigError, match=r"found 'crane'.* known: robot"):
        bundle.read(saved, "crane")


def test_a_bundle_that_lost_its_robots_is_refused(copy):
    (copy / robots.FILE).unlink()
    with pytest.raises(BundleError, match=r"lacks robots\.json"):
        bundle.read(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "must hold one robot or more, found none"),
        ({"arm": {"policy": {}}}, "'arm' lacks them"),
        ({"arm": {"policy": {"embodiment": {}, "colour": "red"}, "norm_stats": {}}}, "arm: unknown option colour"),
        ({"arm": {"policy": {"embodiment": {}}, "norm_stats": {}}}, r"robots\.json, arm must hold statistics of 'state'"),
    ],
)
def test_robots_that_are_none(copy, content, words):
    files.write_json(copy / robots.FILE, content)
    write_manifest(copy)
    with pytest.raises(BundleError, match=words) as caught:
        bundle.read(copy, "arm")
    assert "\n" not in str(caught.value)
