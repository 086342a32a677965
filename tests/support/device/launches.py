"""Counts what a computation launches on a CUDA device: every operation of torch that is neither a view nor an allocation.

A call on a GPU without a graph takes as long as the host needs for these, whatever the device does. Used on fake tensors (fake_cuda.py).
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {"alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided", "_unsafe_view"}


def _attended(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """As the kernels leave it: the heads of one token together."""
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


KERNELS = {"scaled_dot_product_attention": _attended, "rms_norm": lambda x, *_, **__: torch.empty_like(x)}
"""Operations with one kernel on a GPU and several parts elsewhere, and their results' layout."""


class Launches(TorchDispatchMode):
    """`found` counts operations by name while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in KERNELS:
            self.found[name] += 1
            return KERNELS[name](*args, **kwargs)
        if func.namespace == "aten":  # inference mode leaves composite operations whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func.namespace == "aten" and not func.is_view and name not in ALLOCATIONS:
            self.found[name] += 1
        return func(*args, **kwargs)
