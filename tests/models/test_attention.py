"""Tests of the CPU's folded attention against plain formulas and torch's scaled_dot_product_attention, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from pi0fm.models import attention
from pi0fm.models.attention import attend, attend_pictures


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 5, 6), (2, kv_heads, 7, 6), (2, kv_heads, 7, 6))
    query, key, value = (torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes)
    return query, key, value


def masks() -> dict[str, torch.Tensor | None]:
    random = torch.Generator().manual_seed(1)
    pairs = torch.rand(2, 1, 5, 7, generator=random) < 0.6
    pairs[..., 0] = True  # a row that sees nothing has no softmax
    return {"none": None, "by key": pairs[:, :, :1], "by pair": pairs}


@pytest.mark.parametrize("mask", ["none", "by key", "by pair"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_folded_attention_is_torchs(heads, kv_heads, mask):
    arguments = inputs(heads, kv_heads)
    found = attend(*arguments, masks()[mask])
    expected = F.scaled_dot_product_attention(*arguments, attn_mask=masks()[mask], enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), arguments)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    random = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 2, 3), (1, 1, 4, 3), (1, 1, 4, 3))
    arguments = tuple(torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes)
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])[None, None]
    assert torch.autograd.gradcheck(lambda query, key, value: attend(query, key, value, mask), arguments)


def test_bfloat16_stays_bfloat16_and_near():
    arguments = inputs(4, 1, torch.float32)
    found = attend(*(tensor.bfloat16() for tensor in arguments), masks()["by pair"])
    assert found.dtype == torch.bfloat16
    assert (found.float() - attend(*arguments, masks()["by pair"])).abs().max() < 0.05


@pytest.mark.parametrize("keys", [12, 32, 37, 60, 77, 127, 140])
def test_weights_in_bfloat16_are_the_rounded_ones_of_float32(keys):
    """Whatever way they are taken; one rounding apart at most, with a gradient or without the same, masked keys at 0."""
    scores = torch.randn(3, 5, keys, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores[..., -2:] = float("-inf")
    rows = torch.randn(3, 5, keys, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaf, exact = scores.clone().requires_grad_(), scores.double().requires_grad_()
    found, expected = attention._softmax(leaf), exact.softmax(dim=-1)
    with torch.no_grad():
        assert torch.equal(attention._softmax(scores), found)
    assert not found[..., -2:].any()
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)
    (gradient,), (wanted,) = (torch.autograd.grad((y * rows).sum(), x) for y, x in ((found, leaf), (expected, exact)))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), wanted, rtol=0.02, atol=2e-3)


def test_the_weights_gradient_is_batched():
    """An exact density in bfloat16 runs the backward pass under vmap."""
    scores = torch.randn(2, 3, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.randn(4, 2, 3, 60, generator=torch.Generator().manual_seed(1)).bfloat16()
    pullback = torch.func.vjp(attention._softmax, scores)[1]
    found = torch.func.vmap(lambda row: pullback(row)[0])(rows)
    leaf = scores.clone().requires_grad_()
    for row, one in zip(rows, found, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(attention._softmax(leaf), leaf, row)[0])


@pytest.mark.parametrize("mask", ["none", "by key", "by pair"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_the_fused_kernel_gives_what_the_products_give(heads, kv_heads, mask, monkeypatch):
    """Few keys stand for many; nothing is expanded or copied wrongly on the way in."""
    arguments, given = inputs(heads, kv_heads, torch.float32), masks()[mask]
    expected = attend(*arguments, given)
    wanted = torch.autograd.grad(expected.square().sum(), arguments)
    monkeypatch.setattr(attention, "FUSED_KEYS", 7)
    monkeypatch.setattr(attention, "_products", None)
    found = attend(*arguments, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found.square().sum(), arguments), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "fused"),
    [
        (torch.float32, 3, 191, False),
        (torch.float32, 3, 192, True),
        (torch.bfloat16, 512, 511, False),
        (torch.bfloat16, 512, 512, True),
        (torch.bfloat16, 511, 512, False),
        (torch.float64, 3, 600, False),
    ],
)
def test_the_kernel_is_chosen_by_shape_and_type_whether_or_not_a_gradient_is_asked(dtype, queries, keys, fused, monkeypatch):
    """A score asks for one, and must not change an action."""
    called = []
    monkeypatch.setattr(attention, "_fused", lambda rows, *_: called.append("fused") or rows)
    monkeypatch.setattr(attention, "_products", lambda rows, *_: called.append("products") or rows)
    query, key = torch.zeros(1, 2, queries, 4, dtype=dtype), torch.zeros(1, 1, keys, 4, dtype=dtype)
    for asked in (True, False):
        attend(query.clone().requires_grad_(asked), key, key, None)
    assert called == ["fused" if fused else "products"] * 2


def test_pictures_take_the_fused_kernel_early_where_no_gradient_is_asked(monkeypatch):
    called = []
    monkeypatch.setattr(attention, "_fused", lambda rows, *_: called.append("fused") or rows)
    monkeypatch.setattr(attention, "_products", lambda rows, *_: called.append("products") or rows)
    query = torch.zeros(1, 2, 256, 4, dtype=torch.bfloat16)
    attend_pictures(query, query, query)
    with torch.no_grad():
        attend_pictures(query, query, query)
    assert called == ["products", "fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_lie_strided_in_one_product_go_to_the_kernel_as_they_are(dtype):
    """The tower's: [B, V, 3, N, K], of which query, key and value are views."""
    joined = torch.randn(2, 200, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = joined.permute(2, 0, 3, 1, 4).unbind()
    copies = [view.contiguous() for view in views]
    with torch.no_grad():
        found = attend_pictures(*views)
        assert torch.equal(found, attend_pictures(*copies))
        assert found.transpose(1, 2).is_contiguous()  # so that joining the heads again copies nothing
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, attend_pictures(*[copy.requires_grad_() for copy in copies]).detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch runs the kernel once a product there
def test_many_products_with_the_fused_kernels_jacobian_are_those_of_the_products(monkeypatch):
    """What an exact divergence asks: a pullback under vmap."""
    _, key, value = inputs(4, 1, torch.float32)
    key, value = key.detach(), value.detach()

    def pulled() -> torch.Tensor:
        query = inputs(4, 1, torch.float32)[0].detach()
        found, pullback = torch.func.vjp(lambda x: attend(x, key, value, None), query)
        rows = torch.randn(3, *found.shape, generator=torch.Generator().manual_seed(3))
        return torch.func.vmap(lambda row: pullback(row)[0])(rows)

    expected = pulled()
    monkeypatch.setattr(attention, "FUSED_KEYS", 7)
    torch.testing.assert_close(pulled(), expected, rtol=1e-5, atol=1e-6)
