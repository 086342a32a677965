"""`pi0fm bench learning`: wrong words, folders that are taken, and where its demonstrations come from. Nothing is trained here."""

import json
from pathlib import Path

import pytest

from pi0fm.cli import bench_learning
from pi0fm.cli.main import main
from pi0fm.data.columns.lerobot_source import DatasetConfig


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    """The recordings that were asked for; each stops the command."""
    asked = []

    def record(config):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_learning, "record_demonstrations", record)
    return asked


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bench", "lerning"], "pi0fm: unknown command 'bench lerning': did you mean 'learning'?"),
        (["bench", "learning", "--seeds", "0"], "pi0fm: seeds must be 1 or more, found 0; type --seeds 1"),
        (["bench", "learning", "--cpu-seconds", "-1"], "pi0fm: cpu_seconds must be above 0, found -1; type --cpu_seconds 240"),
        (["bench", "learning", "--cpu_second", "1"], "pi0fm: unknown option cpu_second: did you mean 'cpu_seconds'?"),
        (["bench", "learning", "--task", "reech-v3"], "pi0fm: unknown Meta-World task 'reech-v3': did you mean 'reach-v3'?"),
    ],
)
def test_wrong_words_are_one_line(capsys, nothing_recorded, words, line):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert nothing_recorded == []


@pytest.mark.parametrize("taken", ["learning.json", ""])
def test_a_folder_that_is_taken_is_left_alone(capsys, tmp_path, nothing_recorded, taken):
    place = tmp_path / "out"
    file = place / taken
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert main(["bench", "learning", "--output_dir", str(place)]) == 1
    assert "type --output_dir ANOTHER" in capsys.readouterr().err
    assert (file.read_text(), nothing_recorded) == ("{}", [])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("validation: {every: 5, episodes: 2}", "found validation in --config; leave it out"),
        ("validation: {episodes: 2}", "found validation in --config"),
        ("lora: {rank: 4}\naugment: true", "found lora, augment in --config; leave them out"),
        ("train_only: expert_only", "found train_only in --config"),
    ],
)
def test_what_a_comparison_would_pass_over_is_refused_before_anything_is_recorded(capsys, tmp_path, nothing_recorded, given, named):
    (tmp_path / "run.yaml").write_text(given)
    assert main(["bench", "learning", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert (nothing_recorded, (tmp_path / "out").exists()) == ([], False)


def test_without_a_data_set_the_demonstrations_are_recorded_here(nothing_recorded, tmp_path):
    """In this process: Ray's would still be around when the first training is timed."""
    assert main(["bench", "learning", "--task", "reach-v3", "--demonstrations", "7", "--output_dir", str(tmp_path / "out")]) == 130
    (asked,) = nothing_recorded
    assert (asked.task_names, asked.episodes, asked.num_workers) == (("reach-v3",), 7, 0)
    assert asked.folder == tmp_path / "out" / "dataset"


def test_a_data_set_that_is_named_is_taken_as_it_is(nothing_recorded):
    named = bench_learning.Options(dataset=DatasetConfig(root=Path("somewhere")))
    assert bench_learning._with_demonstrations(named) is named
    assert nothing_recorded == []


def test_help_lists_every_option(capsys):
    assert main(["bench", "learning", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "pi0fm bench learning [FILE.yaml ...]" in shown
    assert all(f"--{name}" in shown for name in ("task", "cpu_seconds", "seeds", "threads", "dataset.root", "output_dir"))


def test_the_shipped_configuration_can_be_compared():
    """LeRobot takes its shape, and its fields are the trainer's."""
    from pi0fm import options
    from pi0fm.bench.learning import comparable
    from pi0fm.cluster.training import TrainingRun

    run = comparable(options.decode(TrainingRun, options.read_yaml(options.shipped()["quickstart"])), bench_learning.Options())
    assert run.optimizer.learning_rate == 1e-3
    assert run.execution_horizon == 8
    json.dumps(options.encode(run))
