"""Tests of ratios of paired runs, with a clock set by the work, and of the matrix products of a call, against torch's counts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pi0fm.bench.harness.limits import Products, Rates, measure_rates, products_of
from pi0fm.bench.harness.measure import PairedRatio, paired_ratio, ratio_of
from pi0fm.policy.packed import PackedLinear, can_pack
from pi0fm_client.errors import ConfigError


class Stopwatch:
    """Time passes only when something works; `slow(k)` is how a neighbour slows the k-th round."""

    def __init__(self, slow=lambda round_: 1.0):
        self.now, self.slow, self.order = 0.0, slow, ""

    def work(self, name, seconds):
        def run():
            self.now += seconds * self.slow(len(self.order) // 2)
            self.order += name

        return run

    def __call__(self):
        return self.now


def test_a_neighbour_that_slows_a_round_leaves_its_ratio():
    watch = Stopwatch(slow=lambda round_: 1 + 9 * (round_ % 3 == 0))
    found = paired_ratio(watch.work("a", 3.0), watch.work("b", 2.0), 9, clock=watch)
    assert (found.median, *found.interval) == pytest.approx((1.5, 1.5, 1.5))
    assert found.first_seconds == pytest.approx(1.5 * found.second_seconds)


def test_the_side_that_begins_changes_every_round():
    watch = Stopwatch()
    paired_ratio(watch.work("a", 1.0), watch.work("b", 1.0), 4, warm_up=1, clock=watch)
    assert watch.order == "ba" + "abbaabba"


def test_warming_rounds_do_not_count():
    watch = Stopwatch(slow=lambda round_: 1.0 if round_ else 100.0)
    assert paired_ratio(watch.work("a", 1.0), watch.work("b", 1.0), 1, warm_up=1, clock=watch).first_seconds == 1.0


def test_the_interval_holds_the_median_and_shrinks_with_rounds():
    random = np.random.default_rng(2)
    few, many = (ratio_of([(2 * float(x), 1.0) for x in random.lognormal(0, 0.3, count)]) for count in (10, 1000))
    assert few.interval[0] < few.median < few.interval[1]
    assert many.interval[0] < 2 < many.interval[1]
    assert np.ptp(many.interval) < 0.3 * np.ptp(few.interval)


def test_what_is_left_behind_is_removed_outside_the_clock():
    watch, removed = Stopwatch(), []

    def after():
        removed.append(watch.now)
        watch.now += 100

    found = paired_ratio(watch.work("a", 3), watch.work("b", 1), 3, warm_up=1, clock=watch, after=after)
    assert (found.median, found.first_seconds, found.second_seconds, len(removed)) == (3.0, 3.0, 1.0, 8)


def test_a_ratio_of_unequal_work_is_scaled():
    """Ten seconds for 4 samples against five seconds for 80."""
    assert PairedRatio(2.0, (1.0, 3.0), 10.0, 5.0).per_piece(4, 80) == PairedRatio(40.0, (20.0, 60.0), 2.5, 0.0625)


def test_no_round_is_refused():
    with pytest.raises(ConfigError, match="1 round or more, found 0"):
        paired_ratio(lambda: None, lambda: None, 0)


class Block(nn.Module):
    """A convolution, linear layers, attention by hand and fused."""

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


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ATTENTION = 2 * 2 * 16 * 16 * 8  # operations of one product of it: 16 tokens of width 8, batch 2
FORWARD = 2 * 2 * 16 * 8 * 48 + 2 * 32 * 8 * 24 + 4 * ATTENTION + 2 * 32 * 8 * 8  # patch, wide, attention, out


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_operations_and_weights_are_those_of_the_shapes_in_every_mode(block, mode):
    with mode():
        products = products_of(lambda: block(X), block.parameters())
    assert products.flops == {torch.float32: FORWARD}
    assert products.weight_bytes == 4 * size(block)


def test_backward_is_counted_as_torch_counts_it(block):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(X).sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        by_products = products_of(lambda: block(X).sum().backward()).flops.total()
    assert by_products == counter.get_total_flops()
    fused = products_of(lambda: block(X).sum().backward()).flops.total()
    assert fused == by_products + ATTENTION  # the fused kernel keeps no scores, and makes them again


def test_weights_are_known_after_autocast_has_changed_their_type(block):
    with torch.autocast("cpu", torch.bfloat16):
        products = products_of(lambda: block(X), block.parameters())
    assert products.flops == {torch.bfloat16: FORWARD}
    assert products.weight_bytes == 2 * size(block)


def test_a_weight_that_is_read_twice_counts_twice():
    linear = nn.Linear(4, 4, bias=False)
    assert products_of(lambda: linear(linear(X[0, 0, :4, :4])), linear.parameters()).weight_bytes == 2 * 64


@pytest.mark.parametrize("backward", [False, True])
def test_alone_they_are_the_same_products_and_leave_everything_as_it_was(block, backward):
    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            answer = block(X).float().sum()
        if backward:
            answer.backward()

    products = products_of(call, block.parameters())
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with Products(block.parameters()) as again:
        products.run()
    assert again.flops == products.flops
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_in_place_and_into_a_given_tensor_are_products_too():
    left, right, target = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
    found = products_of(lambda: (torch.mm(left, right, out=target), target.addmm_(left, right)))
    assert found.flops.total() == 120
    found.run()
    assert target.tolist() == [[6.0] * 5] * 2  # the products have a target of their own


@pytest.mark.skipif(not can_pack(), reason="multiplies packed bfloat16 matrices")
def test_a_packed_product_counts_as_the_plain_one():
    plain = nn.Linear(48, 40).bfloat16().requires_grad_(False)
    x, module = torch.randn(2, 3, 48).bfloat16(), PackedLinear(plain.weight, plain.bias, "tanh")
    with torch.inference_mode():
        expected, found = products_of(lambda: plain(x), plain.parameters()), products_of(lambda: (module(x), module(x)))
        again = products_of(found.run)
    assert {dtype: 2 * count for dtype, count in expected.flops.items()} == found.flops == again.flops
    assert found.weight_bytes == 2 * (expected.weight_bytes - 2 * 40)  # the bias is no parameter there


def test_the_least_time_is_the_longer_of_computing_and_moving():
    rates, flops = Rates({torch.float32: 100.0, torch.bfloat16: 400.0}, bytes_per_second=10.0), {torch.float32: 200, torch.bfloat16: 400}
    assert (rates.seconds(flops, 20), rates.seconds(flops, 50)) == (3.0, 5.0)


def test_the_machine_is_measured():
    rates = measure_rates(torch.device("cpu"), [torch.float32, torch.bfloat16], whole=False)
    assert set(rates.flops_per_second) == {torch.float32, torch.bfloat16}
    assert min(*rates.flops_per_second.values(), rates.bytes_per_second) > 0
