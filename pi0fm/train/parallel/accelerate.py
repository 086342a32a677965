"""Device, precision, wrapping and process groups of one worker; the only importer of accelerate.

Owns: `Parallel`: accelerate, the process groups, sums over workers. Does not know: what is trained, who started the workers.

    default group     gradients, sums: gloo on CPUs, nccl on GPUs      formed by accelerate, Ray Train, or `open`
    host groups       "checkpoint", "stop": gloo, so that neither waits for a training step, nor a step for them
"""

import os
from collections.abc import Mapping
from typing import Any, final

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pi0fm.policy.device import compute_dtype
from pi0fm.train.components import ParallelConfig
from pi0fm.train.parallel.context import Context, context_from_environment, restarts
from pi0fm.train.parallel.sharding import Sharded
from pi0fm_client.errors import ConfigError

__all__ = ["Accelerator", "Parallel", "make_accelerator"]

HOST_GROUPS = ("checkpoint", "stop")
_LETTERS = 96  # bytes of a node's name that are kept


@final
class Parallel:
    """One worker's device, precision and process groups. Every worker makes it and calls its methods in the same order.

    context: rank and world size; accelerator: device, autocast, accumulation; device: of the network.
    """

    context: Context
    accelerator: Accelerator
    device: torch.device

    def __init__(self, context: Context, precision: str = "float32", micro_steps: int = 1, allow_cuda: bool = True) -> None:
        self._precision, self._micro_steps, self._allow_cuda = precision, micro_steps, allow_cuda
        self.open(context)

    def open(self, context: Context, store: Store | None = None) -> None:
        """Join the workers of `context`. store: rendezvous for use after `close`; None for the group that the launcher describes."""
        if store is not None and context.world_size > 1:
            backend = "nccl" if self._allow_cuda and torch.cuda.is_available() else "gloo"
            os.environ |= {"RANK": str(context.rank), "WORLD_SIZE": str(context.world_size)}  # accelerate reads its rank from them
            torch.distributed.init_process_group(backend, store=store, rank=context.rank, world_size=context.world_size)
        self.context = context
        self.accelerator = make_accelerator(self._precision, self._micro_steps, self._allow_cuda)
        self.device = self.accelerator.device
        together = context.world_size > 1
        self._host: Mapping[str, ProcessGroup | None] = {
            name: torch.distributed.new_group(backend="gloo") if together else None for name in HOST_GROUPS
        }

    def close(self) -> None:
        """Leave all groups and forget accelerate's state; `open` joins other workers, and `prepare` wraps the network for them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._host = {}
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the matrix products."""
        return compute_dtype(self._precision, self.device)

    def prepare[M: nn.Module](self, network: M, optimizer: torch.optim.Optimizer) -> tuple[M, torch.optim.Optimizer]:
        """Wrap both with accelerate: autocast, averaged gradients, accumulation. They may be prepared again after `open`."""
        if isinstance(network, Sharded):  # it averages its gradients itself
            wrapped = self.accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
            return wrapped, self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        wrapped, wrapped_optimizer = self.accelerator.prepare(network, optimizer)
        return wrapped, wrapped_optimizer

    def mesh(self, how: ParallelConfig) -> DeviceMesh:
        """Return the mesh of workers to shard a state over: one line, or one row per replica. Made by every worker."""
        each = how.workers_of_a_state(self.context.world_size)
        if how.replicas == 1:
            return init_device_mesh(self.device.type, (each,))
        return init_device_mesh(self.device.type, (how.replicas, each), mesh_dim_names=("replicas", "rows"))

    def room(self) -> int:
        """Return the bytes of the smallest worker's memory: of its card, or its share of its host's."""
        if self.device.type == "cuda":
            found = torch.cuda.get_device_properties(self.device).total_memory
        else:
            found = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", self.context.world_size))
        if self.context.world_size == 1:
            return found
        smallest = torch.tensor(found, device=self.device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return int(smallest)

    def used(self) -> int:
        """Return the peak bytes that this worker allocated on its card; on a CPU the bytes that its process holds now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def host_group(self, name: str) -> ProcessGroup | None:
        """Return the group `name` of HOST_GROUPS, on the hosts' network; None for a single worker."""
        return self._host[name]

    def nodes(self) -> tuple[str, ...]:
        """Return the node of every worker, by rank."""
        mine = self.context.node.encode()[:_LETTERS].ljust(_LETTERS)
        group = self.host_group("stop")
        if group is None:
            return (self.context.node,)
        names = torch.empty(self.context.world_size * _LETTERS, dtype=torch.uint8)
        torch.distributed.all_gather_into_tensor(names, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=group)
        return tuple(bytes(name.tolist()).decode(errors="replace").rstrip() for name in names.split(_LETTERS))

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.context.world_size > 1:
            torch.distributed.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over workers; a copy for a single worker."""
        total = value.detach().clone()
        if self.context.world_size > 1:
            torch.distributed.all_reduce(total)
        return total


def make_accelerator(precision: str, accumulation_steps: int, allow_cuda: bool = True) -> Accelerator:
    """Make accelerate's Accelerator for this worker: nccl on GPUs, gloo on CPUs; autocast to the precision that the device computes fast.

    Raises ConfigError when an earlier run of this process had another precision or device, since accelerate keeps both until
    `Parallel.close`, and what `_join_after_restart` raises.
    """
    on_cuda = allow_cuda and torch.cuda.is_available()
    device = "cuda" if on_cuda else "cpu"
    mixed = "bf16" if compute_dtype(precision, torch.device(device)) == torch.bfloat16 else "no"
    if is_initialized():
        _check_same(AcceleratorState(), mixed, device)
    else:
        _join_after_restart("nccl" if on_cuda else "gloo")
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision=mixed,
        gradient_accumulation_steps=accumulation_steps,
        # each parameter has one gradient a step, so the buckets may be the gradients themselves; no buffer of the network ever changes,
        # so none is sent at every forward pass
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )


def _join_after_restart(backend: str) -> None:
    """Form the group of workers that torchrun restarted, before accelerate, which then uses it.

    torchrun gives every attempt the same store, which still holds the dead workers' addresses (pytorch issue 135712), so each attempt
    uses a different prefix. Several nodes do not count attempts alike: raises ConfigError there, with the setting that helps.
    """
    attempt, world_size = restarts(), context_from_environment().world_size
    if attempt == 0 or world_size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun restarts the workers of several nodes with the addresses of dead ones; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started, on every node"
        )
    lent, rank, _ = next(rendezvous("env://"))
    torch.distributed.init_process_group(backend, store=PrefixStore(f"attempt-{attempt}", lent), rank=rank, world_size=world_size)


def _check_same(earlier: AcceleratorState, mixed: str, device: str) -> None:
    before, now = (earlier.mixed_precision, earlier.device.type), (mixed, device)
    if before != now:
        first, second = (f"{'bfloat16' if precision == 'bf16' else 'float32'} on {place}" for precision, place in (before, now))
        raise ConfigError(f"all runs of a process share precision and device: the first had {first}, found {second}; start another process")


def open_tracker(name: str, project: str, arguments: Mapping[str, Any]) -> Any:
    """Start accelerate's tracker of that name: `log(values, step=)`, `finish()`. Raises what its library raises."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker = LOGGER_TYPE_TO_CLASS[name](project, **arguments)
    tracker.start()
    return tracker
