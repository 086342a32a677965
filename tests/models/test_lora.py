"""Tests of adapters: on exactly the chosen layers, without effect at the start, merged into plain weights at the end."""

import copy
import dataclasses
from fnmatch import fnmatchcase

import pytest
import torch
from small_pi0 import BOTH, LIKE_PI0, network, observation, question
from torch import nn

from pi0fm.models.config import LoraConfig
from pi0fm.models.lora import attach, is_adapter, merged, target_modules
from pi0fm.models.parts import PARTS, part_of
from pi0fm.models.pi0 import Pi0
from pi0fm_client.errors import ConfigError

EVERYWHERE = ("vision", "backbone", "action_expert")


def adapted(config, lora: LoraConfig) -> Pi0:
    """Adapters whose B is not zero any more, as after some steps."""
    model = network(config)
    attach(model, lora)
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3, generator=random)
    return model


def answer(model: Pi0) -> torch.Tensor:
    with torch.no_grad():
        return model(observation(), *question())


@pytest.mark.parametrize("kind", BOTH)
def test_every_parameter_is_in_one_part_and_every_part_has_some(kind):
    assert {part_of(name) for name, _ in network(BOTH[kind]).named_parameters()} == set(PARTS)
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("head.weight")


@pytest.mark.parametrize("kind", BOTH)
def test_a_part_means_every_linear_layer_in_it(kind):
    """Counted by hand: 3 layers, of which the last backbone one has k and v alone; 1 layer of vision."""
    model = network(BOTH[kind])
    per_layer = ("qkv", "out", "mlp.gate_up", "mlp.down")
    norms = ("attention_norm.modulation", "mlp_norm.modulation") if kind == "pi05" else ()
    expert = [f"decoder.layers.{layer}.action_expert.{name}" for layer in range(3) for name in (*per_layer, *norms)]
    backbone = [f"decoder.layers.{layer}.backbone.{name}" for layer in range(2) for name in per_layer]
    assert set(target_modules(model, ["action_expert"])) == {*expert, *(("decoder.final_norm.modulation",) if norms else ())}
    assert set(target_modules(model, ["backbone"])) == {*backbone, "decoder.layers.2.backbone.qkv", "vision.projector"}
    vision = target_modules(model, ["vision"])
    assert {name.rsplit(".", 1)[1] for name in vision} == {"qkv", "out", "fc1", "fc2"}
    assert set(target_modules(model, EVERYWHERE)) == {
        *vision,
        *target_modules(model, ["backbone"]),
        *target_modules(model, ["action_expert"]),
    }


def test_a_name_with_stars_means_what_it_matches():
    pattern = "decoder.layers.*.action_expert.qkv"
    found = target_modules(network(LIKE_PI0), [pattern, "vision.projector"])
    assert found == ("vision.projector", *(f"decoder.layers.{layer}.action_expert.qkv" for layer in range(3)))
    assert all(fnmatchcase(name, pattern) for name in found[1:])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("backbon", "which names none: did you mean 'backbone'"),
        ("decoder.layers.*.backbone.qvk", r"did you mean 'decoder\.layers\.\*\.backbone\.qkv'"),
        ("q_proj", "which names none"),
        ("time_mlp_in", "must leave out time_mlp_in.*train whole"),
        ("*", "must leave out .*action_in"),
    ],
)
def test_a_target_that_names_nothing_or_too_much(target, words):
    with pytest.raises(ConfigError, match=words):
        target_modules(network(LIKE_PI0), ["backbone", target])


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"alpha": 0.0}, {"rank": 4, "targets": ()}])
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=r"lora\."):
        LoraConfig(**wrong)


@pytest.mark.parametrize("kind", BOTH)
def test_adapters_sit_on_exactly_the_targets_and_alone_train(kind):
    model = network(BOTH[kind])
    names = target_modules(model, EVERYWHERE)
    assert attach(model, LoraConfig(4, targets=EVERYWHERE)) == set(EVERYWHERE)
    halves = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert halves == {f"{name}.lora_{half}.default.weight" for name in names for half in "AB"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == halves


@pytest.mark.parametrize("kind", BOTH)
def test_they_change_nothing_at_the_start(kind):
    """Bit by bit: B is 0."""
    model = network(BOTH[kind])
    before = answer(model)
    attach(model, LoraConfig(4, targets=EVERYWHERE))
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("kind", BOTH)
def test_merged_weights_answer_like_the_adapted_network_under_plain_names(kind):
    lora = LoraConfig(4, alpha=6.0, targets=EVERYWHERE)
    model = adapted(BOTH[kind], lora)
    plain = Pi0(BOTH[kind]).eval()
    plain.load_state_dict(dict(merged(model.state_dict(), lora.scaling)), strict=True)
    difference = float((answer(plain) - answer(model)).abs().max() / answer(model).abs().max())
    assert difference < 1e-5
    assert float((answer(network(BOTH[kind])) - answer(model)).abs().max()) > 1e-2, "the adapters of this test do something"


def test_merging_is_pefts_own():
    from peft.tuners.lora import LoraLayer

    lora = LoraConfig(4, alpha=6.0, targets=EVERYWHERE)
    model = adapted(LIKE_PI0, lora)
    ours = dict(merged(model.state_dict(), lora.scaling))
    theirs = copy.deepcopy(model)
    for name, module in theirs.named_modules():
        if isinstance(module, LoraLayer):
            module.merge()
            assert torch.allclose(ours[f"{name}.weight"], module.get_base_layer().weight, rtol=1e-6, atol=1e-7), name


def test_plain_weights_pass_through_merging():
    weights = network(LIKE_PI0).state_dict()
    found = dict(merged(weights, 1.0))
    assert found.keys() == weights.keys()
    assert all(found[name] is weights[name] for name in weights)


def test_bfloat16_weights_are_merged_in_float32():
    lora = LoraConfig(4, targets=("backbone",))
    weights = adapted(LIKE_PI0, lora).state_dict()
    name = "decoder.layers.0.backbone.qkv"
    half = weights | {f"{name}.base_layer.weight": weights[f"{name}.base_layer.weight"].bfloat16()}
    product = weights[f"{name}.lora_B.default.weight"] @ weights[f"{name}.lora_A.default.weight"]
    expected = half[f"{name}.base_layer.weight"].float() + lora.scaling * product
    found = dict(merged(half, lora.scaling))[f"{name}.weight"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_configuration_can_be_hashed():
    """The memory estimate keeps its counts by it."""
    assert hash(dataclasses.replace(LoraConfig(4), targets=("vision",))) != hash(LoraConfig(4))
