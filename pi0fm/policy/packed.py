"""A network's bfloat16 matrices in the order in which oneDNN multiplies them, for inference on a CPU.

Owns: which modules are replaced, their products. Does not know: the network's layers, when it is called.

    a call with a plain matrix     [ order the matrix for the tiles ][ multiply ][ write ] [ read, gelu, write ]
    with a packed one                                                [ multiply, gelu in the tiles' registers, write ]

A chunk's few rows take less time to multiply than their matrix takes to be put in order: a gated MLP without its last product, 51 rows of
512 to 2 x 2048, takes 1628 us plain, 1175 packed, 957 with gelu inside (one thread, Intel Xeon with AMX; more in docs/LOG.md, 2026-11-22).
In float32 nothing is gained. The numbers are the same with a gradient and without, since a score must not change an action: the gradient
in x, which a density asks for, takes the unpacked matrix. Nothing trains or is saved in this form. The operation is the one that
torch.compile uses, under a name that torch does not promise to keep: where it is missing, nothing is replaced.
"""

from typing import Any, cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pi0fm.models.config import Gelu
from pi0fm.models.layers import GatedMLP
from pi0fm.models.vision import VisionMLP

_OPERATIONS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


def can_pack() -> bool:
    """Whether this processor and this torch multiply packed bfloat16 matrices."""
    here = torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS)
    return here and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: nn.Module) -> None:
    """Replace every bfloat16 `nn.Linear` of the model, its gated MLPs, and the tower's with their gelu; the plain matrices are let go."""
    for name, child in list(model.named_children()):
        if isinstance(child, GatedMLP) and _is_bfloat16(child.down):
            setattr(model, name, PackedGatedMLP(child))
        elif isinstance(child, nn.Linear) and _is_bfloat16(child):
            setattr(model, name, PackedLinear(child.weight, child.bias))
        elif isinstance(child, VisionMLP) and _is_bfloat16(child.fc1):
            first, second = PackedLinear(child.fc1.weight, child.fc1.bias, child.gelu), PackedLinear(child.fc2.weight, child.fc2.bias)
            setattr(model, name, nn.Sequential(first, second))
        else:
            pack(child)


@final
class PackedLinear(nn.Module):
    """`gelu(x W' + b)` in bfloat16 for x [*n, K] of any type; gelu: None for none, else which form of it.

    Its gradient is that in x, which densities need: nothing trains in this form.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gelu: Gelu | None = None) -> None:
        super().__init__()
        self.matrix = _packed(weight.detach())
        self.bias, self.gelu = None if bias is None else bias.detach(), gelu
        self._after = ("none", "") if gelu is None else ("gelu", gelu)

    def forward(self, x: Float[Tensor, "*n K"]) -> Float[Tensor, "*n N"]:
        """bfloat16."""
        x = x.to(torch.bfloat16)
        if torch.is_grad_enabled():
            return cast(Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Of x in bfloat16."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, self._after[0], [], self._after[1]))

    def __getstate__(self) -> dict[str, Any]:
        """With the plain matrix: a packed one can neither be copied nor pickled."""
        return self.__dict__ | {"matrix": self.matrix.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"matrix": _packed(state["matrix"])})

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.matrix.shape[1]}, out_features={self.matrix.shape[0]}, bias={self.bias is not None}, gelu={self.gelu}"


class _Product(torch.autograd.Function):
    """The same numbers as without a gradient; backwards the matrix is unpacked, and gelu's argument is computed again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, linear: PackedLinear) -> Tensor:
        return linear.product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, PackedLinear], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,), linear = ctx.saved_tensors, ctx.linear
        matrix = linear.matrix.to_dense()
        if linear.gelu is not None:
            gradient = torch.ops.aten.gelu_backward(gradient, F.linear(x, matrix, linear.bias), approximate=linear.gelu)
        return gradient @ matrix, None


@final
class PackedGatedMLP(nn.Module):
    """`GatedMLP` with its two halves apart, so that gelu is part of the first product."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        gate, up = mlp.gate_up.weight.chunk(2)
        self.gate, self.up, self.down = PackedLinear(gate, gelu=mlp.gelu), PackedLinear(up), PackedLinear(mlp.down.weight)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """x to x's shape, bfloat16."""
        x = x.to(torch.bfloat16)
        gate = self.gate(x)
        return cast(Tensor, self.down(gate * self.up(x) if torch.is_grad_enabled() else gate.mul_(self.up(x))))


def _packed(matrix: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous()))


def _is_bfloat16(linear: nn.Linear) -> bool:
    return linear.weight.dtype == torch.bfloat16
