"""Building blocks of both streams of the decoder.

Owns: RMSNorm and its adaptive form, rotary positions, the gated MLP, the sine-cosine embedding of flow time.
Does not know: which stream uses them. Equations: pi0 (arXiv 2410.24164), Gemma (2403.08295), as released weights define them.
Shape letters: B batch, T tokens, D width, N heads, K head dim.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi0fm.models.config import Gelu
from pi0fm.models.initial import ConstantInit, Initial

NORM_EPSILON = 1e-6
ROPE_BASE = 10_000.0


class Rotation(NamedTuple):
    """Rotary angles: cos, and sin with the sign of its half, float32 [B, 1, T, K]; made once per forward, used by every layer."""

    cos: Tensor
    sin: Tensor


class Modulation(NamedTuple):
    """Parameters of an adaptive norm at one flow time: 1 + scale, shift and the residual's gate, float32 [B or 1, 1, D].

    [B, T, D] where tokens have different times.
    """

    factor: Tensor
    shift: Tensor
    gate: Tensor


class Linear(nn.Linear):
    """`nn.Linear` that can keep its weight's copy in autocast's type between uses.

    cast_once: in training make a new copy only where the weight has changed, once per update, instead of in each forward pass and again
    where a layer is recomputed. The numbers are autocast's. Only for weights whose version counts their writes, which torch's fully_shard
    bypasses.
    """

    cast_once = False
    _copy: Tensor | None = None
    _copied_version = -1

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n F"]:
        """Compute x W' + b."""
        if not self.cast_once:
            return F.linear(x, self.weight, self.bias)
        dtype = product_dtype(x)
        return F.linear(x, self.matrix(dtype) if self._keeps_copy(dtype) else self.weight, self.bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in `dtype`, the type of the products."""
        if not self._keeps_copy(dtype):
            return self.weight.to(dtype)
        with torch.no_grad():
            if self._copy is None:
                self._copy = torch.empty_like(self.weight, dtype=dtype)
            if self._copied_version != self.weight._version:
                self._copy.copy_(self.weight)
                self._copied_version = self.weight._version
        return _Cast.apply(self.weight, self._copy)

    def _keeps_copy(self, dtype: torch.dtype) -> bool:
        return self.cast_once and self.training and dtype != self.weight.dtype and not torch.compiler.is_compiling()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the copy."""
        return self.__dict__ | {"_copy": None, "_copied_version": -1}


class _Cast(torch.autograd.Function):
    """Existing copy of the weight, whose gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


def adapted(
    x: Float[Tensor, "*n D"], weight: Float[Tensor, "F D"], bias: Tensor | None, down: Float[Tensor, "R D"], up: Float[Tensor, "F R"]
) -> Float[Tensor, "*n F"]:
    """Compute x W' + b + (x down') up', all of one type; for a weight and bias that do not train.

    The narrow product is written first and the wide one accumulated on it, so that the sum is rounded once and costs no pass over memory
    besides the narrow product's: a product's accumulation reads while it computes.

        h = x down'     y = b + h up'     y += x W'             backward: g into y
        dh = g up       dup = g' h        dx = g W, += dh down            ddown = dh' x
    """
    rows = x.reshape(-1, x.shape[-1])
    low, rows = _Down.apply(rows, down) if _closed_form() and rows.requires_grad else (rows @ down.mT, rows)
    start = low @ up.mT if bias is None else torch.addmm(bias, low, up.mT)
    y = start.addmm_(rows, weight.mT) if _writable(start) else torch.addmm(start, rows, weight.mT)
    return y.view(*x.shape[:-1], -1)


class _Down(torch.autograd.Function):
    """The product `x down'`, and x for the wide product, on whose gradient this one's is accumulated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return x @ down.mT, x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, to_low: Tensor, to_x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, down = ctx.saved_tensors
        to_down = to_low.mT @ x if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled() or not _writable(to_x):  # torch.func records the backward pass
            return torch.addmm(to_x, to_low, down), to_down
        return to_x.addmm_(to_low, down), to_down  # the wide product's alone: no other operation has taken this x


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-6) * (1 + scale)`, computed in float32 and returned in the type of x.

    for_products: returned in the type of the matrix products after it (`product_dtype`), so that it is not cast again.
    """

    def __init__(self, width: int, for_products: bool = False) -> None:
        super().__init__()
        self.scale, self.for_products = nn.Parameter(torch.zeros(width)), for_products

    def initial_values(self) -> dict[str, Initial]:
        """Scale of the identity."""
        return {"scale": ConstantInit(0.0)}

    def forward(self, x: Float[Tensor, "*n D"], condition: Tensor | None = None) -> tuple[Float[Tensor, "*n D"], Tensor | None]:
        """Norm x, and return None as the residual's gate, which a plain norm lacks."""
        dtype = product_dtype(x) if self.for_products else x.dtype
        norm = _normed_by_kernel if by_kernels(self, x) else _normed
        # equal numbers; without a gradient the overhead of the closed form would cost as much as a small norm
        return (_RMSNorm.apply(x, self.scale, dtype, norm) if _closed_form() else norm(x, self.scale, dtype))[0], None


class AdaptiveRMSNorm(nn.Module):
    """pi0.5's norm: scale, shift and residual gate come from the flow time; zero-initialised, so that it starts as a plain norm.

    The gate also starts at 0: every block of the expert begins as the identity. for_products: as for RMSNorm.
    """

    def __init__(self, width: int, condition_width: int, for_products: bool = False) -> None:
        super().__init__()
        self.modulation, self.for_products = nn.Linear(condition_width, 3 * width), for_products

    def initial_values(self) -> dict[str, Initial]:
        """Zero, independent of the network's other initial values."""
        return {"modulation.weight": ConstantInit(0.0), "modulation.bias": ConstantInit(0.0)}

    def modulate(self, condition: Float[Tensor, "*n D"]) -> Modulation:
        """Compute the parameters of the norm from a condition, which a sampler does once per flow time instead of per evaluation.

        condition: [B, D], or [B, T, D] where tokens have different times.
        """
        scale, shift, gate = at_least_float32(each_token(self.modulation(condition))).chunk(3, dim=-1)
        return Modulation(1.0 + scale, shift, gate)

    def forward(
        self, x: Float[Tensor, "B T D"], condition: Tensor | Modulation | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "b t D"]]:
        """Compute `normed(x) * (1 + scale) + shift` and the residual's gate; condition: the argument of `modulate`, or its result."""
        if condition is None:
            raise ValueError("an adaptive norm needs the condition made from the flow time")
        by = condition if isinstance(condition, Modulation) else self.modulate(condition)
        dtype, gate = product_dtype(x) if self.for_products else x.dtype, by.gate.to(x.dtype)
        if not by_kernels(self, x):
            normed = at_least_float32(x) * inverse_rms(x)
            return (normed * by.factor + by.shift).to(dtype), gate
        whole = by.factor.dtype
        normed = _RMSNorm.apply(x, x.new_zeros(x.shape[-1]), whole, _normed_by_kernel)[0] if _closed_form() else _by_kernel(x)
        return added_product(by.shift, normed, by.factor, dtype), gate


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`; gate and up are one matrix, one product.

    gelu: "tanh" is what released weights were trained with; "none" is the error function itself, which the tiny preset uses, as it
        is always trained from scratch: on a CPU it costs less than half (2 880 x 512, bfloat16, forward and backward: 5 against 13 ms).
        The two differ by less than 5e-4.
    """

    def __init__(self, width: int, hidden_width: int, gelu: Gelu) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden_width, bias=False)
        self.down = Linear(hidden_width, width, bias=False)
        self.gelu, self.recompute = gelu, False

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Map x to the same shape."""
        halves = self.gate_up(x)
        return recomputed(self._gated_down, halves) if self.recompute and recomputes(self) else self._gated_down(halves)

    def _gated_down(self, halves: Tensor) -> Tensor:
        return self.down(_Gated.apply(halves, self.gelu)[0] if _closed_form() else _gated(halves, self.gelu))


