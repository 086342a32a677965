"""Tests of every column, picture and chunk against LeRobotDataset's items, and of inconsistent data sets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset

from pi0fm import options
from pi0fm.data.columns import lerobot_source
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import locate, open_source
from pi0fm.data.columns.norm_stats import compute_norm_stats
from pi0fm.data.config import DatasetConfig
from pi0fm.data.loading.loader import action_chunks
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm_client.errors import ConfigError, DatasetError

FRAMES = sum(tiny_dataset.LENGTHS)
HORIZON = 5


@pytest.fixture(scope="module")
def peers_items(tiny_root) -> list[dict]:
    """Every item as LeRobot returns it, with action chunks."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    times = {"action": [step / tiny_dataset.FPS for step in range(HORIZON)]}
    data = LeRobotDataset(tiny_dataset.REPO_ID, root=tiny_root, delta_timestamps=times, video_backend="pyav")
    return [data[index] for index in range(len(data))]


@pytest.fixture
def copy(tiny_root, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_root, tmp_path / "copy"))


def test_every_column_is_lerobots(tiny_source, peers_items):
    assert len(tiny_source.state) == len(peers_items) == FRAMES
    for index, item in enumerate(peers_items):
        assert np.array_equal(tiny_source.state[index], item["observation.state"])
        assert np.array_equal(tiny_source.action[index], item["action"][0])
        assert tiny_source.episode[index] == item["episode_index"]
        assert tiny_source.tasks[tiny_source.task[index]] == item["task"]
    assert tiny_source.end.tolist() == np.repeat(np.cumsum(tiny_dataset.LENGTHS), tiny_dataset.LENGTHS).tolist()
    assert tiny_source.fps == tiny_dataset.FPS
    assert tiny_source.embodiment.dims() == (tiny_dataset.STATE_DIM, tiny_dataset.ACTION_DIM)
    assert tiny_source.embodiment.cameras == {"base": "observation.images.base", "wrist": "observation.images.wrist"}


def test_action_chunks_are_lerobots_delta_timestamps(tiny_source, peers_items):
    actions, inside = action_chunks(tiny_source.action, tiny_source.end, np.arange(FRAMES), HORIZON)
    for index, item in enumerate(peers_items):
        assert np.array_equal(actions[index], item["action"])
        assert np.array_equal(inside[index], ~item["action_is_pad"].numpy())


def test_one_column_may_be_state_and_action(tiny_config, tiny_source):
    """Actions that are the states to come."""
    source = open_source(tiny_config, Embodiment(action="observation.state"))
    assert np.array_equal(source.action, source.state) and np.array_equal(source.state, tiny_source.state)
    assert source.embodiment.dims() == (tiny_dataset.STATE_DIM, tiny_dataset.STATE_DIM)


def test_every_picture_is_lerobots(tiny_source, tiny_config, peers_items):
    """At 64 the video's 48 x 64 need padding only, so every pixel is kept; the stored pictures of 32 x 32 are enlarged."""
    found = open_cache(tiny_source, tiny_config, 64).gather(np.arange(FRAMES))
    assert found.shape == (FRAMES, 2, 64, 64, 3)
    for index, item in enumerate(peers_items):
        base, wrist = (
            np.rint(item[f"observation.images.{name}"].numpy().transpose(1, 2, 0) * 255).astype(np.uint8) for name in ("base", "wrist")
        )
        assert np.array_equal(found[index, 0, 8:56], base)
        assert not found[index, 0, :8].any()
        assert np.array_equal(found[index, 1], resize_with_padding(wrist[None], 64)[0])


def test_pictures_of_the_right_size_are_stored_as_they_are(tiny_root, tiny_config, peers_items):
    source = open_source(tiny_config, Embodiment(cameras={"hand": "observation.images.wrist"}))
    found = open_cache(source, tiny_config, 32).gather(np.arange(FRAMES))[:, 0]
    for index, item in enumerate(peers_items):
        assert np.array_equal(found[index], np.rint(item["observation.images.wrist"].numpy().transpose(1, 2, 0) * 255))


def test_statistics_of_all_frames_and_of_chosen_episodes(tiny_config, tiny_root):
    embodiment = Embodiment(delta_actions=(1,))
    source = open_source(tiny_config, embodiment)
    assert source.norm_stats(4).num_frames == FRAMES
    chosen = open_source(DatasetConfig(root=tiny_root, episodes=(0, 2)), embodiment)
    kept = source.episode != 1
    assert np.array_equal(chosen.rows, np.flatnonzero(kept)) and np.array_equal(chosen.frames, np.arange(19))
    ends = np.repeat(np.cumsum([12, 7]), [12, 7])
    expected = compute_norm_stats(source.state[kept], source.action[kept], ends, (1,), 4)
    assert chosen.norm_stats(4).to_json() == expected.to_json()


def test_seeds_are_given_by_task(tiny_source):
    assert tiny_source.demonstration_seeds == {"press the button": [100, 102], "open_the drawer ": [101, 101]}


