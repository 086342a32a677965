"""The operations and bytes of pi0, by stage of a call and for a sample of training, and the least time that they take.

Owns: counting on fake tensors: no number is computed, and no card is needed. Does not know: how a policy or a trainer runs.

    stage       bytes: weights, once a stage and once an evaluation of the velocity; keys and values, once an evaluation
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from pi0fm.bench.limits import Rates, flops_of
from pi0fm.models.lora import is_adapter
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.parts import part_of
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.train.plan.memory import gradient_flows
from pi0fm.train.start.adaptation import Adaptation, adapt


def inference_work(config: Pi0Config, batch: int, cameras: int, prompt_tokens: int, num_flow_steps: int) -> dict[str, tuple[float, float]]:
    """(operations, bytes) by stage of one call for `batch` observations, with bfloat16 matrices, keys and values."""
    one = _one_observation(config, cameras, prompt_tokens)
    tokens = cameras * config.vision.tokens_per_image + prompt_tokens
    cached = batch * tokens * config.decoder.depth * 2 * config.decoder.num_kv_heads * config.decoder.head_dim * torch.bfloat16.itemsize
    times = {"vision": 1, "prefix": 1, "steps": num_flow_steps}
    read = {"vision": 0, "prefix": 0, "steps": cached}
    return {stage: (times[stage] * batch * flops, times[stage] * (moved + read[stage])) for stage, (flops, moved) in one.items()}


def least_seconds(work: Mapping[str, tuple[float, float]], rates: Rates) -> dict[str, float]:
    """The least time of each stage, in bfloat16."""
    return {stage: rates.seconds({torch.bfloat16: flops}, moved) for stage, (flops, moved) in work.items()}


@functools.lru_cache(maxsize=16)
def _one_observation(config: Pi0Config, cameras: int, prompt_tokens: int) -> dict[str, tuple[float, float]]:
    """Operations for one observation and bytes of the weights; of `steps` one evaluation."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # a CPU would look at the masks, which have no values here
        model = laid_out(config)
        size = config.vision.image_size
        observation = ModelObservation(
            images=torch.empty(1, cameras, size, size, 3, dtype=torch.uint8),
            image_mask=torch.empty(1, cameras, dtype=torch.bool),
            prompt_tokens=torch.empty(1, prompt_tokens, dtype=torch.int64),
            prompt_mask=torch.empty(1, prompt_tokens, dtype=torch.bool),
            state=torch.empty(1, config.state_dim),
        )
        x_t = torch.empty(1, config.action_horizon, config.action_dim)
        pictures = pixels(observation.images.flatten(0, 1))
        vision = flops_of(lambda: model.vision(pictures))
        encoded = flops_of(lambda: model.encode_prefix(observation))
        field = model.cached_velocity(observation)
        field.at(x_t, 0.5)  # what is made once a flow time is no part of an evaluation
        step = flops_of(lambda: field.at(x_t, 0.5))
    weights = Counter[str]()
    for name, parameter in model.named_parameters():
        if "embedding" not in name:  # words are looked up, not read
            weights[part_of(name)] += parameter.numel() * torch.bfloat16.itemsize
    return {
        "vision": (vision, weights["vision"]),
        "prefix": (encoded - vision, weights["backbone"]),
        "steps": (step, weights["action_expert"]),
    }


def laid_out(config: Pi0Config) -> Pi0:
    """The network without numbers, on torch's current default device."""
    with torch.device("meta"):
        model = Pi0(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
    return model


def training_flops(config: Pi0Config, how: Adaptation, cameras: int) -> float:
    """Operations that one sample needs forwards and backwards, without what checkpointing repeats.

    A part that trains costs three times its forward pass; one that a gradient only passes, twice; one before all that trains, once.
    """
    forward = inference_work(config, 1, cameras, config.max_prompt_tokens, 1)
    with torch.device("meta"):
        model = adapt(Pi0(config), replace(how, frozen_bfloat16=False), torch.bfloat16)
    flowing = gradient_flows(model)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad and not is_adapter(name)}
    parts = zip(("vision", "backbone", "action_expert"), forward.values(), strict=True)
    return sum(flops * (3 if part in trained else 2 if part in flowing else 1) for part, (flops, _) in parts)
