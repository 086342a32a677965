"""Tests of a run with few options, which takes the rest from its record, its bundle or its preset's file."""

import json
from pathlib import Path

import pytest
from small_policies import saved, small_policy

from pi0fm import options
from pi0fm.cli.training import train
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.models.config import PI0
from pi0fm.train.components import OptimizerConfig
from pi0fm.train.config import TrainConfig, changed_options
from pi0fm.train.optim import learning_rate
from pi0fm.train.start.defaults import defaults
from pi0fm_client.errors import ConfigError, OutputError

__all__ = ["saved", "small_policy"]


def parsed(*words: str) -> TrainingRun:
    return options.parse(TrainingRun, words, train.ALIASES, defaults=defaults)


def test_the_tiny_preset_brings_what_it_learns_with() -> None:
    file = options.parse(TrainingRun, ["tiny"])
    assert parsed("--dataset.root", "x") == parsed("tiny", "--dataset.root", "x")
    assert parsed("--batch_size", "8").optimizer == file.optimizer and parsed("--batch_size", "8").global_batch_size == 8
    assert parsed("--optimizer.learning_rate", "3e-4").optimizer.learning_rate == 3e-4


def test_a_large_preset_keeps_openpi_s_values() -> None:
    run = parsed("--policy.type", "pi0")
    assert (run.optimizer, run.network()) == (OptimizerConfig(), PI0)


def test_a_bundle_brings_its_network_and_words(small_policy, saved: Path) -> None:
    run = parsed("--policy.path", str(saved), "--policy.chunk_size", "3", "--execution_horizon", "2")
    theirs = small_policy.config
    assert run.network().decoder == theirs.model.decoder and run.network().action_horizon == 3
    assert (run.normalization, run.flow.path, run.tokenizer, run.prompt_dialect) == (
        theirs.normalization,
        theirs.flow.path,
        "pretrained",
        "pretrained",
    )
    assert parsed("--pretrained", str(saved), "--model.preset", "pi0").network() == PI0, "what is given stands, and is compared later"


@pytest.mark.parametrize("word", ["true", "auto"])
def test_a_resumed_run_is_typed_by_its_folder(tmp_path: Path, word: str) -> None:
    first = parsed("--dataset.root", "x", "--output_dir", str(tmp_path), "--steps", "70", "--optimizer.learning_rate", "3e-4")
    (tmp_path / "run.json").write_text(json.dumps(options.encode(first)))
    again = parsed("--output_dir", str(tmp_path), "--resume", word)
    assert changed_options(options.encode(first), options.encode(again)) == [] and again.steps == 70 and again.resume == word
    assert parsed("--output_dir", str(tmp_path), "--resume", word, "--steps", "90").steps == 90
    assert parsed("--output_dir", str(tmp_path)).steps == TrainConfig.steps, "without resume it is another run, which the folder refuses"


def test_a_record_that_is_not_readable_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json is not readable"):
        parsed("--output_dir", str(tmp_path), "--resume", "true")


def test_a_data_set_at_another_path_is_no_other_run() -> None:
    old, new = (options.encode(parsed("--dataset.root", root)) for root in ("here", "there"))
    assert changed_options(old, new) == []


def test_a_schedule_may_end_before_the_run() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_learning_rate_ratio=0.1, decay_steps=50)
    assert [learning_rate(config, step, 100) for step in (0, 20, 49)] == [
        learning_rate(OptimizerConfig(1.0, 0.1, 0), step, 50) for step in (0, 20, 49)
    ]
    assert learning_rate(config, 80, 100) == pytest.approx(0.1)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parsed("--stepps", "3", "--optimizer.warmup_steps", "many", "--seed", "x")
    assert all(name in str(error.value) for name in ("stepps", "optimizer.warmup_steps", "seed"))
