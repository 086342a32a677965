"""Tests that data sets written by LeRobot's recorder and tools have no fault, after deleting, splitting and merging."""

import numpy as np
import pytest
from any_dataset import shade

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig
from pi0fm.doctor.data import find_faults

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
PICTURE = {"shape": (64, 96, 3), "names": ["height", "width", "channels"]}
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
    "action": {"dtype": "float32", "shape": (3,), "names": None},
    "observation.images.base": {"dtype": "video", **PICTURE},
    "observation.images.wrist": {"dtype": "image", **PICTURE},
}


def test_what_lerobots_tools_write_has_no_fault(tmp_path):
    from lerobot.datasets import dataset_tools as tools
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    def recorded(name, lengths, first):
        data = LeRobotDataset.create(repo_id=f"local/{name}", fps=10, features=FEATURES, root=tmp_path / name)
        for episode, length in enumerate(lengths, first):
            for step in range(length):
                pictures = dict.fromkeys(("observation.images.base", "observation.images.wrist"), shade(episode, step, 64, 96))
                numbers = {"observation.state": np.full(4, step, np.float32), "action": np.array([episode, step, 0], np.float32)}
                data.add_frame(numbers | pictures | {"task": f"task {episode % 2}"})
            data.save_episode()
        data.finalize()
        return opened(name)

    def opened(name):
        return LeRobotDataset(f"local/{name}", root=tmp_path / name)

    first, second = recorded("first", (12, 5, 9, 7), 0), recorded("second", (6, 8), 2)
    tools.delete_episodes(first, [1], output_dir=tmp_path / "deleted", repo_id="local/deleted")
    tools.split_dataset(first, {"one": [3, 0], "other": [1, 2]}, output_dir=tmp_path / "split")
    tools.merge_datasets([opened("deleted"), second, first], output_repo_id="local/merged", output_dir=tmp_path / "merged")
    tools.delete_episodes(opened("merged"), [0, 4], output_dir=tmp_path / "again", repo_id="local/again")
    tools.modify_tasks(opened("merged"), new_task="one for all")
    counts = {"first": 4, "second": 2, "deleted": 3, "split/one": 2, "split/other": 2, "merged": 9, "again": 7}
    for name, episodes in counts.items():
        found = find_faults(DatasetConfig(root=tmp_path / name, video_decoder="pyav"), Embodiment(), extent="all")
        assert (found.episodes, found.faults) == (episodes, ()), name
