"""The list of a call's matrix products: every operation counted, weights known, and the same list when they run alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pi0fm.bench.products import Operand, Product, Roofline, Work, bare, measure_roofline, products_of, synchronized, work_of
from pi0fm.policy.packed import PackedLinear, can_pack


class Block(nn.Module):
    """A convolution, a linear layer in bfloat16 or float32, attention by hand and fused."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.wide = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2).contiguous()
        query, key, value = self.wide(tokens).chunk(3, dim=-1)
        bias = torch.zeros(1, 1, key.shape[1]).expand(len(x), query.shape[1], -1)
        by_hand = torch.baddbmm(bias.to(query.dtype), query, key.transpose(1, 2), alpha=0.5).softmax(-1) @ value
        heads = (part[:, None] for part in (by_hand, key, value))
        return self.out(F.scaled_dot_product_attention(*heads)[:, 0])


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_operations_are_those_of_the_shapes(block):
    """Sixteen tokens of width 8, batch 2: patch 2*2*16*8*48, wide 2*32*8*24, four products of attention 2*2*16*16*8, out 2*32*8*8."""
    with torch.no_grad():
        work = work_of(products_of(lambda: block(X), block.parameters()))
    attention = 2 * 2 * 16 * 16 * 8
    assert work.flops == {torch.float32: 2 * 2 * 16 * 8 * 48 + 2 * 32 * 8 * 24 + 4 * attention + 2 * 32 * 8 * 8}
    assert work.weight_bytes == 4 * sum(parameter.numel() for parameter in block.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_list(block, mode):
    with torch.no_grad():
        expected = products_of(lambda: block(X), block.parameters())
    with mode():
        found = products_of(lambda: block(X), block.parameters())
    assert [product.flops for product in found] == [product.flops for product in expected]
    assert work_of(found) == work_of(expected)


def test_backward_is_counted_as_torch_counts_it(block):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(X).sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        by_products = work_of(products_of(lambda: block(X).sum().backward(), block.parameters())).total_flops
    fused = work_of(products_of(lambda: block(X).sum().backward(), block.parameters())).total_flops
    assert by_products == counter.get_total_flops()
    assert fused == by_products + 2 * 2 * 16 * 16 * 8  # the fused kernel keeps no scores, and makes them again


def test_weights_are_known_after_autocast_has_changed_their_type(block):
    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            block(X)

    products = products_of(call, block.parameters())
    assert {operand.dtype for product in products for operand in product.operands} == {torch.bfloat16}
    assert work_of(products).weight_bytes == 2 * sum(parameter.numel() for parameter in block.parameters())


def test_a_weight_that_is_read_twice_counts_twice():
    linear = nn.Linear(4, 4, bias=False)
    one = work_of(products_of(lambda: linear(X[0, 0, :4, :4]), linear.parameters()))
    two = work_of(products_of(lambda: linear(linear(X[0, 0, :4, :4])), linear.parameters()))
    assert (two.weight_bytes, two.total_flops) == (2 * one.weight_bytes, 2 * one.total_flops)
    assert one.weight_bytes == 64


def without_identity(products: list[Product]) -> list[tuple]:
    return [
        (str(product.operation), [(each.shape, each.stride, each.dtype) for each in product.operands], product.flops)
        for product in products
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_alone_they_are_the_same_products(block, backward):
    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            answer = block(X).float().sum()
        if backward:
            answer.backward()

    products = products_of(call, block.parameters())
    again = products_of(bare(products), ())
    assert [row[1:] for row in without_identity(again)] == [row[1:] for row in without_identity(products)]


def test_in_place_and_into_a_given_tensor_are_products_too():
    left, right, target = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
    found = products_of(lambda: (torch.mm(left, right, out=target), target.addmm_(left, right)), ())
    assert [product.flops for product in found] == [60, 60]
    bare(found)()
    assert target.tolist() == [[6.0] * 5] * 2  # bare has tensors of its own


def test_roofline_is_the_longer_of_computing_and_reading():
    roofline = Roofline({torch.float32: 100.0, torch.bfloat16: 400.0}, bytes_per_second=10.0)
    assert roofline.seconds(Work({torch.float32: 200, torch.bfloat16: 400}, weight_bytes=20)) == 3.0
    assert roofline.seconds(Work({torch.float32: 200}, weight_bytes=50)) == 5.0


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr("pi0fm.bench.products._LARGE", 64)
    monkeypatch.setattr("pi0fm.bench.products._COPIED", 4096)
    roofline = measure_roofline(torch.device("cpu"), [torch.float32, torch.bfloat16])
    assert set(roofline.flops_per_second) == {torch.float32, torch.bfloat16}
    assert min(*roofline.flops_per_second.values(), roofline.bytes_per_second) > 0


def test_bytes_do_not_depend_on_strides():
    assert Operand((4, 5), (0, 1), torch.bfloat16, torch.device("cpu"), None).bytes == 40


def test_a_call_that_is_waited_for_is_made_once():
    made: list[int] = []
    synchronized(lambda: made.append(1), torch.device("cpu"))()
    assert made == [1]


@pytest.mark.skipif(not can_pack(), reason="multiplies packed bfloat16 matrices")
def test_a_packed_product_counts_as_the_plain_one():
    plain = nn.Linear(48, 40).bfloat16().requires_grad_(False)
    x, module = torch.randn(2, 3, 48).bfloat16(), PackedLinear(plain.weight, plain.bias, "tanh")
    with torch.inference_mode():
        expected = work_of(products_of(lambda: plain(x), plain.parameters()))
        products = products_of(lambda: (module(x), module(x)), module.parameters())
    found = work_of(products[:1])
    assert (found.flops, found.weight_bytes) == (expected.flops, expected.weight_bytes - 2 * 40)  # the bias is no parameter there
    assert len({operand.weight for product in products for operand in product.operands if operand.packed}) == 1
    with torch.inference_mode():
        alone = products_of(bare(products), [])
    assert [product.flops for product in alone] == [product.flops for product in products]
    assert all(product.arguments[3:] == ("none", [], "") for product in alone)
