"""A device that is full, said in one line: what takes its memory, and which option helps.

Owns: the sentence, the remedies and what each would take by the estimate. Does not know: the step that failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pi0fm import progress
from pi0fm.models.lora import LoraConfig
from pi0fm.policy.device import is_out_of_memory
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.sharding import FULL
from pi0fm.train.plan.memory import GIB
from pi0fm_client.errors import ConfigError, Pi0fmError

MOST_TOO_HIGH = 1.35  # the estimate, by the test of plan/memory.py


class OutOfMemoryError(Pi0fmError):
    """A device, or the host, that has no memory left for what a run needs."""


def judge_memory(config: TrainConfig, cameras: int, parallel: Parallel) -> None:
    """Say what a worker takes by the estimate, before anything is allocated. Raises ConfigError where it can never fit."""
    needed, room, context = config.memory(cameras, parallel.context.world_size, parallel.device), parallel.room(), parallel.context
    if context.is_first:
        fits = "" if needed.total <= room else f"; that is more than the {room / GIB:.1f} GiB that a worker has"
        progress.say(f"{needed}{fits}")
    if needed.total > MOST_TOO_HIGH * room:
        raise ConfigError(
            f"a worker needs about {needed.total / GIB:.1f} GiB, found {room / GIB:.1f} GiB for each; "
            f"{_remedies(config, cameras, context.world_size, parallel.device)}"
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
            f"{parallel.device} is full ({asked:.120}); {line}{_held(parallel.device)}; "
            f"{_remedies(config, cameras, world, parallel.device)}"
        ) from None


def _held(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    other = total - free - torch.cuda.memory_reserved(device)
    return f", of {total / GIB:.1f} GiB, of which other processes hold {max(0, other) / GIB:.1f}"


def _remedies(config: TrainConfig, cameras: int, world_size: int, device: torch.device) -> str:
    """Options that lower the estimate, least change first: those that a resumed run may change, and those of a new run."""
    largest = config.largest_micro_batch(world_size)
    same: dict[str, dict[str, Any]] = {
        f"--micro_batch_size {largest // 2}": {"micro_batch_size": largest // 2},
        "--activation_checkpointing selective": {"activation_checkpointing": "selective"},
        "--activation_checkpointing full": {"activation_checkpointing": "full"},
    }
    if world_size > 1:
        same["--parallel.shard full"] = {"parallel": replace(config.parallel, shard=FULL)}
    new: dict[str, dict[str, Any]] = {
        "--lora.rank 16": {"lora": LoraConfig(16), "frozen_bfloat16": config.precision != "float32" and not config.validation.every},
        "--train_only expert_only": {"train_only": "expert_only"},
    }
    now = config.memory(cameras, world_size, device).total

    def helpful(options: dict[str, dict[str, Any]]) -> list[str]:
        found = []
        for words, change in options.items():
            try:
                total = replace(config, **change).memory(cameras, world_size, device).total
            except ConfigError:  # does not go with the rest of this run, or there is no half of one sample
                continue
            if total < now:
                found.append(f"{words} (about {total / GIB:.2g} GiB)")
        return found

    kept = helpful(same)
    resumed = f"type {' or '.join(kept)}, and --resume true goes on from the last checkpoint; " if kept else ""
    others = [*helpful(new), "more GPUs whose workers share the weights"]
    return f"{resumed}in a new run {' or '.join(others)}"
