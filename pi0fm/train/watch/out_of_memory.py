"""Report a full device in one line: what takes its memory, and which options help.

Owns: the line, the remedies with the estimated memory under each. Does not know: the step that failed.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pi0fm import progress
from pi0fm.models.config import LoraConfig
from pi0fm.policy.device import is_out_of_memory
from pi0fm.train.components import FULL
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.plan.memory import GIB
from pi0fm_client.errors import ConfigError, Pi0fmError

SHARED = "more GPUs whose workers share the weights"
LARGEST_OVERESTIMATE = 1.4  # largest ratio of estimate to allocations, by the test of plan/memory.py


class OutOfMemoryError(Pi0fmError):
    """A device, or the host, without the memory that a run needs."""


def refuse_too_large(config: TrainConfig, cameras: int, parallel: Parallel) -> None:
    """Print the estimate of a worker's memory, before anything is allocated. Raises ConfigError where it cannot fit."""
    needed, room, context = config.memory(cameras, parallel.context.world_size, parallel.device), parallel.room(), parallel.context
    if context.is_first:
        fits = "" if needed.total <= room else f"; that is more than the {room / GIB:.1f} GiB that a worker has"
        progress.say(f"{needed}{fits}")
    if needed.total > LARGEST_OVERESTIMATE * room:
        raise ConfigError(
            f"a worker needs about {needed.total / GIB:.1f} GiB, found {room / GIB:.1f} GiB for each; "
            f"{_fitting_options(config, cameras, context.world_size, parallel.device, room)}"
        )


@contextmanager
def memory_faults(config: TrainConfig, cameras: int, parallel: Parallel) -> Iterator[None]:
    """Raise OutOfMemoryError for a device that is full inside the block; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        world = parallel.context.world_size
        asked = " ".join(str(error).split()) or "no memory is left"
        line = config.memory(cameras, world, parallel.device)
        raise OutOfMemoryError(
            f"{parallel.device} is full ({asked:.120}); {line}{_held_by_others(parallel.device)}; "
            f"{_remedies(config, cameras, world, parallel.device)}"
        ) from None


def _held_by_others(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    other = total - free - torch.cuda.memory_reserved(device)
    return f", of {total / GIB:.1f} GiB, of which other processes hold {max(0, other) / GIB:.1f}"


def _remedies(config: TrainConfig, cameras: int, world_size: int, device: torch.device) -> str:
    """Format options that lower the estimate after a device was full: those that a resumed run may change, and those for a new run."""
    same, new = _changes(config, world_size)
    kept, others = (_lowering_options(config, changes, cameras, world_size, device) for changes in (same, new))
    resumed = f"type {' or '.join(kept)}, and --resume true continues from the last checkpoint; " if kept else ""
    return f"{resumed}in a new run {' or '.join([*others, SHARED])}"


def _fitting_options(config: TrainConfig, cameras: int, world_size: int, device: torch.device, room: int) -> str:
    """Format options with which the estimate fits `room` bytes: single ones if any suffices, else several together."""
    same, new = _changes(config, world_size)
    alone = _lowering_options(config, same | new, cameras, world_size, device, room)
    if alone:
        return f"type {' or '.join(alone)}"
    halved = max(1, config.largest_micro_batch(world_size) // 8)
    least: dict[str, Any] = {"micro_batch_size": halved, "activation_checkpointing": "full"}
    words = f"--micro_batch_size {halved} --activation_checkpointing full"
    together = {words: least} | {f"{words} {word}": least | change for word, change in new.items()}
    found = _lowering_options(config, together, cameras, world_size, device, room)
    return f"type {' or '.join(found)}" if found else f"it fits with none of pi0fm's options: choose a smaller network, or {SHARED}"


def _changes(config: TrainConfig, world_size: int) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return changes by their option words, smallest first: those that keep a run's numbers, and those that train fewer parameters."""
    half = config.largest_micro_batch(world_size) // 2
    same: dict[str, dict[str, Any]] = {
        f"--micro_batch_size {half}": {"micro_batch_size": half},
        "--activation_checkpointing selective": {"activation_checkpointing": "selective"},
        "--activation_checkpointing full": {"activation_checkpointing": "full"},
    }
    if world_size > 1:
        same["--parallel.shard full"] = {"parallel": replace(config.parallel, shard=FULL)}
    return same, {
        "--lora.rank 16": {"lora": LoraConfig(16)},
        "--lora.rank 16 --frozen_bfloat16 true": {"lora": LoraConfig(16), "frozen_bfloat16": True},
        "--train_only expert_only": {"train_only": "expert_only"},
    }


def _lowering_options(
    config: TrainConfig,
    changes: dict[str, dict[str, Any]],
    cameras: int,
    world_size: int,
    device: torch.device,
    room: float = math.inf,
) -> list[str]:
    """List the `changes` that lower the estimate to at most `room` bytes, each with its estimate."""
    now, found = config.memory(cameras, world_size, device).total, []
    for words, change in changes.items():
        try:
            total = replace(config, **change).memory(cameras, world_size, device).total
        except ConfigError:  # conflicts with the rest of this run, or would halve a single sample
            continue
        if total < now and total <= room:
            found.append(f"{words} (about {total / GIB:.2g} GiB)")
    return found
