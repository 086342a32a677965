"""Tests of our writer of LeRobot's format against LeRobot's, file by file, and of LeRobot's tools on our files.

episodes ──┬── Recording ──────────────── ours    segments of ten and of two
           └── LeRobotDataset ─────────── theirs  the same twelve, resumed after ten, so that files hold the same
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from demos_help import config, encoded, episode, submit
from numpy.typing import NDArray

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.demos.config import DemosConfig
from pi0fm.demos.dataset import SETTINGS_FILE, Recording, layout_of
from pi0fm.demos.demonstration import Demonstration
from pi0fm.demos.encoding import CODEC, encode
from pi0fm.demos.lerobot_writer import CHUNK_FILES, Contents, write_segment
from pi0fm.demos.record import record
from pi0fm.sim import catalog

pytestmark = pytest.mark.journey
# none below 3: LeRobot's own writer fails to join those
LENGTHS = (8, 13, 5, 30, 7, 9, 17, 6, 3, 21, 11, 4)
FRAMES = sum(LENGTHS)
CAMERAS = ("observation.images.base", "observation.images.wrist")


def settings(root: Path) -> DemosConfig:
    return config(root, episodes=6, cameras="base=corner2:32x48,wrist=gripperPOV:32x48")


def demonstrations() -> list[Demonstration]:
    """Six of each task; the wrist sees what the base sees, backwards in time."""
    found = []
    for number, length in enumerate(LENGTHS):
        one = episode("reach-v3" if number < 6 else "door-open-v3", 5 + number % 6, length)
        found.append(replace(one, images=dict(one.images) | {"wrist": one.images["base"][::-1]}))
    return found


def lerobot_options() -> dict[str, Any]:
    from lerobot.configs.video import RGBEncoderConfig

    how: dict[str, Any] = {"streaming_encoding": True, "encoder_queue_maxsize": 100, "encoder_threads": 1}
    return how | {"rgb_encoder": RGBEncoderConfig(**CODEC), "video_backend": "pyav"}


def add(data: Any, one: Demonstration) -> None:
    for row, (state, action) in enumerate(zip(one.state, one.action, strict=True)):
        images = {f"observation.images.{name}": frames[row] for name, frames in one.images.items()}
        data.add_frame({"observation.state": state, "action": action, "seed": np.array([one.seed], np.int64), "task": one.prompt, **images})
    data.save_episode(parallel_encoding=False)


def opened(root: Path, **how: Any) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/test", root=root, video_backend="pyav", **how)


def pictures(root: Path, camera: str) -> NDArray[np.float32]:
    data = opened(root)
    return np.stack([data[index][camera].numpy() for index in range(len(data))])


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ours") / "set"
    with Recording(root, settings(root)) as recording:
        for one in demonstrations():
            recording.add(encode(one, 80))
    return root


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("theirs") / "set"
    features = {
        name: {key: value for key, value in feature.items() if key != "info"} | {"shape": tuple(feature["shape"])}
        for name, feature in layout_of(settings(root)).features.items()
        if name not in ("timestamp", "frame_index", "episode_index", "index", "task_index")
    }
    data = LeRobotDataset.create("local/test", fps=80, features=features, root=root, robot_type="sawyer", **lerobot_options())
    for number, one in enumerate(demonstrations()):
        if number == 10:
            data.finalize()
            data = LeRobotDataset.resume("local/test", root=root, **lerobot_options())
        add(data, one)
    data.finalize()
    return root


def test_the_files_are_the_same(ours: Path, theirs: Path) -> None:
    mine, other = ({path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} for root in (ours, theirs))
    assert mine - other == {SETTINGS_FILE} and other <= mine
    assert {"data/chunk-000/file-001.parquet", f"videos/{CAMERAS[1]}/chunk-000/file-001.mp4"} < mine
    assert json.loads((ours / "meta/info.json").read_text()) == json.loads((theirs / "meta/info.json").read_text())


def test_rows_and_their_schema_are_the_same(ours: Path, theirs: Path) -> None:
    for name in ("data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"):
        one, other = (parquet.ParquetFile(root / name) for root in (ours, theirs))
        assert one.schema_arrow.equals(other.schema_arrow, check_metadata=False)
        described = [json.loads(file.schema_arrow.metadata[b"huggingface"])["info"] for file in (one, other)]
        assert described[0] == described[1] and list(described[0]["features"]) == list(described[1]["features"])
        assert one.schema.equals(other.schema)
        assert one.read().equals(other.read())
        assert one.num_row_groups == other.num_row_groups == (10 if name.endswith("000.parquet") else 2)
        assert one.metadata.row_group(0).column(0).compression == other.metadata.row_group(0).column(0).compression


def test_tasks_are_the_same(ours: Path, theirs: Path) -> None:
    import pandas

    one, other = (pandas.read_parquet(root / "meta/tasks.parquet") for root in (ours, theirs))
    pandas.testing.assert_frame_equal(one, other)
    assert one.loc[catalog.prompt_of("door-open-v3"), "task_index"] == 1


def test_the_lines_of_the_episodes_are_the_same(ours: Path, theirs: Path) -> None:
    for name in ("meta/episodes/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-001.parquet"):
        one, other = (parquet.read_table(root / name) for root in (ours, theirs))
        assert one.schema.equals(other.schema, check_metadata=False)
        for column in one.column_names:
            mine, peers = one[column].to_pylist(), other[column].to_pylist()
            if column.startswith("stats/"):
                compare_statistics(column, mine, peers)
            elif column.endswith("timestamp"):
                assert mine == pytest.approx(peers, abs=1e-9)
            else:
                assert mine == peers


def compare_statistics(column: str, mine: Sequence[Any], peers: Sequence[Any]) -> None:
    """LeRobot works in float32 and reads quantiles off 5000 bins between the lowest and the highest value; ours are exact."""
    statistic = column.rsplit("/", 1)[1]
    for one, other in zip(mine, peers, strict=True):
        assert np.shape(one) == np.shape(other)
        if statistic == "count":
            assert one == other
        else:
            tolerance = {"min": 1e-7, "max": 1e-7, "mean": 1e-5, "std": 2e-3}.get(statistic, 2e-3)
            assert np.allclose(one, other, rtol=tolerance, atol=tolerance), (column, one, other)


def test_statistics_of_the_whole(ours: Path, theirs: Path) -> None:
    one, other = (json.loads((root / "meta/stats.json").read_text()) for root in (ours, theirs))
    assert one.keys() == other.keys()
    rows = parquet.read_table(ours / "data").to_pydict()
    for feature, found in one.items():
        assert found.keys() == other[feature].keys()
        for name, value in found.items():
            if name in ("min", "max", "mean", "std", "count") or feature in CAMERAS:
                compare_statistics(f"{feature}/{name}", [value], [other[feature][name]])
            else:  # LeRobot's quantile of the whole is a mean of the episodes' quantiles
                values = np.array(rows[feature], np.float64).reshape(FRAMES, -1)
                assert np.array_equal(value, np.quantile(values, int(name[1:]) / 100, axis=0, method="inverted_cdf"))


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_picture_is_the_same(ours: Path, theirs: Path, camera: str) -> None:
    assert np.array_equal(pictures(ours, camera), pictures(theirs, camera))


def test_lerobot_reads_what_was_recorded(tmp_path: Path) -> None:
    recorded = tmp_path / "set"
    record(config(recorded), submit, window=2)
    data = opened(recorded)
    assert data.num_episodes == 6 and len(data) == 48 and data.fps == 80
    kept = [("reach-v3", 5), ("reach-v3", 7), ("reach-v3", 8), ("door-open-v3", 5), ("door-open-v3", 7), ("door-open-v3", 8)]
    for index, (task, seed) in enumerate(kept):
        truth = episode(task, seed)
        for row in (0, 3, 7):
            item = data[index * 8 + row]
            assert item["task"] == catalog.prompt_of(task) and int(item["seed"]) == seed
            assert np.array_equal(item["action"], truth.action[row]) and np.array_equal(item["observation.state"], truth.state[row])
            pixels = item["observation.images.base"].numpy().transpose(1, 2, 0) * 255
            # 4:2:0 colour blurs the edges of the 8-pixel blocks; another frame would be about 80 away
            assert np.abs(pixels - truth.images["base"][row]).mean() < 25


def test_lerobot_batches_chunks_and_chosen_episodes(ours: Path) -> None:
    from torch.utils.data import DataLoader

    times = {"action": [step / 80 for step in range(4)], CAMERAS[0]: [-1 / 80, 0.0]}
    data = opened(ours, delta_timestamps=times, episodes=[3, 10])
    assert len(data) == LENGTHS[3] + LENGTHS[10]
    batches = list(DataLoader(data, batch_size=8))
    actions = np.concatenate([batch["action"][:, 0] for batch in batches])
    truth = demonstrations()
    assert np.array_equal(actions, np.concatenate([truth[3].action, truth[10].action]))
    assert batches[0][CAMERAS[0]].shape == (8, 2, 3, 48, 32)


def test_lerobot_goes_on_and_so_do_we(ours: Path, tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path / "set"
    shutil.copytree(ours, root)
    more = episode("door-open-v3", 31, 7)
    more = replace(more, images=dict(more.images) | {"wrist": more.images["base"][::-1]})
    data = LeRobotDataset.resume("local/test", root=root, **lerobot_options())
    add(data, more)
    data.finalize()
    last = opened(root)[FRAMES + 6]
    assert int(last["seed"]) == 31 and np.array_equal(last["action"], more.action[6]) and last["task"] == more.prompt

    larger = replace(settings(root), episodes=8)
    with Recording(root, larger) as recording:
        assert recording.episodes == 13 and recording.frames == FRAMES + 7
        recording.add(encode(replace(more, seed=32), 80))
    with Recording(root, larger) as recording:
        assert recording.seeds("door-open-v3")[-2:] == (31, 32)
    found = opened(root)
    assert found.num_episodes == 14 and int(found[FRAMES + 13]["seed"]) == 32
    seen = pictures(root, CAMERAS[1])
    assert np.array_equal(seen[:FRAMES], pictures(ours, CAMERAS[1]))
    assert np.array_equal(seen[FRAMES : FRAMES + 7], seen[FRAMES + 7 :])
    assert found.meta.stats["action"]["count"].tolist() == [FRAMES + 14]


def test_our_reader_sees_what_lerobots_sees(ours: Path, tmp_path: Path) -> None:
    where = DatasetConfig(root=ours, cache_dir=tmp_path / "cache", video_decoder="pyav")
    source = open_source(where, Embodiment())
    truth = demonstrations()
    assert np.array_equal(source.state, np.concatenate([one.state for one in truth]))
    assert np.array_equal(source.action, np.concatenate([one.action for one in truth]))
    assert source.demonstration_seeds == {"reach-v3": [5, 10], "door-open-v3": [5, 10]}
    cache = open_cache(source, where, size=48)
    for camera, frames in zip(source.embodiment.cameras.values(), cache.cameras, strict=True):
        peers = np.round(pictures(ours, camera).transpose(0, 2, 3, 1) * 255).astype(np.uint8)
        assert np.array_equal(np.asarray(frames)[:, :, 8:40], peers)  # 48 x 32 in a square of 48: 8 columns of padding on each side


def test_the_chunk_after_the_thousandth_file(tmp_path: Path) -> None:
    layout = layout_of(config(tmp_path))
    episodes = [encoded("reach-v3", seed) for seed in range(4)]
    after = write_segment(tmp_path, layout, Contents(file=CHUNK_FILES - 1), episodes[:2])
    after = write_segment(tmp_path, layout, after, episodes[2:])
    assert (tmp_path / "data/chunk-001/file-000.parquet").is_file() and after.file == CHUNK_FILES + 1
    data = opened(tmp_path)
    assert len(data) == 32 and data.meta.get_video_file_path(0, CAMERAS[0]).as_posix() == f"videos/{CAMERAS[0]}/chunk-000/file-999.mp4"
    assert [int(item["seed"]) for item in data] == np.repeat(range(4), 8).tolist()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    more = LeRobotDataset.resume("local/test", root=tmp_path, **lerobot_options())
    add(more, episode("reach-v3", 9))
    more.finalize()
    assert (tmp_path / f"videos/{CAMERAS[0]}/chunk-001/file-001.mp4").exists()
    assert int(opened(tmp_path)[39]["seed"]) == 9
