"""A state that is cut over the workers, so that none holds it whole: torch's fully_shard with our layers as units.

Owns: `ParallelConfig`, the units, the passage between a parameter and this worker's rows of it. Does not know: memory, what is trained.

    shard        weights, average   moments   gradients           a layer's weights are gathered
    none (DDP)   every worker all   all       all, averaged       -
    gradients    rows               rows      rows                once a step, and kept for the backward pass
    full         rows               rows      rows                twice: freed between the forward and the backward pass

    replicas 2 of 4 workers (HSDP)     rows 0 | rows 1     workers 0 and 1 hold one state, 2 and 3 the other; gradients are
                                       rows 0 | rows 1     scattered along a row and then averaged down a column

Units: every layer of the vision tower, every dual-stream layer, the words, and the rest. What is kept is float32; a unit is gathered in
the type of the products, its gradient reduced in float32. The rest is gathered in float32, since its head computes in it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # torch's sharding takes 92 MB with what it imports: only a run that cuts its state pays for it
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

from pi0fm.models.pi0 import Pi0
from pi0fm.options import option
from pi0fm_client.errors import ConfigError

AUTO, NONE, GRADIENTS, FULL = "auto", "none", "gradients", "full"
SHARDS = (AUTO, NONE, GRADIENTS, FULL)
REST = ""


@dataclass(frozen=True)
class ParallelConfig:
    """How workers share the state. Raises ConfigError for a word that is not known, or copies of what is not cut."""

    shard: str = option(
        AUTO,
        "what is cut over the workers: none, gradients (and weights at rest), full (a layer's weights are gathered twice a step: least "
        "memory); auto takes the first that fits",
    )
    replicas: int = option(1, "copies of a state that is cut; each is held by workers / replicas of them, best those of one machine")
    accumulate_whole: bool = option(
        False, "where micro batches make a step, reduce a sharded gradient once at its end: less traffic, 4 bytes for each weight"
    )

    def __post_init__(self) -> None:
        if self.shard not in SHARDS:
            raise ConfigError(f"parallel.shard must be one of {', '.join(SHARDS)}, found {self.shard!r}")
        if self.replicas < 1:
            raise ConfigError(f"parallel.replicas must be >= 1, found {self.replicas}; type --parallel.replicas 1")
        given = "replicas" if self.replicas > 1 else "accumulate_whole" if self.accumulate_whole else None
        if self.shard == NONE and given:
            raise ConfigError(
                f"parallel.{given} is of a state that is cut, found parallel.shard none; leave it out, or type --parallel.shard full"
            )

    @property
    def cuts(self) -> bool:
        """Whether any of the state is cut, once `auto` is decided."""
        return self.shard in (GRADIENTS, FULL)

    def refuse_for(self, world_size: int) -> None:
        """Raise ConfigError where so many workers cannot share the state as is asked for."""
        if world_size == 1 and self.cuts:
            raise ConfigError(f"a state is cut over two or more workers, found one for parallel.shard {self.shard}; leave it out")
        each, left = divmod(world_size, self.replicas)
        if left or (each == 1 and self.replicas > 1):
            raise ConfigError(
                f"the workers must be shared out evenly, two or more to a replica, found {world_size} for parallel.replicas "
                f"{self.replicas}; type --parallel.replicas 1, or another number of workers"
            )

    def workers_of_a_state(self, world_size: int) -> int:
        """How many of the workers hold one state together, each a part of it."""
        return world_size // self.replicas if self.cuts else 1


def unit_of(name: str) -> str:
    """The unit that a parameter is gathered with; REST for all that is in none of its own."""
    words = name.split(".")
    if words[0] == "prompt_embedding":
        return words[0]
    return ".".join(words[:3]) if words[1] == "layers" else REST


def shard(network: Pi0, mesh: "DeviceMesh", how: ParallelConfig, computes: torch.dtype) -> None:
    """Cut a network, best one on meta, over the workers of `mesh`, in place. computes: the type of the products."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kept = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)  # positions stay float32
    products = MixedPrecisionPolicy(computes, torch.float32, cast_forward_inputs=False)
    for unit in (*network.vision.layers, *network.decoder.layers, network.prompt_embedding):
        fully_shard(unit, mesh=mesh, reshard_after_forward=how.shard == FULL, mp_policy=products)
    fully_shard(network, mesh=mesh, reshard_after_forward=False, mp_policy=kept)


def is_sharded(network: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether `shard` cut it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(network, fsdp.FSDPModule)


def is_cut(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this worker holds rows of it alone."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


@final
class Sharded(nn.Module):
    """A sharded network as accelerate takes it: called as it is. no_sync: around every micro batch of a step but the last, as of DDP."""

    def __init__(self, network: Pi0, accumulate_whole: bool) -> None:
        super().__init__()
        self.network, self._whole = network, accumulate_whole

    def forward(self, *inputs: Any) -> Any:
        """The network's."""
        return self.network(*inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients whole, or scatter them without averaging replicas: what is left is done at the last micro batch."""
        assert is_sharded(self.network)
        set_sync = self.network.set_requires_gradient_sync if self._whole else self.network.set_requires_all_reduce
        set_sync(False)
        try:
            yield
        finally:
            set_sync(True)


def local(tensor: Tensor) -> Tensor:
    """This worker's rows, whose memory is the tensor's; a tensor that is not cut is its own."""
    return tensor.to_local() if is_cut(tensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor `local` holds; its first axis is cut."""
    if not is_cut(tensor):
        return slice(0, tensor.shape[0])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    (count, *_), (first, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(first, first + count)


def cutting_group(tensor: Tensor) -> "ProcessGroup | None":
    """The workers whose rows make the whole tensor; None for one that is not cut."""
    if not is_cut(tensor):
        return None
    (axis,) = (axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(axis)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's numbers; called by every worker."""
    return tensor.full_tensor().detach() if is_cut(tensor) else tensor.detach()


@final
class Gathered(Mapping[str, Tensor]):
    """Tensors by name, each made whole when it is asked for: every worker asks for the same ones in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
