import json
import shutil
from pathlib import Path

import pytest
from demos_help import config, submit

from pi0fm.demos.dataset import SETTINGS_FILE, Recording
from pi0fm.demos.record import record
from pi0fm_client.errors import ConfigError, OutputError, SimulationError


def seeds(root: Path, **changes: object) -> dict[str, tuple[int, ...]]:
    with Recording(root, config(root, **changes)) as recording:
        return {task: recording.seeds(task) for task in ("reach-v3", "door-open-v3")}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded") / "set"
    result = record(config(root), submit, window=2)
    assert result["episodes"] == 6 and result["frames"] == 48
    assert result["expert_success"] == {"reach-v3": 0.75, "door-open-v3": 0.75}
    return root


def test_nothing_is_left_beside_the_data_set(recorded: Path) -> None:
    assert [path.name for path in recorded.parent.iterdir()] == ["set"]


def test_more_episodes_go_on_from_what_is_there(recorded: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(recorded, root)
    before = {path: path.read_bytes() for path in (root / "data").rglob("*.parquet")}
    asked: list[tuple[str, int]] = []

    def watched(task: str, seed: int) -> object:
        asked.append((task, seed))
        return submit(task, seed)

    assert record(config(root, episodes=4), watched, window=1)["episodes"] == 8
    assert asked == [("reach-v3", 9), ("door-open-v3", 9)]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert seeds(root, episodes=4) == {"reach-v3": (5, 7, 8, 9), "door-open-v3": (5, 7, 8, 9)}


def test_an_interruption_keeps_what_was_finished(tmp_path: Path) -> None:
    root = tmp_path / "set"

    def interrupted(task: str, seed: int) -> object:
        if task == "door-open-v3":
            raise KeyboardInterrupt
        return submit(task, seed)

    with pytest.raises(KeyboardInterrupt):
        record(config(root), interrupted, window=1)
    assert seeds(root) == {"reach-v3": (5, 7, 8), "door-open-v3": ()}
    assert record(config(root), submit, window=1)["episodes"] == 6


def test_a_kill_between_two_renames_is_mended(recorded: Path, tmp_path: Path) -> None:
    root, work = tmp_path / "set", tmp_path / ".set.recording"
    work.mkdir()
    shutil.copytree(recorded, work / "previous")
    (work / "next").mkdir()
    (work / "next" / "half").write_text("half a segment")
    with Recording(root, config(root)) as recording:
        assert recording.episodes == 6
    assert (root / SETTINGS_FILE).exists() and not work.exists()


def test_two_processes_cannot_record_into_one_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    with Recording(root, config(root)), pytest.raises(OutputError, match="another process"), Recording(root, config(root)):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise": 0.1}, "noise=0.3, but noise=0.1"),
        ({"cameras": "base=corner:32x48"}, "cameras=base=corner2:32x48"),
        ({"tasks": "reach-v3"}, "tasks=reach-v3, door-open-v3"),
        ({"episodes": 2}, "already holds 3"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(recorded: Path, change: dict[str, object], words: str) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in recorded.rglob("*"))
    with pytest.raises(OutputError) as caught:
        record(config(recorded, **change), submit, window=1)
    assert [path.name for path in recorded.parent.iterdir()] == ["set"]
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in recorded.rglob("*"))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(OutputError, match="not a recording"):
        record(config(tmp_path), submit, window=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_hopeless_expert_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="20 times in a row"):
        record(config(tmp_path / "set"), lambda task, seed: lambda: None, window=4)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": "reech-v3"},
        {"tasks": ""},
        {"tasks": "reach-v3,reach-v3"},
        {"episodes": 0},
        {"noise": -1.0},
        {"noise": float("nan")},
        {"max_steps": 501},
    ],
)
def test_options_out_of_range(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        config(tmp_path, **change)


def test_the_settings_are_readable(recorded: Path) -> None:
    assert json.loads((recorded / SETTINGS_FILE).read_text())["noise"] == 0.3
