"""Who I am among the workers, and what accelerate does for each of them.

Owns: `Context`, and the one place that touches accelerate: device, precision, wrapping, accumulation, clipping.
Does not know: what is trained, who started the workers.
"""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pi0fm.policy.device import compute_dtype
from pi0fm_client.errors import ConfigError

__all__ = ["Accelerator", "Context", "all_sum", "barrier", "context_from_environment", "host_group", "make_accelerator", "restarts"]


@dataclass(frozen=True)
class Context:
    """One worker's place. `shown`: this process draws the progress bar (a Ray worker's terminal is the driver's affair)."""

    rank: int = 0
    world_size: int = 1
    shown: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what only one may write."""
        return self.rank == 0


def context_from_environment(shown: bool = True) -> Context:
    """RANK and WORLD_SIZE as torchrun and Ray Train set them; alone when they are not set."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Context(rank, world_size, shown and rank == 0)


def restarts() -> int:
    """How often torchrun has started this node's workers anew; 0 under anything else."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def make_accelerator(precision: str, accumulation_steps: int, allow_cuda: bool = True) -> Accelerator:
    """accelerate for this worker: nccl on GPUs, gloo on CPUs; autocast to the precision that the device is fast in.

    Raises ConfigError when an earlier run of this process had another precision or device, since accelerate keeps both to its end, and
    what `_join_after_restart` raises.
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
    """Form the group of workers that torchrun started anew; accelerate then takes it as it is.

    torchrun lends every attempt the same store, in which the dead workers' addresses still stand (pytorch issue 135712), so each attempt
    takes names of its own. Several nodes do not count attempts alike: raises ConfigError there, with the setting that helps.
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


def barrier(context: Context) -> None:
    """Wait for all workers."""
    if context.world_size > 1:
        torch.distributed.barrier()


def host_group(context: Context) -> torch.distributed.ProcessGroup | None:
    """A process group of its own on the hosts' network (gloo), for what must not wait for training's; None when alone.

    Called by every worker in the same order.
    """
    return torch.distributed.new_group(backend="gloo") if context.world_size > 1 else None


def all_sum(context: Context, value: torch.Tensor) -> torch.Tensor:
    """The sum over workers; a copy when alone."""
    total = value.detach().clone()
    if context.world_size > 1:
        torch.distributed.all_reduce(total)
    return total
