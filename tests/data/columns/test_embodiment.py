"""Tests of a robot's columns and widths, and of flat maps of keys: an error is one line with the nearest name."""

import re
import shlex

import numpy as np
import pytest

from pi0fm import options
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.data.columns.embodiment import Embodiment, resolve
from pi0fm_client.errors import ConfigError, ObservationError

ROBOT = Embodiment(cameras={"base": "observation.images.base", "wrist": "observation.images.wrist"}, state_dim=3, robot_action_dim=2)
PICTURE = np.zeros((4, 6, 3), dtype=np.uint8)
GOOD = {"observation.images.base": PICTURE, "observation.images.wrist": PICTURE, "observation.state": [1, 2, 3], "prompt": "press"}
COLUMNS = {"observation.state": (3,), "action": (2,), "seed": (1,), "matrix": (2, 2)}
PICTURES = ["observation.images.base", "observation.images.wrist"]


def test_a_flat_map_becomes_an_observation():
    found = ROBOT.observation(GOOD)
    assert list(found.images) == ["base", "wrist"]
    assert found.state.dtype == np.float32
    assert found.state.tolist() == [1, 2, 3]
    assert found.prompt == "press"


def test_slashes_and_task_are_other_spellings():
    given = {key.replace(".", "/"): value for key, value in GOOD.items()}
    given["task"] = given.pop("prompt")
    assert ROBOT.observation(given).prompt == "press"
    assert ROBOT.observation(given | {"prompt": given["task"]}).prompt == "press", "a LeRobot row with both"


def test_a_camera_may_be_missing_but_not_all():
    few = {key: value for key, value in GOOD.items() if "wrist" not in key}
    assert list(ROBOT.observation(few).images) == ["base"]
    with pytest.raises(ObservationError, match="at least one picture"):
        ROBOT.observation({key: value for key, value in few.items() if "base" not in key})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observation.images.bose": PICTURE}, "did you mean 'observation.images.base'"),
        ({"observation.images.base": PICTURE.astype(np.float32)}, "uint8"),
        ({"observation.images.base": PICTURE[..., :1]}, r"\[4, 6, 1\]"),
        ({"observation.images.base": PICTURE[:0]}, r"\[0, 6, 3\]"),
        ({"observation.images.base": PICTURE[None]}, r"\[1, 4, 6, 3\]"),
        ({"observation.state": [1, 2]}, r"numbers \[3\], found int64 \[2\]"),
        ({"observation.state": [[1, 2, 3]]}, r"\[1, 3\]"),
        ({"observation.state": [1, float("nan"), 3]}, "finite"),
        ({"observation.state": [1, float("inf"), 3]}, "finite"),
        ({"observation.state": ["a", "b", "c"]}, "numbers"),
        ({"prompt": 3}, "one text"),
        ({"task": "twice"}, "one text"),
    ],
)
def test_wrong_observations(change, words):
    with pytest.raises(ObservationError, match=words) as caught:
        ROBOT.observation(GOOD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["prompt", "observation.state"])
def test_what_an_observation_must_hold(missing):
    with pytest.raises(ObservationError, match=missing):
        ROBOT.observation({key: value for key, value in GOOD.items() if key != missing})


def test_blanks_are_filled_from_the_data_set():
    found = resolve(Embodiment(), COLUMNS, PICTURES, "the data set")
    assert found.cameras == {"base": PICTURES[0], "wrist": PICTURES[1]}
    assert found.dims() == (3, 2)
    assert resolve(ROBOT, COLUMNS, PICTURES, "the data set") == ROBOT


NAMES = {"observation.state": ("pan", "lift", "grip"), "action": ("pan", "grip")}


def test_names_of_dimensions_come_from_the_data_set_and_units_from_the_operator():
    found = resolve(Embodiment(units={"pan": "deg"}), COLUMNS, PICTURES, "the data set", (), NAMES)
    assert (found.state_names, found.action_names) == (NAMES["observation.state"], NAMES["action"])
    assert found.labels("observation.state", 3) == ("pan (deg)", "lift", "grip") and found.labels("action", 2) == ("pan (deg)", "grip")
    stated = resolve(Embodiment(action_names=("a", "b")), COLUMNS, PICTURES, "the data set", (), NAMES)
    assert stated.action_names == ("a", "b"), "what is typed goes first"
    assert ROBOT.labels("observation/state", 3) == ("state 0", "state 1", "state 2")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"units": {"pam": "deg"}}, "embodiment.units must be of dimensions of the data set, found 'pam': did you mean 'pan'"),
        ({"action_names": ("a",)}, "embodiment.action_names must be names of all dimensions, 2 of them, each once, found a"),
        ({"state_names": ("a", "a", "b")}, "each once, found a, a, b"),
    ],
)
def test_wrong_names_and_units(wrong, words):
    with pytest.raises(ConfigError, match=words):
        resolve(Embodiment(**wrong), COLUMNS, PICTURES, "the data set", (), NAMES)


