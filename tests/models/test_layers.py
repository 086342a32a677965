"""Norms, rotations, the gated MLP and the time embedding against closed forms, torch's own, and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from pi0fm.models.layers import AdaptiveRMSNorm, GatedMLP, RMSNorm, _Rotate, inverse_rms, rotate, rotation, time_embedding
from pi0fm.models.layers import _RMSNorm as FastNorm


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


def test_norms_gradient_is_that_of_finite_differences():
    assert gradcheck(FastNorm.apply, (normal(2, 3, 5).requires_grad_(), normal(5, seed=1).requires_grad_()))


def test_norm_of_bfloat16_is_computed_in_float32():
    x = normal(4, 64, dtype=torch.float32).bfloat16()
    found, _ = RMSNorm(64)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.rms_norm(x.float(), (64,), eps=1e-6).bfloat16())


def test_adaptive_norm_starts_as_a_plain_norm_with_a_closed_gate():
    norm = AdaptiveRMSNorm(8, 6)
    norm.reset_parameters()
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
