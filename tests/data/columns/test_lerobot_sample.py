"""Tests that a row of a LeRobotDataset gives the same answer as the observation in pi0fm's form."""

import numpy as np
import pytest
import tiny_dataset
import torch

from pi0fm.data.columns.embodiment import Embodiment, of_sample
from pi0fm_client.errors import ObservationError

ROBOT = Embodiment(cameras={"base": "observation.images.base"}, state_dim=tiny_dataset.STATE_DIM, robot_action_dim=3)


@pytest.fixture(scope="module")
def row(tiny_root):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(tiny_dataset.REPO_ID, root=tiny_root, video_backend="pyav", delta_timestamps={"action": [0.0, 0.1]})[2]


def test_a_row_of_lerobots_reader_is_an_observation(row):
    observation = ROBOT.observation(of_sample(row, ROBOT))
    expected = (255 * row["observation.images.base"]).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(observation.images["base"], expected)
    np.testing.assert_array_equal(observation.state, row["observation.state"].numpy())
    assert observation.prompt == row["task"]


def test_pictures_of_another_form_are_refused_and_a_flat_map_is_left_alone(row):
    for wrong, line in ((row["observation.images.base"] * 2 - 1, r"must lie in \[0, 1\]"), (torch.zeros(4, 8, 8), r"\[3, height, width\]")):
        with pytest.raises(ObservationError, match=line):
            of_sample({**row, "observation.images.base": wrong}, ROBOT)
    flat = {"observation.state": np.zeros(2), "prompt": "x"}
    assert of_sample(flat, ROBOT) is flat