def rotation(positions: Int64[Tensor, "B T"], head_dim: int) -> Rotation:
    """Rotary angles `position / base^(2 i / K)`; float32, since bfloat16 cannot distinguish neighbouring positions."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * ROPE_BASE**-exponents
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Float[Tensor, "B N T K"], by: Rotation) -> Float[Tensor, "B N T K"]:
    """Rotate the pairs (i, i + K/2) of every head, in float32; the result has the type of x."""
    return _Rotate.apply(x, by.cos, by.sin) if _closed_form() else _turn(x, by.cos, by.sin)


def rotate_(x: Float[Tensor, "B N T K"], by: Rotation) -> Float[Tensor, "B N T K"]:
    """As `rotate`, in place; without gradient."""
    return torch.addcmul(x * by.cos, x.roll(x.shape[-1] // 2, -1), by.sin, out=x)


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call the function, keeping only its inputs for the backward pass, which recomputes the rest.

    A matrix product at its end is not computed again, since the backward pass does not need its result.
    """
    # nothing in a layer is random, so no generator's state is kept
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def recomputes(module: nn.Module) -> bool:
    """Whether the module's parts that are marked `recompute` are to be `recomputed` now. A compiler makes its own choice."""
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def run_layer(layer: nn.Module, whole: bool, *inputs: Any) -> Any:
    """Run a layer. whole: in training it is `recomputed`."""
    if whole and recomputes(layer):
        return recomputed(layer, *inputs)
    # a layer is compiled for training: torch.func, which computes a likelihood, cannot trace it
    return layer.forward(*inputs) if layer._compiled_call_impl is not None and not layer.training else layer(*inputs)


