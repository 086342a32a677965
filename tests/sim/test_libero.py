"""Tests of LIBERO's conventions: the observation of LeRobot's wrapper, success, missing files."""

import numpy as np
import pytest

from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.libero.environment import axis_angle
from pi0fm.sim.libero.suite import LIBERO, MAX_STEPS
from pi0fm_client.errors import ConfigError, SimulationError

TASK = "libero_object/0"  # the alphabet soup into the basket


def test_an_angle_is_not_turned_to_the_shorter_way():
    half = np.deg2rad(200) / 2  # a rotation by 200 degrees has w < 0
    np.testing.assert_allclose(axis_angle(np.array([0, np.sin(half), 0, np.cos(half)])), [0, np.deg2rad(200), 0])
    assert np.linalg.norm(axis_angle(np.array([0.1, 0.1, 0.1, -0.98]))) > np.pi
    assert not axis_angle(np.array([0, 0, 0, 1.0000001])).any()


def test_the_suites_have_the_published_tasks_and_limits():
    assert [suite.name for suite in LIBERO] == ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
    assert [len(suite.tasks) for suite in LIBERO] == [10, 10, 10, 10, 90]
    assert MAX_STEPS == {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
    with pytest.raises(ConfigError, match="unknown LIBERO spatial task '10'"):
        catalog.find("libero_spatial/10")


@pytest.fixture(scope="module")
def environment():
    pytest.importorskip("libero")
    opened = catalog.open_environment(TASK)
    yield opened
    opened.close()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_observation_is_that_of_lerobots_wrapper(environment, monkeypatch):
    """Picture by picture and number by number, after the settling steps and in motion."""
    from lerobot.envs import libero as peer
    from lerobot.envs.utils import preprocess_observation
    from lerobot.processor.env_processor import LiberoProcessorStep

    def batched(tree):
        return {name: batched(value) if isinstance(value, dict) else np.asarray(value)[None] for name, value in tree.items()}

    monkeypatch.setattr(peer, "get_task_init_states", lambda suite, number, **_: suite.get_task_init_states(number))
    suite = peer._get_suite("libero_object")
    other = peer.LiberoEnv(suite, 0, "libero_object", obs_type="pixels_agent_pos", episode_index=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 7)).astype(np.float32)
    # theirs first, and whole: robosuite draws into whichever GL context is current
    theirs = [other.reset(seed=3)[0]]
    for action in actions:
        theirs.append(other.step(action)[0])
    environment.reset(3)
    ours = [environment.observe()]
    for action in actions:
        environment.step(action)
    ours.append(environment.observe())
    for own, raw in zip(ours, (theirs[0], theirs[-1]), strict=True):
        expected = LiberoProcessorStep()._process_observation(preprocess_observation(batched(raw)))
        np.testing.assert_allclose(own.state, expected["observation.state"][0].numpy(), atol=1e-6)
        for name, picture in own.images.items():
            given = (expected[f"observation.images.{name}"][0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
            np.testing.assert_array_equal(picture, given)
        assert own.prompt == other.task_description == catalog.prompt_of(TASK)


def moved(environment, target, gripper, steps):
    """Move the gripper towards a place; whether the task was solved on the way."""
    for _ in range(steps):
        away = np.asarray(target) - environment.observe().state[:3]
        if np.abs(away).max() < 0.01:
            return False
        result = environment.step(np.array([*np.clip(12 * away, -1, 1), 0, 0, 0, gripper], np.float32))
        if result.done:
            return result.success
    return False


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_scripted_motion_solves_a_task_and_standing_still_does_not(monkeypatch):
    pytest.importorskip("libero")
    environment = catalog.open_environment(TASK, parse_cameras("image=agentview-fast:32x32"), max_steps=200)
    environment.reset(0)
    can, basket = environment.position("alphabet_soup_1"), environment.position("basket_1")
    up = np.array([0, 0, 1])
    for place, gripper, steps in ((can + 0.12 * up, -1, 60), (can, -1, 60)):
        assert not moved(environment, place, gripper, steps)
    for _ in range(12):
        assert not environment.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32)).success
    assert moved(environment, can + 0.25 * up, 1, 60) is False
    solved = moved(environment, basket + 0.25 * up, 1, 80) or moved(environment, basket + 0.1 * up, 1, 30)
    for _ in range(25):
        solved = solved or environment.step(np.array([0, 0, 0, 0, 0, 0, -1], np.float32)).success
    assert solved
    environment.reset(1)
    still = [environment.step(environment.still_action()) for _ in range(200)]
    assert still[-1].done and not any(result.success for result in still)
    with pytest.raises(SimulationError, match="is over"):
        environment.step(environment.still_action())
    environment.close()
