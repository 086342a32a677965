"""Tests of starting from a bundle: facts that must agree, facts of the run, choice of statistics."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_tokenizer
import tiny_dataset
import torch
import yaml
from small_runs import differing, start, weights

from pi0fm import options
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import ColumnStats, NormStats
from pi0fm.flow.config import FlowConfig
from pi0fm.models.config import LoraConfig
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.train.components import Adaptation, OptimizerConfig, ValidationConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.start.network import starting_network
from pi0fm.train.start.pretrained import Pretrained, open_pretrained, refuse_other_policy, resolve_dialect, resolve_tokenizer
from pi0fm_client.errors import BundleError, ConfigError

ROBOT = Embodiment("arm", {"base": "observation.images.base"}, state_dim=4, robot_action_dim=3)


def column(width: int, mean: float) -> ColumnStats:
    arrays = [np.full(width, value, dtype=np.float32) for value in (mean, 2, -1, 1, -2, 2)]
    return ColumnStats(*arrays)


STATS = NormStats(column(4, 0.5), column(3, -0.5), 99)


def config(**change: object) -> PolicyConfig:
    return dataclasses.replace(PolicyConfig(tiny_dataset.network(), FlowConfig(), ROBOT), **change)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A bundle of random weights."""
    path = tmp_path_factory.mktemp("bundles") / "base"
    torch.manual_seed(7)
    bundle.save(path, Pi0(tiny_dataset.network()).state_dict(), config(), STATS)
    return path


def bundle_of(config: TrainConfig) -> Path:
    return start(config).bundle


def test_only_the_expert_moves_and_the_statistics_are_the_data_sets(run, base):
    found = bundle_of(run("expert", steps=2, pretrained=base, train_only="expert_only"))
    moved = set(differing(base, found))
    assert moved
    assert all("action_expert" in name or name.startswith(("action_", "state_in", "time_", "decoder.final")) for name in moved)
    policy, stats = bundle.read(found)
    assert stats.num_frames == 28
    assert policy.training["trained"] == "expert_only"
    assert policy.training["pretrained"] == str(base)


def test_the_bundles_statistics_are_kept_on_request(run, base):
    found = bundle_of(run("kept", steps=1, pretrained=base, pretrained_norm_stats=True))
    assert bundle.read(found)[1].to_json() == STATS.to_json()


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_run_with_adapters_leaves_a_plain_bundle_and_can_be_resumed(run, base):
    lora = LoraConfig(4, targets=("vision", "backbone", "action_expert"))
    steady = OptimizerConfig(learning_rate=2e-3, warmup_steps=0, final_learning_rate_ratio=1.0)  # whatever the number of steps
    how = {"steps": 3, "checkpoint_every": 2, "pretrained": base, "lora": lora, "activation_checkpointing": "full", "optimizer": steady}
    whole = bundle_of(run("whole", **how))
    assert weights(whole).keys() == Pi0(tiny_dataset.network()).state_dict().keys()
    moved = differing(base, whole)
    assert "decoder.layers.0.backbone.qkv.weight" in moved
    assert "prompt_embedding.weight" not in moved
    assert not any("norm" in name for name in moved)
    bundle_of(run("broken", **how | {"steps": 2}))
    again = bundle_of(run("broken", **how, resume="true"))
    assert differing(whole, again) == []
    assert bundle.load(again, device="cpu").infer_batch([]) == []


VALIDATED = ValidationConfig(every=1, episodes=1, samples=2)


def validated(config: TrainConfig) -> bool:
    """Whether the run wrote a loss and an error of its held-out episode."""
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] > 0 and line["validation_error"] > 0 for line in lines if "validation_loss" in line] == [True]


@pytest.mark.parametrize("how", [{"lora": LoraConfig(4)}, {"train_only": "expert_only"}], ids=str)
def test_fine_tuning_is_validated(run, base, how):
    config = run("seen", steps=1, pretrained=base, validation=VALIDATED, **how)
    bundle_of(config)
    assert validated(config)


@pytest.mark.long
@pytest.mark.parametrize("how", [{"lora": LoraConfig(4)}, {"train_only": "expert_only"}], ids=str)
def test_frozen_bfloat16_is_validated(run, base, how, tmp_path):
    config = run("seen", steps=1, pretrained=base, validation=VALIDATED, frozen_bfloat16=True, precision="bfloat16", **how)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options.encode(config)))
    command = [sys.executable, "-m", "pi0fm.cli.main", "train", str(tmp_path / "run.yaml")]  # a process has one precision
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert validated(config)


