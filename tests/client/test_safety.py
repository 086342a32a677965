"""Tests of a robot's limits, and of the check that observations are in the training range."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.safety import Limiter, Limits, ObservationCheck

METADATA = {
    "cameras": {"base": "observation.images.base", "wrist": "observation.images.wrist"},
    "state_key": "observation.state",
    "state_range": {"min": [-1.5, -1.0, 0.0], "max": [1.5, 1.0, 0.08]},
}


def observation(state: Any = (0.1, 0.2, 0.04), *cameras: str) -> dict[str, Any]:
    images = {f"observation/images/{name}": np.zeros((2, 2, 3), np.uint8) for name in cameras or ("base", "wrist")}
    return {**images, "observation/state": np.asarray(state, np.float32), "prompt": "press"}


@settings(max_examples=200, deadline=None)
@given(
    wanted=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    velocity=st.sampled_from([0.01, 0.3, np.inf]),
    acceleration=st.sampled_from([0.003, 0.05, 1.0, np.inf]),
    increment=st.booleans(),
)
def test_every_command_is_within_every_limit(wanted: list[float], velocity: float, acceleration: float, increment: bool) -> None:
    """The bounds of change, of its change and of position hold together: it brakes in time before a bound."""
    tree = {"low": -1, "high": 1, "velocity": velocity, "acceleration": acceleration, "increments": [0] if increment else []}
    limiter = Limiter(Limits.read(tree, 1), [0.0])
    commands = [0.0, 0.0]
    for value in wanted:
        command = limiter.nearest(np.array([value]))
        limiter.commit(command)
        commands.append(float(command[0]))
    changes = np.diff(commands)
    assert max(map(abs, commands)) <= 1
    if increment:
        assert max(map(abs, commands)) <= velocity and abs(changes).max() <= acceleration * (1 + 1e-9)
    else:
        assert abs(changes).max() <= velocity * (1 + 1e-9) and abs(np.diff(changes)).max(initial=0) <= acceleration + 1e-12


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.003, 0.05, 1.0]),
    st.sampled_from([{}, {"low": -1, "high": 1, "velocity": [0.3, 0.01, None], "acceleration": [0.05, None, 0.2], "increments": [2]}]),
)
def test_commands_ahead_are_those_that_are_given_one_after_another(seed: int, spread: float, tree: dict[str, Any]) -> None:
    random = np.random.default_rng(seed)
    limiter = Limiter(Limits.read(tree, 3), random.uniform(-1, 1, 3))
    for _ in range(2):
        limiter.commit(limiter.nearest(limiter.command + random.normal(size=3) * 0.01))
    rows = limiter.command + np.cumsum(random.normal(size=(12, 3)) * spread, axis=0)
    found, whole = limiter.ahead(rows)
    before = limiter.command.copy()
    assert np.array_equal(limiter.command, before), "nothing is given yet"
    differing = []
    for row, expected in zip(rows, found, strict=True):
        command = limiter.nearest(row)
        assert np.allclose(command, expected, rtol=0, atol=1e-5)
        differing.append(not np.allclose(command, row, rtol=1e-6, atol=1e-6))
        limiter.commit(command)
    assert whole == (differing.index(True) if True in differing else 12) and (bool(tree) or whole == 12)
    assert limiter.ahead(np.zeros((0, 3)))[1] == 0


def test_what_is_allowed_is_not_changed_and_the_bound_is_reached() -> None:
    limiter = Limiter(Limits.read({"low": -1, "high": 1, "velocity": 0.3, "acceleration": 0.1}, 2), [0.0, 0.5])
    assert np.array_equal(limiter.nearest(np.array([0.05, 0.45])), [0.05, 0.45])
    for _ in range(40):
        limiter.commit(limiter.nearest(np.array([1.0, -1.0])))
    assert np.allclose(limiter.command, [1.0, -1.0], atol=1e-12)


SO101 = {"low": [-110, -100, 0], "high": [110, 100, 100]}  # training's range, degrees and percent
ARM = {"low": [-1.9, -1.7, 0], "high": [1.9, 1.7, 1.7]}  # the same, radians


@pytest.mark.parametrize(
    ("limits", "trained", "words"),
    [
        ({"velocity": 0.05, "acceleration": 0.02}, ARM, None),
        ({"velocity": 3.0, "acceleration": 1.2}, SO101, None),
        (
            {"velocity": 0.05, "acceleration": 0.02},
            SO101,
            "by 0.05 in a control step, do not suit its range.*-110 .. 110, radians for degrees",
        ),
        ({"velocity": 3.0}, ARM, "from -inf to inf by 3 in a control step.*, degrees for radians"),
        ({"low": -2, "high": 2}, SO101, "from -2 to 2 by inf.*, radians for degrees"),
        ({"low": -120, "high": 120}, SO101, None),
        ({"low": 150, "high": 160}, SO101, r"from 150 to 160 .*-110 \.\. 110: check their units"),
        ({"velocity": 0.05, "increments": [0, 1, 2]}, SO101, None),
        ({}, SO101, None),
    ],
)
def test_limits_in_other_units_than_the_training_are_doubted(limits: dict[str, Any], trained: dict[str, Any], words: str | None) -> None:
    ends = [np.array(trained[end], np.float64) for end in ("low", "high")]
    found = Limits.read(limits, 3).doubt(*ends, control_hz=50)
    assert (found is None) if words is None else re.search(words, found or "")
    assert Limits.read(limits, 3).doubt(*(np.full(3, np.nan),) * 2, control_hz=50) is None, "nothing is known"


def test_units_are_of_one_spelling_and_must_agree() -> None:
    ours, theirs = Limits.read({"units": "Degrees"}, 2), Limits.read({"units": [None, "deg"]}, 2)
    assert ours.units == ("deg", "deg") == ours.stricter(theirs).units == theirs.stricter(ours).units
    assert Limits.read({}, 2).units == () == Limits.read({"units": None}, 2).units
    with pytest.raises(ConfigError, match="found rad for dimension 1, which the policy has in deg: write them in deg"):
        Limits.read({"units": "rad"}, 2).stricter(theirs)
    for wrong in (["deg"], 3, [1, 2]):
        with pytest.raises(ConfigError, match="units must be a text or 2 of them"):
            Limits.read({"units": wrong}, 2)


def test_a_robot_that_starts_outside_may_only_come_back_and_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        limiter = Limiter(Limits.read({"low": -1, "high": 1, "velocity": 0.5}, 1), [2.0])
        Limiter(Limits.read({"low": -1, "high": 1, "increments": [0]}, 1), [2.0])
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["the robot starts outside its limits in dimensions [0]"]
    assert limiter.nearest(np.array([3.0])) == 2.0
    assert limiter.nearest(np.array([0.0])) == 1.5
    assert limiter.nearest(limiter.standstill()) == 2.0


def test_standing_still_is_the_last_target_and_no_increment() -> None:
    limiter = Limiter(Limits.read({"increments": [1]}, 2), [0.3, 0.0])
    limiter.commit(np.array([0.4, 0.2]))
    assert np.array_equal(limiter.standstill(), [0.4, 0.0])


def test_limits_come_from_a_file_and_the_stricter_wins(tmp_path: Path) -> None:
    file = tmp_path / "arm.json"
    file.write_text(json.dumps({"high": [0.5, None], "velocity": 0.2, "increments": [1]}))
    both = Limits.read(file, 2).stricter(Limits.read({"low": -1, "high": 1, "velocity": [0.1, 0.3]}, 2))
    assert both.low.tolist() == [-1, -1] and both.high.tolist() == [0.5, 1] and both.velocity.tolist() == [0.1, 0.2]
    assert np.isinf(both.acceleration).all() and both.increments.tolist() == [False, True]
    with pytest.raises(ConfigError, match=r"exclude each other in dimensions \[0, 1\]"):
        both.stricter(Limits.read({"low": 2}, 2))


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"speed": 1}, "may hold low, high, velocity, acceleration, increments"),
        ({"low": [1]}, "low must be a number or 2 of them"),
        ({"low": "a"}, "low must be a number or 2 of them"),
        ({"low": True}, "low must be a number or 2 of them"),
        ({"acceleration": ["0.1", 1]}, "acceleration must be a number or 2 of them"),
        ({"high": float("nan")}, "high must be a number or 2 of them"),
        ({"low": 1, "high": 0}, "low must not be above high"),
        ({"velocity": 0}, "velocity must be above 0"),
        ({"acceleration": [1, -1]}, r"acceleration must be above 0.*dimensions \[1\]"),
        ({"low": 0.1, "increments": [0]}, "cannot stand still"),
        ({"increments": [5]}, "increments must be dimensions below 2"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tree: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        Limits.read(tree, 2)
    file = tmp_path / "arm.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=line):
        Limits.read(file, 2)


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"low": -1, "high": 1, "low": 0}'])
def test_a_file_that_holds_no_limits_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "arm.json").write_text(text)
    with pytest.raises(ConfigError, match=r"arm\.json"):
        Limits.read(tmp_path / "arm.json", 2)


def test_every_camera_must_be_there_unless_told() -> None:
    with pytest.raises(ObservationError, match=r"found no observation\.images\.wrist: send it, or say cameras="):
        ObservationCheck(METADATA)(observation((0, 0, 0), "base"))
    with pytest.raises(ObservationError, match="a flat map of keys, found list"):
        ObservationCheck(METADATA)([])  # type: ignore[arg-type]
    ObservationCheck(METADATA)(observation())
    ObservationCheck(METADATA, cameras=["base"])(observation((0, 0, 0), "base"))
    with pytest.raises(ConfigError, match=r"has the cameras \['base', 'wrist'\], found \['top'\]"):
        ObservationCheck(METADATA, cameras=["top"])


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (
            (50.0, -30.0, 0.04),
            r"observation\.state\[0\] was -1\.5 \.\. 1\.5 in training, found 50 \(2 of 3 outside, degrees for radians\?\)",
        ),
        ((0.1, 0.2, 40.0), r"state\[2\] was 0 \.\. 0\.08 in training, found 40 .*mm for m\?"),
        ((0.1, 5.0, 0.04), r"1 of 3 outside.*check its units and order"),
        ((np.nan, 0.0, 0.0), r"found nan"),
        ((0.0, 0.0), r"must have 3 numbers, found \[2\]"),
        ((), r"must have 3 numbers, found none: send one for each joint"),
    ],
)
def test_a_state_unlike_the_trainings_is_refused_or_warned_of(state: Any, line: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ObservationError, match=line):
        ObservationCheck(METADATA)(observation(state))
    warn = ObservationCheck(METADATA, mode="warn")
    with caplog.at_level(logging.WARNING):
        warn(observation(state))
        warn(observation(state))
    assert len(caplog.records) == 1
    ObservationCheck(METADATA, mode="off")(observation(state))


def test_a_dimension_is_named_where_the_policy_names_it() -> None:
    named = METADATA | {"state_names": ["pan", "lift", "grip"]}
    with pytest.raises(ObservationError, match=r"state\[1\] \(lift\) was "):
        ObservationCheck(named)(observation((0.1, 5.0, 0.04)))


def test_a_state_a_little_beyond_the_trainings_passes() -> None:
    ObservationCheck(METADATA)(observation((2.0, -1.4, 0.1)))
    with pytest.raises(ConfigError, match="a state check must be one of refuse, warn, off"):
        ObservationCheck(METADATA, mode="on")  # type: ignore[arg-type]
