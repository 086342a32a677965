"""A training state sharded over the workers: torch's fully_shard with our layers as units.

Owns: `ParallelConfig`, the units, the conversion between a parameter and this worker's rows of it. Does not know: memory, what is trained.

    shard        weights, average   moments   gradients           a layer's weights are gathered
    none (DDP)   every worker all   all       all, averaged       -
    gradients    rows               rows      rows                once a step, and kept for the backward pass
    full         rows               rows      rows                twice: freed between the forward and the backward pass

    replicas 2 of 4 workers (HSDP)     rows 0 | rows 1     workers 0 and 1 hold one state, 2 and 3 the other; gradients are
                                       rows 0 | rows 1     scattered along a row and then averaged down a column

Units: every layer of the vision tower, every dual-stream layer, the prompt embedding, and the rest. Rows are float32; a unit is gathered in
the type of the products, and its gradient reduced in float32. The rest is gathered in float32, since its head computes in float32.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, final

import torch
from torch import Tensor, nn

from pi0fm.train.components import FULL, ParallelConfig

if TYPE_CHECKING:  # torch's sharding takes 92 MB with its imports: only a sharded run imports it
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

from pi0fm.models.pi0 import Pi0

REST = ""


def unit_of(name: str) -> str:
    """Return the unit that a parameter is gathered with; REST for a parameter outside every layer and the prompt embedding."""
    words = name.split(".")
    if words[0] == "prompt_embedding":
        return words[0]
    return ".".join(words[:3]) if words[1] == "layers" else REST


def shard(network: Pi0, mesh: "DeviceMesh", how: ParallelConfig, computes: torch.dtype) -> None:
    """Shard a network in place over the workers of `mesh`, best while it is on meta. computes: the type of the products."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kept = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)  # positions stay float32
    products = MixedPrecisionPolicy(computes, torch.float32, cast_forward_inputs=False)
    for unit in (*network.vision.layers, *network.decoder.layers, network.prompt_embedding):
        fully_shard(unit, mesh=mesh, reshard_after_forward=how.shard == FULL, mp_policy=products)
    fully_shard(network, mesh=mesh, reshard_after_forward=False, mp_policy=kept)


def is_sharded(network: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether `shard` was applied to the network."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(network, fsdp.FSDPModule)


def is_cut(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this worker holds only rows of the tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


@final
class Sharded(nn.Module):
    """A sharded network for accelerate, called unchanged. no_sync: entered, as DDP's, around every micro batch except a step's last."""

    def __init__(self, network: Pi0, accumulate_whole: bool) -> None:
        super().__init__()
        self.network, self._whole = network, accumulate_whole

    def forward(self, *inputs: Any) -> Any:
        """Call the network."""
        return self.network(*inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients unreduced, or scatter them without averaging replicas; the last micro batch does the rest."""
        assert is_sharded(self.network)
        set_sync = self.network.set_requires_gradient_sync if self._whole else self.network.set_requires_all_reduce
        set_sync(False)
        try:
            yield
        finally:
            set_sync(True)


def local(tensor: Tensor) -> Tensor:
    """Return this worker's rows, sharing the tensor's memory; a tensor that is not sharded is returned unchanged."""
    return tensor.to_local() if is_cut(tensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Return which rows of the whole tensor `local` holds; the first axis is sharded."""
    if not is_cut(tensor):
        return slice(0, tensor.shape[0])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    (count, *_), (first, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(first, first + count)


def cutting_group(tensor: Tensor) -> "ProcessGroup | None":
    """Return the group of workers whose rows make the whole tensor; None for a tensor that is not sharded."""
    if not is_cut(tensor):
        return None
    (axis,) = (axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(axis)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor; called by every worker."""
    return tensor.full_tensor().detach() if is_cut(tensor) else tensor.detach()


@final
class Gathered(Mapping[str, Tensor]):
    """Tensors by name, each gathered on access: every worker accesses the same ones in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
