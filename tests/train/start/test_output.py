"""Tests of the ownership of an output folder: every case of the claim, and no overwriting in the refused ones."""

import dataclasses
import json
from pathlib import Path

import pytest

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.train.components import ValidationConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.start.output import claim, claimed
from pi0fm_client.errors import ConfigError, OutputError


def config(directory: Path, **change: object) -> TrainConfig:
    return TrainConfig(output_dir=directory, **change)


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def begun(run: TrainConfig) -> None:
    """Claim the folder, and log a step."""
    claim(run)
    (run.output_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_empty_folder_is_claimed(tmp_path, exists):
    folder = tmp_path / "deep/run"
    if exists:
        folder.mkdir(parents=True)
    claim(config(folder, seed=3))
    assert json.loads(contents(folder)["run.json"])["seed"] == 3


def test_a_run_is_not_started_over(tmp_path):
    begun(config(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="holds a run; add --resume true"):
        claim(config(tmp_path))
    assert contents(tmp_path) == before


def test_resume_may_change_what_does_not_change_the_run(tmp_path):
    begun(config(tmp_path))
    claim(config(tmp_path, resume="true", steps=40_000, micro_batch_size=4, log_every=7, checkpoint_every=9, keep_checkpoints=3, threads=2))
    assert json.loads(contents(tmp_path)["run.json"])["steps"] == 40_000


def test_resume_may_look_at_the_held_out_episodes_in_another_way(tmp_path):
    begun(config(tmp_path, validation=ValidationConfig(episodes=3)))
    changed = ValidationConfig(every=9, episodes=3, samples=8, likelihood=True, probes=5, num_flow_steps=7, solver="rk4")
    claim(config(tmp_path, resume="true", validation=changed))
    assert json.loads(contents(tmp_path)["run.json"])["validation"]["every"] == 9


def test_an_option_that_an_older_run_did_not_know_had_its_default(tmp_path):
    begun(config(tmp_path))
    tree = json.loads((tmp_path / "run.json").read_text())
    del tree["validation"]
    (tmp_path / "run.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"validation\.episodes was 0, now 2"):
        claim(config(tmp_path, resume="true", validation=ValidationConfig(episodes=2)))
    claim(config(tmp_path, resume="true"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation": ValidationConfig(episodes=4)}, r"validation\.episodes was 0, now 4"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"global_batch_size": 16}, "global_batch_size was 32, now 16"),
        ({"model": {"preset": "tiny", "action_dim": 9}}, r"model\.action_dim was None, now 9"),
        ({"embodiment": Embodiment(cameras={"a": "b"})}, r"embodiment\.cameras\.a was None, now 'b'"),
        ({"ema_decay": None}, "ema_decay was 0.999, now None"),
    ],
)
def test_resume_of_another_run_is_refused(tmp_path, change, words):
    begun(config(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=words):
        claim(config(tmp_path, resume="true", **change))
    assert contents(tmp_path) == before


def test_auto_starts_a_new_run_and_goes_on_with_its_own(tmp_path):
    begun(config(tmp_path / "run", resume="auto"))
    claim(config(tmp_path / "run", resume="auto", steps=40_000))
    assert json.loads(contents(tmp_path)["run/run.json"])["steps"] == 40_000
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        claim(config(tmp_path / "run", resume="auto", seed=1))
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(OutputError, match="is not a run of pi0fm"):
        claim(config(tmp_path, resume="auto"))


def test_nothing_to_resume(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter one")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OutputError, match="nothing to resume"):
            claim(config(folder, resume="true"))
    assert contents(tmp_path) == {"thesis.txt": "chapter one"}
    assert not (tmp_path / "missing").exists()


def test_a_foreign_folder_or_file_is_refused(tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("chapter one")
    for place in (tmp_path, file):
        with pytest.raises(OutputError, match="is not a run of pi0fm"):
            claim(config(place))
    assert contents(tmp_path) == {"thesis.txt": "chapter one"}


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputError, match=r"run\.json is not readable"):
        claim(config(tmp_path, resume="true"))
    assert contents(tmp_path) == {"run.json": content}


@pytest.mark.parametrize("changed", [False, True])
def test_an_emptied_record_of_a_run_is_refused_whatever_may_change(tmp_path, changed):
    begun(config(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="not of a run of pi0fm"):
        claim(config(tmp_path, resume="true", resume_changed=changed))
    assert contents(tmp_path)["run.json"] == "{}"


def test_what_file_managers_leave_does_not_make_a_folder_foreign(tmp_path):
    (tmp_path / ".DS_Store").write_text("x")
    claim(config(tmp_path, seed=3))
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 3


def test_the_same_run_twice_is_no_difference(tmp_path):
    begun(config(tmp_path))
    claim(dataclasses.replace(config(tmp_path), resume="true"))
    claim(dataclasses.replace(config(tmp_path), resume="true"))


@pytest.mark.parametrize("resume", ["false", "true", "auto"])
def test_a_start_that_came_to_nothing_is_begun_again_with_any_options(tmp_path, resume, capsys):
    claim(config(tmp_path / "run"))
    (tmp_path / "run/metrics.jsonl").touch()
    claim(config(tmp_path / "run", seed=1, resume=resume))
    assert json.loads((tmp_path / "run/run.json").read_text())["seed"] == 1
    said = f"no checkpoint in {tmp_path}/run/checkpoints: the run starts at step 0"
    assert (said in capsys.readouterr().err) == (resume == "true")


def test_a_record_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "marathon"}')
    with pytest.raises(OutputError, match="not of a run of pi0fm"):
        claim(config(tmp_path))
    assert contents(tmp_path) == {"run.json": '{"name": "marathon"}'}


def test_a_resume_without_a_checkpoint_says_that_it_starts_at_the_beginning(tmp_path, capsys):
    begun(config(tmp_path))
    claim(config(tmp_path, resume="true"))
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_folder_below_a_file_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"must be writable, found .*: (Not a directory|File exists)"),
        claimed(config(tmp_path / "file/run")),
    ):
        raise AssertionError("claimed")
    assert contents(tmp_path) == {"file": "mine"}


def test_an_error_before_the_first_step_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(config(tmp_path / "run")):
        raise KeyboardInterrupt
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt), claimed(config(tmp_path / "run")):
        (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        raise KeyboardInterrupt
    assert sorted(contents(tmp_path)) == ["run/metrics.jsonl", "run/run.json"]


def test_a_foreign_folder_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(OutputError, match="is not a run"), claimed(config(tmp_path)):
        raise AssertionError("claimed")
    assert contents(tmp_path) == {"thesis.txt": "chapter one"}
