"""Tests of `pi0fm train` in the calling process: the result on standard output, and one line and an exit code for every wrong input."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_dataset
import yaml

from pi0fm.cli.main import main


@pytest.fixture
def file(tiny_root, frames, tmp_path) -> Path:
    """A configuration of three steps."""
    tree = {
        "output_dir": str(tmp_path / "run"),
        "steps": 3,
        "global_batch_size": 4,
        "dataset": {"root": str(tiny_root), "cache_dir": str(frames), "video_decoder": "pyav"},
        "embodiment": {"cameras": {"base": "observation.images.base"}},
        "model": tiny_dataset.NETWORK,
        "precision": "float32",
        "execution_horizon": 2,
        "num_workers": 0,
        "threads": 1,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def refused(file, capfd):
    """`refused("--option", "value")`: (exit code, the line). One line begins with the program's name, and no traceback is shown."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["train", str(file), *arguments])
        captured = capfd.readouterr()  # what libraries in C write, too
        lines = [line for line in captured.err.splitlines() if line.startswith("pi0fm: ")]
        assert code != 0
        assert len(lines) == 1
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert captured.err.rstrip().endswith(lines[0])
        assert "[h264" not in captured.err
        assert "[mov" not in captured.err
        return code, lines[0]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(tiny_root: Path, tmp_path: Path, pattern: str, keep: float) -> Path:
    copy = Path(shutil.copytree(tiny_root, tmp_path / "copy"))
    path = next(iter(copy.rglob(pattern)))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return copy


def test_a_run_prints_its_bundle(file, tmp_path, capsys):
    assert main(["train", str(file), "--batch_size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["steps"] == 3
    assert result["loss"] > 0
    assert sorted(path.name for path in Path(result["bundle"]).iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "norm_stats.json",
        "reference.safetensors",
    ]
    assert json.loads((tmp_path / "run/run.json").read_text())["global_batch_size"] == 2


def test_an_output_folder_that_holds_another_run(file, tmp_path, refused, capfd):
    assert main(["train", str(file)]) == 0
    capfd.readouterr()
    before = contents(tmp_path / "run")
    code, line = refused()
    assert code == 1
    assert "holds a run; add --resume true" in line
    code, line = refused("--resume", "true", "--seed", "3")
    assert code == 2
    assert "seed was 0, now 3" in line
    assert contents(tmp_path / "run") == before


def test_an_output_folder_that_holds_something_else(tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("chapter one")
    code, line = refused()
    assert code == 1
    assert "is not a run of pi0fm" in line
    assert contents(tmp_path / "run") == {"thesis.txt": b"chapter one"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--embodiment.cameras.base", "observation.images.bse"), "type --embodiment.cameras '{base: observation.images.base"),
        (("--embodiment.robot_action_dim", "7"), "embodiment.robot_action_dim is 7, but column 'action'"),
        (("--model.action_dim", "2"), "the robot's action is 3 wide, the model's 2"),
        (("--stepz", "3"), "unknown option stepz: did you mean 'steps'"),
        (("--steps", "many"), "option steps must be a whole number"),
        (("--model.preset", "tinny"), "did you mean 'tiny'"),
        (("--model.max_prompt_tokens", "nine"), "max_prompt_tokens"),
        (("--micro_batch_size", "0"), "micro_batch_size must be >= 1, found 0"),
        (("--tokenizer", "/nowhere"), "tokenizer must be 'byt5' or a directory"),
        (("--dataset.episodes", "[9]"), "dataset.episodes must lie in 0..2, found [9]"),
    ],
)
def test_wrong_options(refused, arguments, words):
    code, line = refused(*arguments)
    assert code == 2
    assert words in line


def test_lerobots_word_for_the_weights_to_start_from(refused):
    code, line = refused("--policy.path", "/nowhere/bundle")
    assert code == 1
    assert "no bundle at /nowhere/bundle" in line


@pytest.mark.parametrize(
    ("words", "reason"), [(["--steps", "2"], "beyond steps 2"), (["--dataset.root", "another"], "another does not exist")]
)
def test_a_refused_resume_leaves_the_run_as_it_was(file, refused, tmp_path, capfd, words, reason):
    assert main(["train", str(file)]) == 0
    before = contents(tmp_path / "run")
    capfd.readouterr()
    _, line = refused("--resume", "true", *words)
    assert reason in line
    assert contents(tmp_path / "run") == before
    assert main(["train", "--output_dir", str(tmp_path / "run"), "--resume", "true"]) == 0


def test_more_ray_workers_than_cores_are_refused_before_ray_starts(refused):
    code, line = refused("--num_workers", "4000", "--batch_size", "4000")
    assert code == 2 and "num_workers are Ray workers that train" in line and "as LeRobot's num_workers do" in line


def test_a_missing_data_set_is_named_before_ray_starts(refused, monkeypatch):
    monkeypatch.setattr("pi0fm.cluster.training.ray_session", lambda address: pytest.fail("Ray was started"))
    code, line = refused("--num_workers", "1", "--dataset.root", "/nowhere/at/all")
    assert code == 1 and "/nowhere/at/all does not exist" in line


def test_one_option_in_two_words_is_refused_where_they_differ(file, refused, capfd):
    code, line = refused("--batch_size", "4", "--global_batch_size", "8")
    assert code == 2 and "--batch_size and --global_batch_size both set global_batch_size, found 4 and 8" in line
    file.write_text(file.read_text() + "batch_size: 2\n")
    code, line = refused()
    assert code == 2 and "both set global_batch_size" in line


def test_a_missing_configuration_file(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    assert "no configuration file at nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("pattern", "keep"), [("*.mp4", 0.5), ("*.mp4", 0.0), ("data/*/*.parquet", 0.5)])
def test_a_truncated_file_of_the_data_set(tiny_root, tmp_path, refused, pattern, keep):
    copy = damaged(tiny_root, tmp_path, pattern, keep)
    code, line = refused("--dataset.root", str(copy))
    assert code == 1
    assert str(copy) in line
    assert "download or record" in line or "record or download" in line
    assert not list((tmp_path / "run").glob("bundle*"))


def test_a_data_set_that_is_not_there(tmp_path, refused):
    code, line = refused("--dataset.root", str(tmp_path))
    assert code == 1
    assert "has no meta/info.json" in line


def test_a_prompt_that_does_not_fit(refused):
    code, line = refused("--model.max_prompt_tokens", "8")
    assert code == 1
    assert "the prompt must fit into 8 tokens, found 1" in line


def test_nothing_to_resume(tmp_path, refused):
    code, line = refused("--resume", "true")
    assert code == 1
    assert "nothing to resume" in line
    assert not (tmp_path / "run").exists()
