"""Tests that packed matrices give the results of plain ones, with GELU, gradient in x, and after a copy."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_pi0 import BOTH, network, observation, question
from torch import nn

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.layers import GatedMLP
from pi0fm.models.vision import VisionMLP
from pi0fm.policy import packed
from pi0fm.policy.packed import PackedGatedMLP, PackedLinear, can_pack, pack
from pi0fm.policy.sampling import sampler
from pi0fm.policy.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(not can_pack(), reason="multiplies packed bfloat16 matrices")
ROUNDING = 2.0**-7  # of bfloat16, of a result near 1, twice


def linear(bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(48, 40, bias=bias).bfloat16().requires_grad_(False)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(1))


def plainly(plain: nn.Linear, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
    """In float64 from the same rounded inputs."""
    bias = None if plain.bias is None else plain.bias.double()
    product = F.linear(x.bfloat16().double(), plain.weight.double(), bias)
    return product if gelu is None else F.gelu(product, approximate=gelu)


@pytest.mark.parametrize("gelu", [None, "tanh", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_plain_matrix(bias, gelu):
    plain, x = linear(bias), rows(2, 3)
    found = PackedLinear(plain.weight, plain.bias, gelu)(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, 3, 40))
    torch.testing.assert_close(found.double(), plainly(plain, x, gelu), rtol=ROUNDING, atol=ROUNDING / 4)
    assert torch.equal(found, PackedLinear(plain.weight, plain.bias, gelu)(x.bfloat16()))


@pytest.mark.parametrize("gelu", [None, "tanh", "none"])
def test_with_a_gradient_it_is_the_same_number_and_the_gradient_is_the_plain_one(gelu):
    plain = linear(True)
    x, expected = rows(5).requires_grad_(), rows(5).requires_grad_()
    with torch.no_grad():
        without = PackedLinear(plain.weight, plain.bias, gelu)(x)
    found, weights = PackedLinear(plain.weight, plain.bias, gelu)(x), torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    assert found.requires_grad and torch.equal(found, without)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (wanted,) = torch.autograd.grad((plainly(plain, expected, gelu) * weights).sum(), expected)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0.02)
    assert wanted.abs().max() > 0.5


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_gives_the_same_numbers(again):
    plain, x = linear(True), rows(4)
    module = PackedLinear(plain.weight, plain.bias, "tanh")
    assert torch.equal(again(module)(x), module(x))
    assert repr(again(module)) == repr(module) == "PackedLinear(in_features=48, out_features=40, bias=True, gelu=tanh)"


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_a_gated_mlp_is_packed_in_its_halves(gelu):
    torch.manual_seed(0)
    plain = GatedMLP(48, 64, gelu).bfloat16().requires_grad_(False)
    x = rows(6)
    found, exact = PackedGatedMLP(plain)(x), copy.deepcopy(plain).double()(x.bfloat16().double())
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING, atol=ROUNDING / 4)
    asked = x.clone().requires_grad_()
    assert torch.equal(PackedGatedMLP(plain)(asked).detach(), found)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_the_towers_gelu_is_taken_with_the_product_and_only_once(gelu):
    torch.manual_seed(0)
    plain = VisionMLP(48, 64, gelu).bfloat16().requires_grad_(False)
    held = nn.ModuleDict({"mlp": copy.deepcopy(plain)})
    pack(held)
    assert [(type(module), module.gelu) for module in held["mlp"]] == [(PackedLinear, gelu), (PackedLinear, None)]
    exact = copy.deepcopy(plain).double()(rows(6).bfloat16().double())
    torch.testing.assert_close(held["mlp"](rows(6)).double(), exact, rtol=ROUNDING, atol=ROUNDING / 4)


def test_only_bfloat16_is_packed():
    held = nn.ModuleDict({"plain": nn.Linear(48, 40), "narrow": linear(True), "mlp": VisionMLP(48, 64, "none")})
    pack(held)
    assert [type(held[name]) for name in ("plain", "narrow", "mlp")] == [nn.Linear, PackedLinear, VisionMLP]


@pytest.mark.parametrize("name", list(BOTH))
def test_a_chunk_from_packed_matrices_is_that_from_plain_ones(name, monkeypatch):
    noise = question()[0]
    chunks = {}
    for packs in (True, False):
        monkeypatch.setattr(sampler, "can_pack", lambda packs=packs: packs)
        flow = FlowMatching.from_config(FlowConfig(solver="euler", num_flow_steps=4))
        made = Sampler(network(BOTH[name]), flow, torch.device("cpu"), torch.bfloat16)
        assert any(isinstance(module, PackedLinear) for module in made.model.modules()) == packs
        chunks[packs] = made(observation(), noise, torch.ones_like(noise, dtype=torch.bool))
    torch.testing.assert_close(chunks[True], chunks[False], rtol=0, atol=0.05)


def test_a_torch_without_the_operation_packs_nothing(monkeypatch):
    monkeypatch.setattr(packed, "_OPERATIONS", ("_linear_of_tomorrow",))
    assert not packed.can_pack()
