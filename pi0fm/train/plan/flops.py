"""Floating-point operations of pi0, by stage of an inference and for a training sample.

Owns: counting on fake tensors: nothing is computed, and no card is needed. Does not know: how a policy or a trainer runs, any device.

    forward      vision + prefix + draws x one evaluation of the velocity
    backward     a part that trains costs twice its forward pass; a part that gradients only pass through, once; a part before all
                 trainable ones, nothing
    recomputed   activation checkpointing: full, the forward pass of the decoder, and of the tower if gradients pass through it;
                 selective, their attention
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pi0fm.models.config import Pi0Config
from pi0fm.models.lora import is_adapter
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.parts import Part, part_of
from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import Adaptation
from pi0fm.train.plan.memory import gradient_flows
from pi0fm.train.start.adaptation import adapt

ATTENTION = ("bmm", "attention")  # parts of the names of attention's operations
PARTS: tuple[Part, ...] = ("vision", "backbone", "action_expert")


@dataclass(frozen=True)
class StageWork:
    """Operations of a stage for one observation, and of its attention; bytes of its weights in bfloat16."""

    flops: int
    attention: int
    weight_bytes: int


@dataclass(frozen=True)
class TrainingWork:
    """Operations of one training sample, and those that checkpointing repeats; adapted: numbers in and out of layers with adapters."""

    forward: float
    backward: float
    recomputed: float
    adapted: float = 0.0


@functools.lru_cache(maxsize=16)
def stage_work(config: Pi0Config, cameras: int, prompt_tokens: int) -> dict[str, StageWork]:
    """Count the work of `vision`, `prefix` and `steps`; `steps` is one evaluation of the velocity."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # a CPU would read the masks, which have no values here
        model = empty_network(config)
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
        vision = _counted(lambda: model.vision(pictures))
        encoded = _counted(lambda: model.encode_prefix(observation))
        field = model.cached_velocity(observation)
        field.at(x_t, 0.5)  # computes what is cached per flow time, which is not counted
        step = _counted(lambda: field.at(x_t, 0.5))
    weights = Counter[str]()
    for name, parameter in model.named_parameters():
        if "embedding" not in name:  # an embedding is looked up, not read whole
            weights[part_of(name)] += parameter.numel() * torch.bfloat16.itemsize
    prefix = (encoded[0] - vision[0], encoded[1] - vision[1])
    return {
        "vision": StageWork(*vision, weights["vision"]),
        "prefix": StageWork(*prefix, weights["backbone"]),
        "steps": StageWork(*step, weights["action_expert"]),
    }


def empty_network(config: Pi0Config) -> Pi0:
    """Return the network with empty weights, on torch's current default device."""
    with torch.device("meta"):
        model = Pi0(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
    return model


@functools.lru_cache(maxsize=64)
def training_work(config: Pi0Config, how: Adaptation, cameras: int, flow_draws: int = 1) -> TrainingWork:
    """Count the work of one sample whose prompt has the longest length."""
    with torch.device("meta"):
        model = adapt(Pi0(config), replace(how, frozen_bfloat16=False), torch.bfloat16)
    flowing = gradient_flows(model)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad and not is_adapter(name)}
    pictures, suffix = cameras * config.vision.tokens_per_image, config.action_horizon + (config.state_input == "token")
    tokens = {"vision": pictures, "backbone": pictures + config.max_prompt_tokens, "action_expert": flow_draws * suffix}
    adapters = ((part_of(name), value) for name, value in model.named_parameters() if is_adapter(name))
    adapted = sum(max(value.shape) * tokens.get(part, 1) for part, value in adapters)  # rank x in, out x rank
    forward = backward = recomputed = 0
    for part, stage in zip(PARTS, stage_work(config, cameras, config.max_prompt_tokens).values(), strict=True):
        times = flow_draws if part == "action_expert" else 1
        forward += times * stage.flops
        backward += times * stage.flops * (2 if part in trained else part in flowing)
        repeated = {"none": 0, "selective": stage.attention, "full": stage.flops}[how.activation_checkpointing]
        recomputed += times * repeated * (part != "vision" or part in flowing)  # a layer of the decoder holds both streams
    return TrainingWork(forward, backward, recomputed, adapted)


def _counted(call: Callable[[], object]) -> tuple[int, int]:
    """Return the operations of a call's matrix products, as torch counts them, and those in attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    attention = sum(
        count for operation, count in counter.get_flop_counts()["Global"].items() if any(word in str(operation) for word in ATTENTION)
    )
    return int(counter.get_total_flops()), int(attention)
