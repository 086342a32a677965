"""Operations and bytes of a call of pi0 by stage, and the least time that they take; the network whose files are timed.

Owns: the sums of each stage, the size of that network. Does not know: how they are counted (train/plan/flops.py), how a policy runs.

    bytes       weights: once per stage, in the flow steps once per evaluation of the velocity; keys and values: once per evaluation
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pi0fm.bench.harness.limits import Rates
from pi0fm.models.config import Pi0Config
from pi0fm.train.components import Adaptation
from pi0fm.train.plan.flops import stage_work, training_work

LAYERS, WORDS = 3, 8192  # of each tower and of the vocabulary, in a network whose files and copies are timed
MEMORY_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where such files go, so that no disk is measured
PLACE = "memory" if MEMORY_FOLDER else "disk"


def with_few_layers(config: Pi0Config) -> Pi0Config:
    """Return the network with LAYERS layers and WORDS words, of the same widths."""
    vision, decoder = replace(config.vision, depth=LAYERS), replace(config.decoder, depth=LAYERS)
    return replace(config, vision=vision, decoder=decoder, vocab_size=min(WORDS, config.vocab_size))


def inference_work(config: Pi0Config, batch: int, cameras: int, prompt_tokens: int, num_flow_steps: int) -> dict[str, tuple[float, float]]:
    """(operations, bytes) by stage of one call for `batch` observations, with bfloat16 matrices, keys and values."""
    one = stage_work(config, cameras, prompt_tokens)
    tokens = cameras * config.vision.tokens_per_image + prompt_tokens
    cached = batch * tokens * config.decoder.depth * 2 * config.decoder.num_kv_heads * config.decoder.head_dim * torch.bfloat16.itemsize
    times = {"vision": 1, "prefix": 1, "steps": num_flow_steps}
    read = {"vision": 0, "prefix": 0, "steps": cached}
    return {stage: (times[stage] * batch * of.flops, times[stage] * (of.weight_bytes + read[stage])) for stage, of in one.items()}


def least_seconds(work: Mapping[str, tuple[float, float]], rates: Rates) -> dict[str, float]:
    """Least seconds of each stage, in bfloat16."""
    return {stage: rates.seconds({torch.bfloat16: flops}, moved) for stage, (flops, moved) in work.items()}


def training_flops(config: Pi0Config, how: Adaptation, cameras: int) -> float:
    """Operations of the forward and backward pass of a sample, without those that checkpointing repeats."""
    work = training_work(config, how, cameras)
    return work.forward + work.backward