def test_widths_are_unknown_before():
    with pytest.raises(ConfigError, match="unknown until"):
        Embodiment().dims()


@pytest.mark.parametrize(
    ("embodiment", "words"),
    [
        (
            Embodiment(cameras={"base": "observation.images.bas"}),
            "camera 'base'.*type --embodiment.cameras '{base: observation.images.base}'$",
        ),
        (Embodiment(robot_action_dim=7), "is 7, but column 'action'.* is 2 wide; type --embodiment.robot_action_dim 2$"),
        (Embodiment(state_dim=7), "state_dim is 7"),
        (Embodiment(action="actoin"), "--embodiment.action action$"),
        (Embodiment(state="matrix"), r"must be one-dimensional, found shape \[2, 2\]"),
        (Embodiment(delta_actions=(2,)), "delta_actions"),
        (Embodiment(delta_actions=("pan",)), "names 'pan', but the action's dimensions have no names; type their numbers"),
    ],
)
def test_what_the_data_set_does_not_hold(embodiment, words):
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(embodiment, COLUMNS, PICTURES, "the data set")
    assert "\n" not in str(caught.value)


def test_a_difference_needs_the_states_same_dimension():
    with pytest.raises(ConfigError, match="below 3, found 4"):
        resolve(Embodiment(delta_actions=(4,)), COLUMNS | {"action": (6,)}, PICTURES, "the data set")


def test_a_data_set_without_pictures_is_refused():
    with pytest.raises(ConfigError, match="a column of dtype image or video"):
        resolve(Embodiment(), COLUMNS, [], "the data set")


@pytest.mark.parametrize(
    "wrong",
    [
        {"cameras": {"a": "x", "b": "x"}},
        {"delta_actions": (-1,)},
        {"delta_actions": (2,), "robot_action_dim": 2},
        {"limits": {"velocity": [0.1]}, "robot_action_dim": 2},
    ],
)
def test_impossible_embodiments(wrong):
    with pytest.raises(ConfigError):
        Embodiment(**wrong)


def test_an_action_may_be_relative_by_its_name():
    for given in (("pan",), ("pan", 0)[:1], (0,)):
        found = resolve(Embodiment(delta_actions=given), COLUMNS, PICTURES, "the data set", (), NAMES)
        assert found.delta_actions == found.delta_dims == (0,), "a bundle holds numbers"
    for given, words in (
        (("pam",), "found 'pam': did you mean 'pan'"),
        (("grip",), "but 1 is 'grip' in the action and 'lift' in the state; leave it out, or type 1 if they are one"),
        (("pan", 0), "must name each dimension once"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(Embodiment(delta_actions=given), COLUMNS, PICTURES, "the data set", (), NAMES)


@pytest.mark.parametrize("row", ["so101", "aloha", "droid", "libero"])
@pytest.mark.parametrize(
    "held", [["observation.images.front", "observation.images.hand"], ["cam one"], ["a/rgb", "b/rgb", "c/rgb", "d/rgb"]]
)
def test_the_cameras_that_an_error_says_to_type_are_taken(row, held):
    """A shipped robot on a data set whose cameras have other names."""
    robot = options.parse(TrainingRun, ["tiny", row]).embodiment
    columns = {robot.state: (robot.state_dim,), robot.action: (robot.robot_action_dim,)} | dict.fromkeys(held, (3,))
    with pytest.raises(ConfigError, match=re.escape(f"its cameras are {', '.join(held)}: type --embodiment.cameras ")) as caught:
        resolve(robot, columns, held, "the data set")
    typed = shlex.split(str(caught.value).split("type ")[1])
    found = resolve(options.parse(TrainingRun, ["tiny", row, *typed]).embodiment, columns, held, "the data set")
    assert {*found.cameras} <= {*robot.cameras} and len(found.cameras) == min(len(held), len(robot.cameras))
    assert {*found.cameras.values()} <= {*held}


@pytest.mark.parametrize(
    ("columns", "typed"),
    [
        ({"qpos": (3,), "action": (2,)}, "--embodiment.state qpos$"),
        ({"observation.state": (3,), "joint command": (2,)}, "--embodiment.action 'joint command'$"),
        ({"qpos": (3,), "qvel": (3,), "action": (2,)}, "--embodiment.state COLUMN; columns here: qpos, qvel, action$"),
    ],
)
def test_the_only_column_left_is_the_one_to_type(columns, typed):
    with pytest.raises(ConfigError, match=typed):
        resolve(Embodiment(), columns | {"timestamp": ()}, PICTURES, "the data set")
