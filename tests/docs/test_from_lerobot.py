"""Tests that every option of LeRobot is accepted, ignored or refused, as docs/from_lerobot.md says."""

import dataclasses
import typing
from pathlib import Path

import pytest
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from pi0fm import options
from pi0fm.cli import lerobot
from pi0fm.cli.judging import eval as eval_command
from pi0fm.cli.training import train
from pi0fm.cluster.training_run import TrainingRun
from pi0fm_client.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from_lerobot.md"


def leaves(cls: type, prefix: str = "") -> set[str]:
    """Dotted names of a configuration, without the policy, which each robot chooses."""
    found, hints = set(), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = [hint for hint in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(hint)]
        if field.name != "policy":
            found |= leaves(inner[0], f"{prefix}{field.name}.") if inner and prefix.count(".") < 2 else {f"{prefix}{field.name}"}
    return found


def known(name: str, table: dict) -> bool:
    parts = name.split(".")
    return name in lerobot.SAME or name in lerobot.OTHERS or any(".".join(parts[:end]) in table for end in range(1, len(parts) + 1))


def test_every_option_of_lerobot_train_has_a_row() -> None:
    names = leaves(TrainPipelineConfig) | {"policy.type", "policy.path"}
    for cls, prefix in ((PI0Config, "policy."), (PI05Config, "policy."), (AdamWConfig, "optimizer.")):
        names |= leaves(cls, prefix)
    names |= leaves(CosineDecayWithWarmupSchedulerConfig, "scheduler.")
    ours = {name.removeprefix("--") for name, _, _ in options.describe(TrainingRun)}
    assert {name for name in names if not known(name, lerobot.TRAIN) and name not in ours} == set()


def test_every_option_of_lerobot_eval_has_a_row() -> None:
    names = {
        name for name in leaves(EvalPipelineConfig) if not name.startswith(("env.features", "eval.recording", "env.disable", "env.fps"))
    }
    assert {name for name in names if not known(name, lerobot.EVAL)} == set()


@pytest.mark.parametrize("name", lerobot.SAME)
def test_what_is_the_same_is_an_option_here(name: str) -> None:
    assert f"--{name}" in {row[0] for row in options.describe(TrainingRun)}


@pytest.mark.parametrize(("table", "cls"), [(lerobot.TRAIN, TrainingRun), (lerobot.EVAL, eval_command.Options)])
def test_what_is_taken_is_an_option_here(table: dict, cls: type) -> None:
    ours = {row[0].removeprefix("--") for row in options.describe(cls)}
    groups = {name.rpartition(".")[0] for name in ours} | {"model"}
    for name, word in table.items():
        to = word if isinstance(word, str) else getattr(word, "to", "steps" if cls is TrainingRun else "tasks")
        assert to in ours or to in groups or to.split(".")[0] == "model", name


def parsed(*words: str) -> TrainingRun:
    return options.parse(TrainingRun, words, train.ALIASES)


def test_a_command_of_lerobot_trains_the_same_run() -> None:
    run = parsed(
        *("--dataset.repo_id=me/arm", "--policy.type=pi0", "--policy.device=cuda", "--policy.dtype=bfloat16", "--batch_size=8"),
        *("--policy.gradient_checkpointing=true", "--policy.freeze_vision_encoder=true", "--policy.train_expert_only=false"),
        *("--policy.chunk_size=30", "--policy.n_action_steps=10", "--policy.optimizer_lr=1e-4", "--policy.scheduler_decay_lr=1e-5"),
        *("--policy.optimizer_betas=[0.8, 0.9]", "--save_freq=500", "--log_freq=10", "--policy.push_to_hub=false", "--wandb.enable=false"),
        *("--job_name=arm", "--output_dir=outputs/arm", "--policy.compile_model=true", "--num_workers=0"),
        '--rename_map={"observation.images.front": "observation.images.base"}',
    )
    assert (run.dataset.repo_id, run.model, run.precision) == ("me/arm", {"preset": "pi0", "action_horizon": 30}, "bfloat16")
    assert (run.global_batch_size, run.activation_checkpointing, run.train_only, run.compile) == (8, "full", "frozen_vision", True)
    assert (run.execution_horizon, run.checkpoint_every, run.log_every) == (10, 500, 10)
    optimizer = run.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (1e-4, 0.8, 0.9)
    assert optimizer.final_learning_rate_ratio == pytest.approx(0.1)
    assert run.embodiment.cameras == {"base": "observation.images.front"}