@pytest.mark.parametrize(
    ("embodiment", "words"),
    [
        (Embodiment(cameras={"base": "observation.images.bse"}), "type --embodiment.cameras '{base: observation.images.base}'"),
        (Embodiment(robot_action_dim=7), "robot_action_dim is 7.* 3 wide"),
        (Embodiment(state="observation.stat"), "type --embodiment.state observation.state$"),
    ],
)
def test_a_configuration_that_does_not_fit_the_data_set(tiny_config, embodiment, words):
    with pytest.raises(ConfigError, match=words) as caught:
        open_source(tiny_config, embodiment)
    assert "\n" not in str(caught.value)


def test_unknown_episodes(tiny_root):
    with pytest.raises(ConfigError, match=r"0\.\.2, found \[3\]"):
        open_source(DatasetConfig(root=tiny_root, episodes=(0, 3)), Embodiment())


def rewrite_info(root: Path, **change: object) -> None:
    path = root / "meta/info.json"
    tree = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))


def refused(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_source(DatasetConfig(root=root), Embodiment())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_old_format_is_refused_with_the_command_that_converts_it(copy):
    rewrite_info(copy, codebase_version="v2.1")
    assert "is a LeRobot data set v2.1, v3.0 is needed" in refused(copy)
    assert "convert_dataset_v21_to_v30 --repo-id=copy" in refused(copy)


def test_missing_and_damaged_info(copy):
    for text in ("{", "[1]"):
        (copy / "meta/info.json").write_text(text)
        assert "info.json is not readable" in refused(copy)
    (copy / "meta/info.json").unlink()
    assert "has no meta/info.json" in refused(copy)


@pytest.mark.parametrize("pattern", ["data/*/*.parquet", "meta/episodes/*/*.parquet", "meta/tasks.parquet"])
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_parquet_file(copy, pattern, keep):
    file = next(iter(copy.glob(pattern)))
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    assert f"{file} is cut or damaged" in refused(copy)


def test_a_damaged_page_inside_a_parquet_file(copy):
    """The footer is whole, so only reading the column finds it."""
    file = next(iter(copy.glob("data/*/*.parquet")))
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(bytes(content))
    assert "cut or damaged" in refused(copy)


def test_where_a_data_set_is_looked_for(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    (tmp_path / "local").mkdir()
    (tmp_path / "local/tiny").symlink_to(tiny_root)
    assert locate(DatasetConfig(repo_id="local/tiny")) == tmp_path / "local/tiny"
    assert locate(DatasetConfig(repo_id="other", root=tiny_root)) == tiny_root
    with pytest.raises(ConfigError, match=r"which data set\?"):
        locate(DatasetConfig())
    with pytest.raises(DatasetError, match=r"has no meta/info\.json"):
        locate(DatasetConfig(root=tmp_path))


@pytest.mark.parametrize("wrong", [{"video_decoder": "vlc"}, {"cache_limit_gib": 0.0}])
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        options.decode(DatasetConfig, wrong)


def test_a_data_set_that_changed_has_another_fingerprint(copy, tiny_root):
    def fingerprint() -> str:
        return open_source(DatasetConfig(root=copy), Embodiment()).fingerprint

    first = fingerprint()
    assert first == fingerprint() == open_source(DatasetConfig(root=tiny_root), Embodiment()).fingerprint  # copytree keeps the times
    video = next(iter(copy.rglob("*.mp4")))
    video.touch()
    second = fingerprint()
    rewrite_info(copy, robot_type="other")
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("outputs/demso", "but outputs/demos exists; type --dataset.root outputs/demos"),
        ("outputs/demos", "found the path of a data set, outputs/demos; type --dataset.root outputs/demos"),
        ("./outputs/demos/", "type --dataset.root"),
        ("outputs/run/demos", "is a name, OWNER/NAME, found 'outputs/run/demos'; for a folder type --dataset.root FOLDER"),
        ("~/demos", "for a folder type --dataset.root FOLDER"),
        ("/demos", "for a folder type --dataset.root FOLDER"),
        ("pusht", "for a folder type --dataset.root FOLDER"),
    ],
)
def test_a_path_given_as_a_name_is_refused_without_the_network(tiny_root, tmp_path, monkeypatch, name, line):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(lerobot_source, "_download", lambda _: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/demos").symlink_to(tiny_root)
    with pytest.raises(DatasetError, match=line):
        locate(DatasetConfig(repo_id=name))


def test_a_true_name_goes_on_to_the_hub_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    monkeypatch.setattr(lerobot_source, "_download", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lerobot/pusht_image").mkdir(parents=True)
    assert locate(DatasetConfig(repo_id="lerobot/pusht")) == tmp_path / "lerobot/pusht"
    assert f"data set lerobot/pusht is not in {tmp_path}: asking Hugging Face's hub for it" in capsys.readouterr().err


def test_a_mistyped_root_names_the_nearest_folder(tiny_root, tmp_path):
    (tmp_path / "demos").symlink_to(tiny_root)
    with pytest.raises(DatasetError, match=f"but {tmp_path}/demsos does not exist: did you mean {tmp_path}/demos"):
        locate(DatasetConfig(root=tmp_path / "demsos"))