def by_kernels(module: nn.Module, x: Tensor) -> bool:
    """Whether to take torch's fused kernels where a GPU has them: a call there takes as long as the host needs to launch its operations.

    Not in training, whose numbers stay, nor where a compiler or torch.func wants the plain formulas.
    """
    return x.is_cuda and not module.training and _writable(x)


def _closed_form() -> bool:
    """Whether to record a gradient in closed form. A compiler derives one from the plain formulas and fuses it with its neighbours."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def product_dtype(x: Tensor) -> torch.dtype:
    """Type in which a matrix product would take x: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Cast shorter types to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_rms(x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 1"]:
    """Compute `1 / sqrt(mean(x^2) + 1e-6)` in float32 (float64 for float64)."""
    return torch.rsqrt(_mean_square(at_least_float32(x)))


class _RMSNorm(torch.autograd.Function):
    """`x * inverse_rms(x) * (1 + scale)` with its gradient in closed form: fewer passes over memory, and x alone is kept.

    A training step on a CPU is bound by memory traffic. Forward and backward of 3 328 x 192 in float32 on an Intel Xeon: 4.6 to 5.1 ms, the
    composed form 7.9 to 8.9, `F.rms_norm` 8.0 to 8.2 (docs/LOG.md, 2026-11-22). pi0.5's adaptive norm stays composed.

    With y = x w / m, w = 1 + scale, g the incoming gradient and p = g x / m: dscale = sum(p) over rows, dx = g w / m - x mean(p w) / m^2.
    m is returned too, so that torch.func can carry it from the forward pass to the backward one. norm: `_normed` or `_normed_by_kernel`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, dtype: torch.dtype, norm: "Norm") -> tuple[Tensor, Tensor]:
        y, rms = norm(x, scale, dtype)
        return y, inverse_rms(x).reciprocal() if rms is None else rms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype, "Norm"], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if gradient is None:
            return None, None, None, None
        x, scale, rms = ctx.saved_tensors
        inverse, factor = rms.reciprocal(), 1.0 + scale
        pulled = at_least_float32(gradient) * inverse
        product = pulled * x
        to_scale = product.flatten(0, -2).sum(dim=0)
        to_rows = product.mul_(factor).sum(dim=-1, keepdim=True) * inverse.square() * (-1.0 / x.shape[-1])
        return _plus_product(pulled.mul_(factor), x, to_rows).to(x.dtype), to_scale, None, None


class _Rotate(torch.autograd.Function):
    """Rotation, whose gradient is the inverse rotation."""

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
        return _turn(gradient, cos, sin, sign=-1.0), None, None


class _Gated(torch.autograd.Function):
    """`gelu(gate) * up` of the two halves of x [*n, 2 D]; the factors of both gradients are kept instead of the halves.

    These are gelu(gate) and `gelu'(gate) * up`: two numbers where the composed form keeps three, and a backward pass of two products.
    Keeping gate and up takes as much memory, and a tenth more time in float32, a quarter more in bfloat16.
    They are returned too, so that torch.func can carry them from the forward pass to the backward one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gelu: str) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = x.chunk(2, dim=-1)
        gated = F.gelu(gate, approximate=gelu)
        return gated * up, gated, torch.ops.aten.gelu_backward(up, gate, approximate=gelu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros as large as the gated product would be made for outputs without gradient
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if gradient is None:
            return None, None
        gated, slope = ctx.saved_tensors
        if torch.is_grad_enabled() or not _writable(gradient):  # torch.func records the backward pass
            return torch.cat((gradient * slope, gradient * gated), dim=-1), None
        both = gradient.new_empty(*gradient.shape[:-1], 2 * gradient.shape[-1])
        to_gate, to_up = both.chunk(2, dim=-1)
        torch.mul(gradient, slope, out=to_gate)
        torch.mul(gradient, gated, out=to_up)
        return both, None


def _gated(x: Tensor, gelu: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    gated = F.gelu(gate, approximate=gelu)
    return gated.mul_(up) if writes(gated) else gated * up


def _normed(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Compute the output and the root mean square, in four small operations and two passes over x."""
    wide = at_least_float32(x)
    rms = _mean_square(wide).sqrt_()
    return torch.addcmul(wide, wide, scale).div_(rms).to(dtype), rms


def _normed_by_kernel(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Compute the output in two launches, without the root mean square."""
    normed = _by_kernel(x)
    return added_product(normed, normed, scale, dtype), None


Norm = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor | None]]


def _by_kernel(x: Tensor) -> Tensor:
    """Compute `x * inverse_rms(x)`, in one launch on a GPU. The scale comes after it: the kernel takes no weight of another type."""
    return F.rms_norm(at_least_float32(x), x.shape[-1:], eps=NORM_EPSILON)


def added_product(x: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `x + left right`, rounded once to dtype: without gradient in one launch. left: of the result's shape."""
    if torch.is_grad_enabled():
        return torch.addcmul(x, left, right).to(dtype)
    return torch.addcmul(x, left, right, out=torch.empty_like(left, dtype=dtype))


def _mean_square(x: Tensor) -> Tensor:
    """Compute `mean(x^2) + 1e-6` of each row: one pass over x, the rest on one number per row."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), NORM_EPSILON), norm, norm, value=1.0 / x.shape[-1])


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    wide = at_least_float32(x)
    return _plus_product(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin, sign).to(x.dtype)


def _plus_product(x: Tensor, left: Tensor, right: Tensor, sign: float = 1.0) -> Tensor:
    """Compute `x + sign left right`, in place where x is writable."""
    return x.addcmul_(left, right, value=sign) if _writable(x) else torch.addcmul(x, left, right, value=sign)


def writes(x: Tensor) -> bool:
    """Whether no gradient is recorded and results may be written in place."""
    return not torch.is_grad_enabled() and _writable(x)


def _writable(x: Tensor) -> bool:
    """Whether results may be written in place: torch.func batches no such operation, and a compiler makes its own buffers."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x))


def each_token(x: Float[Tensor, "*n D"]) -> Float[Tensor, "B T D"]:
    """Add an axis of tokens to values per chunk, [B, D]; values per token stay as they are."""
    return x if x.ndim == 3 else x[:, None]


def time_embedding(time: Float[Tensor, "*n"], width: int, shortest: float = 4e-3, longest: float = 4.0) -> Float[Tensor, "*n D"]:
    """Embed a time as `[sin, cos]` of 2 pi time / period for width/2 log-spaced periods; float64 inside, float32 out."""
    fractions = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    periods = shortest * (longest / shortest) ** fractions
    angles = 2.0 * math.pi * time.double()[..., None] / periods
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()