def test_its_words_are_taken_in_files_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 16\npeft: {r: 8}\npolicy: {type: pi05, gradient_checkpointing: true}\nmodel: {action_horizon: 20}\n")
    run = parsed(str(file), "--steps", "7")
    assert (run.global_batch_size, run.lora.rank, run.activation_checkpointing, run.steps) == (16, 8, "full", 7)
    assert run.model == {"preset": "pi05", "action_horizon": 20}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--policy.push_to_hub=true"], "hf upload"),
        (["--env.type=libero"], "pi0fm eval"),
        (["--policy.n_obs_steps=2"], "no history"),
        (["--policy.type=act"], "counterpart for pi0, pi05, tiny, found act; type --policy.type pi0$"),
        (["--policy.device=mps"], "leave it out, or type cpu"),
        (["--policy.device=cuda:x"], "leave it out, or type cpu"),
        (["--policy.device=cuda:2"], "type CUDA_VISIBLE_DEVICES=2 in front of the command, and --policy.device cuda$"),
        (["--policy.use_relative_actions=true"], "--embodiment.delta_actions pan,lift"),
        (["--wandb.mode=offline"], "type WANDB_MODE=offline"),
        (["--wandb.entity=us"], "type WANDB_ENTITY=NAME"),
        (["--config_path=train_config.json"], "type pi0fm train FILE.yaml"),
        (["--resume=true", "--config_path=a/b/checkpoints/last/train_config.json"], "type --output_dir a/b --resume true"),
        (["--dataset.image_transforms.max_num_transforms=2"], "augmentation.crop"),
        (["--policy.optimizer_eps=1e-6"], "leave it out"),
        (["--policy.image_resolution=[224, 128]"], "square"),
        (["--policy.optimizer_betas=0.9"], "two numbers"),
        (["--rename_map={observation.state: state}"], "embodiment.state"),
        (["--policy.chunk_sise=50"], "unknown option policy.chunk_sise: did you mean 'policy.chunk_size'"),
    ],
)
def test_what_has_no_counterpart_says_what_to_type(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        parsed(*words)


@pytest.mark.parametrize(("word", "device"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:0", "cuda"), ("null", None)])
def test_the_device_is_that_of_the_run(word: str, device: str | None) -> None:
    assert parsed(f"--policy.device={word}").device == device


def test_a_run_that_has_only_a_name_has_a_folder_of_it(tmp_path: Path) -> None:
    assert parsed("--job_name=arm").output_dir == Path("outputs/arm")
    assert parsed("--job_name=arm", "--output_dir=x").output_dir == Path("x")
    (tmp_path / "checkpoints/last").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    resumed = parsed("--resume=true", f"--config_path={tmp_path}/checkpoints/last/train_config.json", "--job_name=arm")
    assert (resumed.output_dir, resumed.resume) == (tmp_path, "true")


def test_what_an_earlier_lerobot_called_otherwise_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    parsed("--eval_freq=100", "--wandb.project=arm", "--wandb.enable=false", "--policy.use_relative_actions=false")
    assert "--eval_freq is ignored: `pi0fm eval --follow.run" in capsys.readouterr().err
    assert parsed("--wandb.project=arm").tracker_project == "arm"


def test_what_would_change_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parsed("--persistent_workers=true", "--scheduler.type=cosine_decay_with_warmup")
    said = capsys.readouterr().err
    assert "--persistent_workers is ignored" in said and "--scheduler.type is ignored: it is the cosine" in said


def test_the_page_is_printed_from_the_tables() -> None:
    assert PAGE.read_text().endswith(lerobot.page())
