"""The parts that both streams of the decoder are made of.

Owns: RMSNorm and its adaptive form, rotary positions, the gated MLP, the sine-cosine embedding of flow time.
Does not know: which stream uses them. Equations: pi0 (arXiv 2410.24164), Gemma (2403.08295), as interoperable weights fix them.
Shape letters: B batch, T tokens, D width, N heads, K head dim.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

NORM_EPSILON = 1e-6
ROPE_BASE = 10_000.0


class Rotation(NamedTuple):
    """cos, and sin with the sign of its half, of the rotary angles, float32 [B, 1, T, K]: made once per forward, used by every layer."""

    cos: Tensor
    sin: Tensor


class Modulation(NamedTuple):
    """What an adaptive norm makes of one flow time: 1 + scale, shift and the residual's gate, float32 [B or 1, 1, D]."""

    factor: Tensor
    shift: Tensor
    gate: Tensor


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-6) * (1 + scale)`, computed in float32 and returned in the type of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*n D"], condition: Tensor | None = None) -> tuple[Float[Tensor, "*n D"], Tensor | None]:
        """The normed input, and None: a plain norm has no gate on its residual."""
        # the same numbers; without a gradient the frame of the closed form would cost as much as a small norm itself
        return (_RMSNorm.apply(x, self.scale) if torch.is_grad_enabled() else _normed(x, self.scale))[0], None


class AdaptiveRMSNorm(nn.Module):
    """pi0.5's norm: scale, shift and residual gate come from the flow time; zero-initialised, so that it starts as a plain norm.

    The gate also starts at 0: every block of the expert begins as the identity.
    """

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition_width, 3 * width)

    def reset_parameters(self) -> None:
        """Zero, whatever the initialisation of the rest."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulate(self, condition: Float[Tensor, "B D"]) -> Modulation:
        """All of it that does not depend on x: a sampler makes it once a flow time instead of once an evaluation."""
        scale, shift, gate = at_least_float32(self.modulation(condition)[:, None]).chunk(3, dim=-1)
        return Modulation(1.0 + scale, shift, gate)

    def forward(
        self, x: Float[Tensor, "B T D"], condition: Tensor | Modulation | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "b 1 D"]]:
        """`normed(x) * (1 + scale) + shift` and the residual's gate [b, 1, D]; condition: [B, D'], or what `modulate` made of it."""
        if condition is None:
            raise ValueError("an adaptive norm needs the condition made from the flow time")
        by = condition if isinstance(condition, Modulation) else self.modulate(condition)
        normed = at_least_float32(x) * inverse_rms(x)
        return (normed * by.factor + by.shift).to(x.dtype), by.gate.to(x.dtype)


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`; gate and up are one matrix, one product.

    gelu: "tanh" is what released weights were trained with; "none" is the error function itself, half the time on a CPU.
    """

    def __init__(self, width: int, hidden_width: int, gelu: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)
        self.gelu = gelu

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """x to x's shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate=self.gelu) * up)


def rotation(positions: Int64[Tensor, "B T"], head_dim: int) -> Rotation:
    """Rotary angles `position / base^(2 i / K)`; float32, since bfloat16 cannot tell neighbouring positions apart."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * ROPE_BASE**-exponents
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Float[Tensor, "B N T K"], by: Rotation) -> Float[Tensor, "B N T K"]:
    """Rotate the pairs (i, i + K/2) of every head, in float32; the result has the type of x."""
    return _Rotate.apply(x, by.cos, by.sin) if torch.is_grad_enabled() else _turn(x, by.cos, by.sin)


def at_least_float32(x: Tensor) -> Tensor:
    """float32 of anything shorter; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_rms(x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 1"]:
    """`1 / sqrt(mean(x^2) + 1e-6)` in float32 (float64 for float64)."""
    return torch.rsqrt(_mean_square(at_least_float32(x)))


class _RMSNorm(torch.autograd.Function):
    """`x * inverse_rms(x) * (1 + scale)` with its gradient in closed form: fewer passes over memory, and x alone is kept (docs/adr/0006).

    With y = x w / m, w = 1 + scale, and g the incoming gradient: dx = (g w - n mean(g w n)) / m, n = x / m; dscale = sum(g n). m is
    returned too, so that torch.func can carry it from the forward pass to the backward one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _normed(x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, rms = ctx.saved_tensors
        inverse = rms.reciprocal()
        normed = x * inverse
        to_scale = (gradient * normed).flatten(0, -2).sum(dim=0)
        scaled = gradient * (1.0 + scale)
        mean = (scaled * normed).mean(dim=-1, keepdim=True)
        return (torch.addcmul(scaled, normed, mean, value=-1.0) * inverse).to(x.dtype), to_scale


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _turn(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _normed(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the root of the mean square. Four small operations, and two passes over x."""
    wide = at_least_float32(x)
    rms = _mean_square(wide).sqrt_()
    return torch.addcmul(wide, wide, scale).div_(rms).to(x.dtype), rms


def _mean_square(x: Tensor) -> Tensor:
    """`mean(x^2) + 1e-6` of each row: one pass over x, the rest on a number a row."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), NORM_EPSILON), norm, norm, value=1.0 / x.shape[-1])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = at_least_float32(x)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def time_embedding(time: Float[Tensor, " B"], width: int, shortest: float = 4e-3, longest: float = 4.0) -> Float[Tensor, "B D"]:
    """`[sin, cos]` of 2 pi time / period for width/2 log-spaced periods; float64 inside, float32 out."""
    fractions = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    periods = shortest * (longest / shortest) ** fractions
    angles = 2.0 * math.pi * time.double()[:, None] / periods
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()
