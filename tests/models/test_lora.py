"""Tests of adapters: on exactly the chosen layers, without effect at the start, merged into plain weights at the end."""

import copy
import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase

import peft
import pytest
import torch
from small_pi0 import BOTH, LIKE_PI0, network, observation, question
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi0fm.models.config import LoraConfig
from pi0fm.models.layers import Linear, recomputed
from pi0fm.models.lora import LoraLinear, attach, is_adapter, merged, target_modules
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


def test_names_shapes_and_merging_are_pefts():
    """So that a checkpoint of either is the other's."""
    lora = LoraConfig(4, alpha=6.0, targets=EVERYWHERE)
    ours, theirs = adapted(LIKE_PI0, lora), network(LIKE_PI0)
    with_peft(theirs, lora, target_modules(theirs, EVERYWHERE))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    plain = dict(merged(ours.state_dict(), lora.scaling))
    for name, module in theirs.named_modules():
        if hasattr(module, "merge"):
            module.merge()
            assert torch.allclose(plain[f"{name}.weight"], module.get_base_layer().weight, rtol=1e-6, atol=1e-7), name


WIDTHS = [(24, 96, False), (96, 24, True)]
KEYS = ("output", "input", "A", "B")


def with_peft(model: nn.Module, lora: LoraConfig, names: Iterable[str]) -> None:
    given = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": list(names)}
    peft.inject_adapter_in_model(peft.LoraConfig(**given), model)


def layers(widths: tuple[int, int, bool], kind: type[nn.Linear] = Linear) -> tuple[LoraLinear, nn.Module]:
    """Ours and peft's of the same numbers, B not zero."""
    torch.manual_seed(2)
    inputs, outputs, bias = widths
    lora = LoraConfig(4, alpha=6.0)
    theirs = nn.ModuleDict({"only": kind(inputs, outputs, bias=bias)}).requires_grad_(False)
    ours = LoraLinear(copy.deepcopy(theirs["only"]), lora)
    with_peft(theirs, lora, ["only"])
    nn.init.normal_(ours.lora_B["default"].weight, std=0.1)
    theirs["only"].load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs["only"]


