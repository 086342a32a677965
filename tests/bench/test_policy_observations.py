"""Where a policy is measured: spread over a data set, or over the simulator at starts that nobody demonstrated."""

from types import SimpleNamespace

import numpy as np
import pytest
from learning_help import SeededArm

from pi0fm.bench.policy_observations import from_dataset, from_simulator, simulated_tasks
from pi0fm.data.chain import Chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.prompt import PromptTokenizer, load_tokenizer
from pi0fm.sim import catalog
from pi0fm_client.errors import ConfigError

METADATA = {
    "demonstration_seeds": {"reach-v3": [5, 9], "door-open-v3": [5, 12], "fold the towel": [0, 3]},
    "camera_sources": {"base": "corner2:32x48"},
    "execution_horizon": 2,
}


@pytest.fixture
def arms(monkeypatch) -> list[SeededArm]:
    """The environments that were made; an episode of an odd seed is over after three actions."""
    made: list[SeededArm] = []

    def make(task, cameras):
        made.append(SeededArm(task, cameras, max_steps=7))
        return made[-1]

    monkeypatch.setattr(catalog, "open_environment", make)
    return made


def policy(**changes) -> SimpleNamespace:
    def infer_batch(observations, noise_seeds):
        assert len(observations) == len(noise_seeds) == 1
        return [SimpleNamespace(actions=np.zeros((4, 4), np.float32))]

    return SimpleNamespace(metadata=METADATA | changes, infer_batch=infer_batch)


def test_starts_and_the_way_from_there_at_seeds_behind_the_demonstrations(arms):
    told: list[int] = []
    found = from_simulator(policy(), 9, seed=0, advance=told.append)
    assert sum(told) == len(found) == 9
    assert [arm.task for arm in arms] == ["reach-v3", "door-open-v3"]
    seen = [(int(one.images["base"][0, 0, 0]), int(one.state[0])) for one in found]
    # seed 10 lasts for 7 steps of which 6 are seen; 11 and 13 end with their third, after the second look
    assert seen == [(10, 0), (10, 2), (10, 4), (10, 6), (11, 0), (13, 0), (13, 2), (14, 0), (14, 2)]
    assert found[0].images["base"].shape == (48, 32, 3)


def test_fewer_observations_than_tasks(arms):
    assert len(from_simulator(policy(), 1, 0, lambda _: None)) == 1
    assert [arm.task for arm in arms] == ["reach-v3"]


@pytest.mark.parametrize("change", [{"camera_sources": {}}, {"demonstration_seeds": {}}, {"demonstration_seeds": {"fold": [0, 3]}}])
def test_a_bundle_that_names_no_simulator_needs_a_data_set(change):
    with pytest.raises(ConfigError, match=r"names no task and camera of a simulator.*type --dataset\.root DIRECTORY"):
        simulated_tasks(METADATA | change)


def test_frames_of_a_data_set_in_the_middle_of_equal_stretches(learning_run):
    run = learning_run()
    embodiment = Embodiment(cameras={"base": "observation.images.base"}, state_dim=4, robot_action_dim=4)
    reader = Chain(embodiment, (), PromptTokenizer(load_tokenizer("byt5", 384), 32), image_size=32)
    found = from_dataset(reader, run.dataset, 4)
    everything = from_dataset(reader, run.dataset, 1000)
    assert len(everything) == 48
    for one, expected in zip(found, (everything[index] for index in (6, 18, 30, 42)), strict=True):
        assert np.array_equal(one.state, expected.state)
        assert np.array_equal(one.images["base"], expected.images["base"])
        assert one.images["base"].shape == (32, 32, 3)
    assert {one.prompt for one in everything} == {"move the hand to the goal", "open the door"}
