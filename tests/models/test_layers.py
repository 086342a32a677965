"""Tests of norms, rotations, the gated MLP and the time embedding against closed forms, torch's layers, and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from pi0fm.models.initial import initialise
from pi0fm.models.layers import (
    AdaptiveRMSNorm,
    GatedMLP,
    RMSNorm,
    _Gated,
    _gated,
    _normed,
    _normed_by_kernel,
    _Rotate,
    inverse_rms,
    rotate,
    rotation,
    time_embedding,
)
from pi0fm.models.layers import _RMSNorm as FastNorm

norms = pytest.mark.parametrize("by", [_normed, _normed_by_kernel])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_norm_is_torchs_rms_norm():
    x, scale = normal(2, 3, 8), normal(8, seed=1)
    norm = RMSNorm(8).double()
    norm.scale.data.copy_(scale)
    found, gate = norm(x)
    assert gate is None
    torch.testing.assert_close(found, F.rms_norm(x, (8,), 1.0 + scale, eps=1e-6), rtol=1e-12, atol=1e-12)


def test_norm_of_a_constant_is_one_and_of_zero_is_zero():
    found, _ = RMSNorm(4)(torch.tensor([[3.0, 3, 3, 3], [0, 0, 0, 0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))


@norms
def test_norms_gradient_is_that_of_finite_differences(by):
    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return FastNorm.apply(x, scale, torch.float64, by)[0]

    assert gradcheck(norm, (normal(2, 3, 5).requires_grad_(), normal(5, seed=1).requires_grad_()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_norm_before_products_is_cast_once_and_to_their_type(adaptive):
    """Value and gradient are those of the cast behind a float32 norm, which autocast would make."""
    x, condition = normal(2, 3, 8, dtype=torch.float32), normal(2, 6, seed=1, dtype=torch.float32) if adaptive else None
    found = {}
    for for_products in (True, False):
        torch.manual_seed(0)
        norm = AdaptiveRMSNorm(8, 6, for_products) if adaptive else RMSNorm(8, for_products)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            normed = norm(leaf, condition)[0]
            assert normed.dtype == (torch.bfloat16 if for_products else torch.float32)
            value = torch.nn.functional.linear(normed, torch.eye(8))
        (gradient,) = torch.autograd.grad(value.float().square().sum(), leaf)
        found[for_products] = (value, gradient)
        assert norm(x, condition)[0].dtype == torch.float32  # without autocast
    for one, other in zip(found[True], found[False], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_gradient_is_torchs_in_either_type(dtype, by):
    x, scale = normal(4, 6, 16, dtype=torch.float32).to(dtype), normal(16, seed=1, dtype=torch.float32) / 4
    weights = normal(4, 6, 16, seed=2, dtype=torch.float32).to(dtype)
    ours, theirs = ((x.clone().requires_grad_(), scale.clone().requires_grad_()) for _ in range(2))
    found = torch.autograd.grad(FastNorm.apply(*ours, dtype, by)[0], ours, weights)
    wide = theirs[0].float()
    expected = torch.autograd.grad(F.rms_norm(wide, (16,), eps=1e-6) * (1 + theirs[1]), theirs, weights.float())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32():
    x = normal(4, 64, dtype=torch.float32).bfloat16()
    found, _ = RMSNorm(64)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.rms_norm(x.float(), (64,), eps=1e-6).bfloat16())


def test_adaptive_norm_starts_as_a_plain_norm_with_a_closed_gate():
    norm = AdaptiveRMSNorm(8, 6)
    initialise(norm, 0)
    x = normal(2, 3, 8, dtype=torch.float32)
    found, gate = norm(x, normal(2, 6, seed=1, dtype=torch.float32))
    torch.testing.assert_close(found, RMSNorm(8)(x)[0])
    assert gate.shape == (2, 1, 8)
    assert not gate.any()


def test_adaptive_norm_is_scale_shift_and_gate_in_that_order():
    norm = AdaptiveRMSNorm(2, 1)
    with torch.no_grad():
        norm.modulation.weight.zero_()
        norm.modulation.bias.copy_(torch.tensor([1.0, 2, 10, 20, 0.5, 0.25]))
    found, gate = norm(torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1))
    torch.testing.assert_close(found, torch.tensor([[[1 * 2.0 + 10, -1 * 3.0 + 20]]]))
    torch.testing.assert_close(gate, torch.tensor([[[0.5, 0.25]]]))


def test_adaptive_norm_without_a_condition_is_refused():
    with pytest.raises(ValueError, match="flow time"):
        AdaptiveRMSNorm(4, 4)(torch.zeros(1, 1, 4), None)


def test_rotation_is_a_product_of_complex_numbers():
    x, positions = normal(2, 3, 4, 8), torch.tensor([[0, 1, 2, 7], [5, 6, 40, 300]])
    found = rotate(x, rotation(positions, 8))
    numbers = torch.complex(x[..., :4], x[..., 4:])
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = numbers * torch.exp(1j * positions[:, None, :, None] * frequencies)
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), dim=-1), rtol=0, atol=3e-5)  # angles are float32


def test_rotations_gradient_is_that_of_finite_differences():
    turn = rotation(torch.tensor([[0, 3, 70]]), 4)
    assert gradcheck(_Rotate.apply, (normal(2, 2, 3, 4).requires_grad_(), turn.cos.double(), turn.sin.double()), atol=1e-6)


def test_products_of_rotated_vectors_depend_on_relative_positions_only():
    query, key = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

    def product(query_at: int, key_at: int) -> float:
        ours = (rotate(vector, rotation(torch.tensor([[at]]), 16)) for vector, at in ((query, query_at), (key, key_at)))
        return float((next(ours) * next(ours)).sum())

    assert product(3, 1) == pytest.approx(product(102, 100), abs=1e-4)
    assert product(3, 1) == pytest.approx(product(2, 0), abs=1e-5)
    assert abs(product(3, 1) - product(1, 3)) > 1e-2
    assert product(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-12)


def test_gated_mlp_is_its_formula():
    for kind in ("tanh", "none"):
        mlp = GatedMLP(4, 6, kind).double()
        x = normal(3, 4)
        gate, up = mlp.gate_up.weight[:6], mlp.gate_up.weight[6:]
        torch.testing.assert_close(mlp(x), (F.gelu(x @ gate.T, approximate=kind) * (x @ up.T)) @ mlp.down.weight.T)


def test_inverse_rms_holds_for_tiny_inputs():
    torch.testing.assert_close(inverse_rms(torch.zeros(1, 4)), torch.full((1, 1), 1e3))


def test_time_embedding_closed_form():
    times = torch.tensor([0.0, 0.25, 1.0])
    found = time_embedding(times, 6).numpy()
    periods = (4e-3, math.sqrt(4e-3 * 4.0), 4.0)
    expected = [[f(2 * math.pi * float(t) / period) for f in (math.sin, math.cos) for period in periods] for t in times]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_the_gated_product_is_the_composed_one_and_its_gradient_that_of_float64(gelu, dtype, bound):
    """Bit by bit, with a gradient and without; the gradient's two products are rounded in another order."""
    x, rows = normal(3, 5, 80, dtype=torch.float32).to(dtype).requires_grad_(), normal(3, 5, 40, seed=1, dtype=torch.float32).to(dtype)
    closed, exact = _Gated.apply(x, gelu)[0], x.detach().double().requires_grad_()
    assert closed.dtype == dtype and torch.equal(closed, _gated(x, gelu))
    (found,), (expected,) = (torch.autograd.grad(y, leaf, rows.to(y.dtype)) for y, leaf in ((closed, x), (_gated(exact, gelu), exact)))
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) < bound * float(expected.abs().max())


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_the_gated_products_gradient_is_that_of_finite_differences(gelu):
    assert gradcheck(lambda x: _Gated.apply(x, gelu)[0], normal(2, 3, 6).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_gated_mlp_keeps(dtype):
    """Of its hidden width: what multiplies the gradients of gate and up, and the product that the last matrix was given."""
    mlp, found = GatedMLP(4, 8, "tanh").to(dtype), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(normal(5, 3, 4, dtype=dtype).requires_grad_())
    of_parameters = {weight.untyped_storage().data_ptr() for weight in mlp.parameters()}
    values = sum(storage.nbytes() for place, storage in found.items() if place not in of_parameters) // dtype.itemsize
    assert values == 5 * 3 * (4 + 3 * 8)


@norms
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_gradients_are_batched_without_a_loop(by):
    """An exact density runs the backward pass of all closed forms under vmap."""
    turn = rotation(torch.tensor([[0, 3]]), 8)

    def field(x: torch.Tensor) -> torch.Tensor:
        normed = FastNorm.apply(x, torch.zeros(8), torch.float32, by)[0]
        return rotate(_Gated.apply(torch.cat((normed, normed.square()), dim=-1), "tanh")[0], turn)

    x = normal(2, 1, 2, 8, dtype=torch.float32)
    rows = normal(3, 2, 1, 2, 8, seed=1, dtype=torch.float32)
    pullback = torch.func.vjp(field, x)[1]
    found = torch.func.vmap(lambda row: pullback(row)[0])(rows)
    leaf = x.clone().requires_grad_()
    for row, one in zip(rows, found, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(field(leaf), leaf, row)[0])