def test_weights_are_taken_as_float32_whatever_the_file_holds(base):
    pretrained = open_pretrained(base)
    assert pretrained is not None
    model = starting_network(tiny_dataset.network(), Adaptation(), 0, pretrained)
    saved = weights(base)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert open_pretrained(None) is None


def test_lengths_are_the_runs_own(base):
    longer = dataclasses.replace(tiny_dataset.network(), action_horizon=9, max_prompt_tokens=40)
    pretrained = open_pretrained(base)
    refuse_other_policy(pretrained, config(model=longer, execution_horizon=9, embodiment=dataclasses.replace(ROBOT, name="other")))
    starting_network(longer, Adaptation(), 0, pretrained)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": dataclasses.replace(tiny_dataset.network(), action_dim=6)}, "model.action_dim is 5 there, 6 here"),
        ({"prompt_dialect": "lerobot"}, "prompt_dialect is 'openpi' there, 'lerobot' here; type --prompt_dialect openpi"),
        ({"normalization": "quantile"}, "normalization is 'z_score' there, 'quantile' here; type --normalization z_score"),
        ({"flow": FlowConfig(path="cosine")}, "flow.path is 'cond_ot' there, 'cosine' here; type --flow.path cond_ot"),
        ({"tokenizer": "/elsewhere"}, "found '/elsewhere'; type --tokenizer pretrained"),
    ],
)
def test_what_the_weights_cannot_be_given_is_refused_by_name(base, change, words):
    with pytest.raises(ConfigError, match=words):
        refuse_other_policy(open_pretrained(base), config(**change))


def test_a_bundle_keeps_its_dialect(tmp_path, base):
    bundle.save(tmp_path / "spoken", weights(base), config(prompt_dialect="lerobot"), STATS)
    assert bundle.load(tmp_path / "spoken", device="cpu").chain.tokenizer.dialect == "lerobot"


def test_the_tokenizer_is_the_bundles_own(tmp_path, base):
    words = small_tokenizer.write(tmp_path / "words", size=40)
    path = tmp_path / "spoken"
    bundle.save(path, weights(base), config(tokenizer=str(words)), STATS)
    pretrained = open_pretrained(path)
    own = resolve_tokenizer("pretrained", pretrained)
    assert own == str(path / "tokenizer")
    assert resolve_tokenizer("byt5", pretrained) == "byt5"
    for same in (own, str(words)):
        refuse_other_policy(pretrained, config(tokenizer=same))
    for other in ("byt5", str(small_tokenizer.write(tmp_path / "fewer", size=30))):
        with pytest.raises(ConfigError, match="type --tokenizer pretrained"):
            refuse_other_policy(pretrained, config(tokenizer=other))
    with pytest.raises(ConfigError, match="type --pretrained BUNDLE"):
        resolve_tokenizer("pretrained", None)


def test_the_dialect_is_the_bundles_own(tmp_path, base):
    bundle.save(tmp_path / "spoken", weights(base), config(prompt_dialect="lerobot"), STATS)
    pretrained = open_pretrained(tmp_path / "spoken")
    assert resolve_dialect("pretrained", pretrained) == "lerobot"
    assert resolve_dialect("openpi", pretrained) == "openpi"
    with pytest.raises(ConfigError, match="type --pretrained BUNDLE"):
        resolve_dialect("pretrained", None)


def test_statistics_of_another_width_cannot_be_kept(run, tmp_path, base):
    other = tmp_path / "other"
    bundle.save(other, weights(base), config(embodiment=dataclasses.replace(ROBOT, state_dim=6)), NormStats(column(6, 0), column(3, 0), 9))
    with pytest.raises(ConfigError, match="the robot's state, 4 wide, found 6"):
        bundle_of(run("run", pretrained=other, pretrained_norm_stats=True))


def test_weights_that_are_not_what_the_configuration_says(tmp_path, base):
    path = tmp_path / "short"
    bundle.save(path, {name: value for name, value in weights(base).items() if name != "action_in.bias"}, config(), STATS)
    with pytest.raises(BundleError, match=r"do not fit its configuration.*action_in\.bias") as caught:
        starting_network(tiny_dataset.network(), Adaptation(), 0, Pretrained(path, *bundle.read(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pretrained_norm_stats": True}, "found no bundle; type --pretrained BUNDLE"),
        ({"train_only": "expert_only", "frozen_bfloat16": True}, "precision float32; type --precision bfloat16"),
        ({"train_only": "expert_onl"}, "did you mean 'expert_only'"),
        ({"lora": LoraConfig(4, targets=("decoder.layers.*.qvk",))}, "which names none"),
        ({"prompt_dialect": "openpi_stateless"}, "type --prompt_dialect openpi"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(run, wrong, words):
    with pytest.raises(ConfigError, match=words):
        run("wrong", **wrong)