def pulled(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    given = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(given)
    found.backward(gradient.to(found.dtype))
    halves = [dict(layer.named_parameters())[f"lora_{half}.default.weight"].grad for half in "AB"]
    assert all(parameter.grad is None for name, parameter in layer.named_parameters() if name.startswith("base_layer"))
    return dict(zip(KEYS, (found.detach(), given.grad, *halves), strict=True))


def rows(width: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("shape", [(5,), (3, 50)])
@pytest.mark.parametrize("widths", WIDTHS)
def test_output_and_gradients_are_pefts_in_float64(widths, shape):
    ours, theirs = (layer.double() for layer in layers(widths))
    x, gradient = rows(widths[0], *shape).double(), rows(widths[1], *shape).double()
    found, expected = pulled(ours, x, gradient), pulled(theirs, x, gradient)
    for key in KEYS:
        assert torch.allclose(found[key], expected[key], rtol=1e-12, atol=1e-13), key


@pytest.mark.parametrize("kind", [Linear, nn.Linear])
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_under_autocast_no_number_is_further_from_float64_than_pefts(widths, halved, kind):
    """Relative, Euclidean; both see the same bfloat16 rows and matrix, frozen in either type."""
    ours, theirs = layers(widths, kind)
    x, gradient = (rows(width, 4, 300).bfloat16().float() for width in widths[:2])
    for layer in (ours, theirs):
        layer.base_layer.to(torch.bfloat16)
    exact = pulled(copy.deepcopy(ours).double(), x.double(), gradient.double())
    if not halved:
        ours.base_layer.float(), theirs.base_layer.float()
    found, other = (pulled(layer, x, gradient, autocast=True) for layer in (ours, theirs))
    for key in KEYS:
        apart = [float((given[key].double() - exact[key]).norm() / exact[key].norm()) for given in (found, other)]
        assert apart[0] < min(1.02 * apart[1], 4e-3), (key, apart)
        assert found[key].dtype == other[key].dtype, key


def test_an_adapter_below_the_last_bit_of_the_matrix_is_not_lost():
    """B A is 2^-11 of every weight, which a bfloat16 sum of the two would round off."""
    layer = layers((256, 64, False))[0]
    weight = torch.full((64, 256), 1.0, dtype=torch.bfloat16)
    layer.base_layer.weight, layer.scaling = nn.Parameter(weight, requires_grad=False), 1.0
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(4, 256)[:, :1].expand(-1, 256))
        layer.lora_B["default"].weight.zero_()[:, 0] = 2.0**-11
    x = torch.randn(8192, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    gained = layer(x).detach().double() - x.double() @ weight.double().mT
    expected = 2.0**-11 * x.double().sum(dim=1, keepdim=True)
    slope = float((gained.mean(dim=1, keepdim=True) * expected).sum() / expected.square().sum())
    assert torch.equal(weight + layer.lora_B["default"].weight[:1, :1].bfloat16(), weight)
    assert slope == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("halves", [(False, True), (True, False)])
def test_a_half_that_is_frozen_has_no_gradient(halves):
    layer = layers(WIDTHS[0])[0]
    for half, trains in zip("AB", halves, strict=True):
        getattr(layer, f"lora_{half}")["default"].weight.requires_grad_(trains)
    layer(rows(24, 3).requires_grad_()).sum().backward()
    assert [getattr(layer, f"lora_{half}")["default"].weight.grad is not None for half in "AB"] == list(halves)


def test_without_a_gradient_for_its_input_the_wide_product_is_not_made_backwards():
    layer, x = layers(WIDTHS[0])[0], rows(24, 3)
    with Moved() as moved:
        layer(x).sum().backward()
    assert moved.wide_products(layer) == 1


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, apart from views; the shapes of all products' operands."""

    VIEWS = frozenset(("view", "t", "transpose", "expand", "detach", "slice", "select", "_unsafe_view", "alias", "unsqueeze"))

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.bytes += sum(value.numel() * value.itemsize for value in tree_leaves((args, found)) if isinstance(value, torch.Tensor))
        if "mm" in name:
            self.products.append([tuple(value.shape) for value in args if isinstance(value, torch.Tensor)][-2:])
        return found

    def wide_products(self, layer: LoraLinear) -> int:
        shape = tuple(layer.base_layer.weight.shape)
        return sum(shape in pair or shape[::-1] in pair for pair in self.products)


def test_an_adapter_adds_few_passes_over_wide_numbers():
    """Forwards: x read for h, y written by the narrow product and read by the wide one. Backwards: y's gradient read for h and for B,
    x's read and written, x read for A. peft's layer takes 7 of y and 8 of x in float32 forwards.
    """
    count, width_in, width_out = 4096, 64, 512
    x, y = (2 * count * width for width in (width_in, width_out))
    small = 0.15 * (x + y)  # h and its gradient, matrices
    layer = layers((width_in, width_out, False))[0]
    layer.base_layer.to(torch.bfloat16)
    gradient, found = rows(width_out, count).bfloat16(), []
    for module in (layer, layer.base_layer):
        given = rows(width_in, count).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            with Moved() as forwards:
                out = module(given)
            with Moved() as backwards:
                out.backward(gradient)
        found.append((forwards.bytes, backwards.bytes))
    (ours, back), (plain, plain_back) = found
    assert x + 2 * y <= ours - plain <= x + 2 * y + small
    assert 3 * x + 2 * y <= back - plain_back <= 3 * x + 2 * y + small


def test_a_last_product_is_not_computed_again():
    """`layers.recomputed` promises it of plain layers: the backward pass does not need the result."""
    layer = layers(WIDTHS[1])[0]
    with Moved() as moved:
        recomputed(lambda x: layer(x.relu()), rows(96, 5).requires_grad_()).sum().backward()
    assert moved.wide_products(layer) == 2, "one forwards, one for the input's gradient"


@pytest.mark.parametrize("recorded", [False, True])
def test_torch_func_takes_its_products(recorded):
    """As a log-likelihood does; recorded: with gradients in the network."""
    layer = layers(WIDTHS[0])[0].double().eval()
    x, probes = rows(24, 3).double(), rows(96, 5, 3).double()
    matrix = (layer.base_layer.weight + layer.scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    with torch.set_grad_enabled(recorded):
        value, pull = torch.func.vjp(layer, x)
        (found,) = torch.func.vmap(pull)(probes)
        each = torch.func.vmap(layer)(x)
    assert torch.allclose(found, probes @ matrix)
    assert torch.allclose(each, value)
    with torch.no_grad():
        pushed = torch.func.jvp(layer, (x,), (x,))[1]
    assert torch.allclose(pushed, x @ matrix.mT)


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
