"""Two trainers, one data set: the same samples, frames and numbers for the same place in the stream."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_help import PROMPT

from pi0fm.bench.shared_data import lerobot_batch, open_shared
from pi0fm.data.chain import Sample
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm_client.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def data(learning_run):
    return open_shared(learning_run(), PROMPT)


@pytest.mark.parametrize("first", [0, 5, 22])
def test_both_sides_see_the_same_batch(data, first):
    """Positions 22 to 27 span two epochs of the 24 frames."""
    collator = data.collator(seed=3)
    ours, theirs = collator(first, 6), lerobot_batch(collator, first, 6)
    assert torch.equal(ours.observation.images[:, 0], theirs["observation.images.base"].permute(0, 2, 3, 1))
    assert theirs["observation.images.base"].dtype == torch.uint8
    back = collator.chain.inverse(Sample(ours.observation.state.numpy(), ours.actions.numpy()))
    np.testing.assert_allclose(back.state, theirs["observation.state"], atol=1e-6)
    np.testing.assert_allclose(back.actions, theirs["action"], atol=1e-6)
    assert torch.equal(ours.action_mask[:, :, 0], ~theirs["action_is_pad"])
    assert theirs["task"] == [PROMPT] * 6


def test_another_seed_is_another_order(data):
    first, second = (lerobot_batch(data.collator(seed), 0, 6)["observation.state"] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_an_epoch_is_every_frame_of_the_task_and_no_other(data):
    found = lerobot_batch(data.collator(0), 0, 24)["observation.state"].numpy()
    expected = data.source.state[data.source.episode < 3]
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    assert len(data.source.state) == 24


def test_frames_lie_in_memory(data):
    assert not any(isinstance(camera, np.memmap) for camera in data.cache.cameras)


def test_statistics_are_those_that_lerobot_stores(learning_run, recorded_root):
    """Over the whole data set, LeRobot's own file holds the same numbers."""
    run = learning_run()
    shared = open_shared(run, PROMPT)
    whole = replace(shared, stats=open_source(run.dataset, run.embodiment).norm_stats(4)).lerobot_stats()
    stored = json.loads((recorded_root / "meta" / "stats.json").read_text())
    for key, columns in whole.items():
        for name, value in columns.items():
            np.testing.assert_allclose(value, stored[key][name], rtol=1e-4, err_msg=f"{key} {name}")


def test_a_task_that_the_data_set_lacks_is_refused(learning_run):
    with pytest.raises(DatasetError, match=r"holds no episode of 'fold the towel', found: .*open the door"):
        open_shared(learning_run(), "fold the towel")
    run = learning_run()
    with pytest.raises(DatasetError, match="no chosen episode"):
        open_shared(replace(run, dataset=replace(run.dataset, episodes=(4, 5))), PROMPT)


def test_actions_as_differences_are_refused(learning_run):
    with pytest.raises(ConfigError, match="delta_actions"):
        open_shared(learning_run(embodiment=Embodiment(delta_actions=(0,))), PROMPT)
