import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.metaworld.environment import CAMERAS, MetaWorld
from pi0fm.sim.metaworld.prompts import TASK_PROMPTS
from pi0fm.sim.metaworld.suite import METAWORLD
from pi0fm_client.errors import ConfigError, SimulationError

BASE = parse_cameras("base=corner2:96x96")


@pytest.fixture(scope="module")
def button() -> Iterator[MetaWorld]:
    environment = METAWORLD.open("button-press-topdown-v3", parse_cameras("base=corner2:96x96,wrist=gripperPOV:64x48"), max_steps=120)
    yield environment
    environment.close()


def test_the_table_names_metaworlds_tasks_and_cameras(button: MetaWorld) -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert set(TASK_PROMPTS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(set(TASK_PROMPTS.values())) == 50  # two tasks with one sentence could not be told apart
    model = button._env.model
    assert [model.camera(index).name for index in range(model.ncam)] == list(CAMERAS)


def test_the_sentences_are_our_own() -> None:
    found = importlib.util.find_spec("lerobot")  # importing it would cost ten seconds
    assert found is not None and found.submodule_search_locations is not None
    theirs = json.loads((Path(found.submodule_search_locations[0]) / "envs/metaworld_config.json").read_text())["TASK_DESCRIPTIONS"]
    assert not {text.lower() for text in theirs.values()} & set(TASK_PROMPTS.values())


def test_what_is_seen(button: MetaWorld) -> None:
    button.reset(3)
    seen = button.observe()
    assert seen.images["base"].shape == (96, 96, 3) and seen.images["wrist"].shape == (48, 64, 3)
    assert seen.images["base"].dtype == np.uint8 and seen.images["base"].std() > 20
    assert seen.state.shape == (4,) and seen.state.dtype == np.float32
    assert seen.prompt == "press the button down"
    assert button.picture(200, 160).shape == (200, 160, 3)


def test_the_picture_is_the_right_way_up(button: MetaWorld) -> None:
    button.reset(3)
    red, green, blue = button.picture(96, 96).astype(int).transpose(2, 0, 1)
    red_rows = np.nonzero((red > 120) & (green < 40) & (blue < 40))[0]
    assert red_rows.mean() < 48  # the arm reaches down from above


def test_one_seed_is_one_start_whatever_came_before(button: MetaWorld) -> None:
    button.reset(7)
    first = button.observe()
    button.reset(8)
    other = button.observe()
    for _ in range(30):
        button.step(button.expert_action())
    button.reset(7)
    again = button.observe()
    assert np.array_equal(first.images["base"], again.images["base"]) and np.array_equal(first.state, again.state)
    assert not np.array_equal(first.images["base"], other.images["base"])


def test_leaving_out_the_unseen_changes_no_pixel(button: MetaWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    button.reset(3)
    culled = button.observe().images
    monkeypatch.setattr("pi0fm.sim.renderer.outside_view", lambda centres, *rest: np.zeros(len(centres), bool))
    whole = button.observe().images
    assert all(np.array_equal(culled[name], whole[name]) for name in whole)


def test_the_expert_succeeds_and_success_ends_the_episode(button: MetaWorld) -> None:
    button.reset(5)
    for _ in range(button.max_steps):
        action = button.expert_action()
        assert action.dtype == np.float32 and np.abs(action).max() <= 1
        result = button.step(action)
        if result.done:
            break
    assert result.success
    with pytest.raises(SimulationError, match="reset"):
        button.step(action)


def test_the_last_step_ends_the_episode_without_success(button: MetaWorld) -> None:
    button.reset(5)
    results = [button.step(np.zeros(4, np.float32)) for _ in range(button.max_steps)]
    assert [result.done for result in results] == [False] * (button.max_steps - 1) + [True]
    assert not any(result.success for result in results)


def test_an_action_of_another_size_is_refused(button: MetaWorld) -> None:
    button.reset(5)
    with pytest.raises(SimulationError, match="4 finite numbers"):
        button.step(np.zeros(7, np.float32))


@pytest.mark.parametrize(
    ("task", "cameras", "steps", "words"),
    [
        ("button-press-topdwn-v3", "base=corner2:96x96", 400, "did you mean 'button-press-topdown-v3'"),
        ("reach-v3", "base=corner9:96x96", 400, "known: behindGripper"),
        ("reach-v3", "base=corner2:96x96", 501, "max_steps must be from 1 to 500"),
    ],
)
def test_bad_input_is_one_line_that_names_the_known(task: str, cameras: str, steps: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        METAWORLD.open(task, parse_cameras(cameras), steps)
    assert "\n" not in str(caught.value)
    assert words in str(caught.value) or "did you mean 'corner" in str(caught.value)
