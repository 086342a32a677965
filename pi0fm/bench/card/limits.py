"""What a device reaches at best, and the least time that a call of pi0 can take on it.

Owns: the two rates, the operations and bytes of each stage, clocks for a device. Does not know: how a policy or a trainer runs.

    rates       a copy of a large tensor: bytes read and written a second; a large product: operations a second
    stage       least seconds = the longer of operations / product rate, bytes / copy rate
                bytes: weights, once a stage and once an evaluation of the velocity; keys and values, once an evaluation

Operations are those of the matrix products, counted on fake tensors: no number is computed, and no card is asked for.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pi0fm.models.lora import is_adapter
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.parts import Part, part_of
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.train.plan.memory import gradient_flows
from pi0fm.train.start.adaptation import Adaptation, adapt

WHOLE_COPY, WHOLE_SIDE = 2**31, 8192  # bytes of the copy, rows and columns of the product; less where it is only tried out
TRIED_COPY, TRIED_SIDE = 2**24, 256
BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Rates:
    """Bytes a second, read and written both counted; operations a second of products."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many operations and bytes."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def measure_rates(device: torch.device, whole: bool, dtype: torch.dtype = torch.bfloat16) -> Rates:
    """The median of several copies, and of several products of random numbers: those of equal numbers take less power and go faster."""
    copied, side = (WHOLE_COPY, WHOLE_SIDE) if whole else (TRIED_COPY, TRIED_SIDE)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = statistics.median(device_seconds(lambda: target.copy_(source), device, rounds=10))
    del source, target
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiplying = statistics.median(device_seconds(lambda: torch.mm(left, right, out=product), device, rounds=20))
    return Rates(2 * copied / copying, 2 * side**3 / multiplying)


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(call: Callable[[], object], device: torch.device, rounds: int, warm_up: int = 3) -> list[float]:
    """How long the device takes for each of several calls, between events; on a CPU how long the call takes."""
    for _ in range(warm_up):
        call()
    synchronize(device)
    if device.type != "cuda":
        return host_seconds(call, device, rounds)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for before, after in events:
        before.record()
        call()
        after.record()
    synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def host_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """How long the host waits for each of several calls and the device's work behind it."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return found


def percentile(seconds: list[float], share: float) -> float:
    """The value that `share` of the seconds do not exceed."""
    return sorted(seconds)[min(len(seconds) - 1, math.ceil(share * len(seconds)) - 1)]


@dataclass(frozen=True)
class Work:
    """Operations and bytes of each stage of a call."""

    vision: tuple[float, float]
    prefix: tuple[float, float]
    steps: tuple[float, float]

    def seconds(self, rates: Rates) -> dict[str, float]:
        """The least time of each stage."""
        return {stage: rates.seconds(*getattr(self, stage)) for stage in ("vision", "prefix", "steps")}

    def total_seconds(self, rates: Rates) -> float:
        """The least time of a call."""
        return sum(self.seconds(rates).values())


def inference_work(config: Pi0Config, batch: int, cameras: int, prompt_tokens: int, num_flow_steps: int) -> Work:
    """One call for `batch` observations, with bfloat16 matrices, keys and values."""
    one = _one_observation(config, cameras, prompt_tokens)
    tokens = cameras * config.vision.tokens_per_image + prompt_tokens
    cached = batch * tokens * config.decoder.depth * 2 * config.decoder.num_kv_heads * config.decoder.head_dim * BFLOAT16
    return Work(
        (batch * one.vision[0], one.vision[1]),
        (batch * one.prefix[0], one.prefix[1]),
        (num_flow_steps * batch * one.steps[0], num_flow_steps * (one.steps[1] + cached)),
    )


@lru_cache(maxsize=16)
def _one_observation(config: Pi0Config, cameras: int, prompt_tokens: int) -> Work:
    """Operations for one observation and bytes of the weights; of `steps` one evaluation."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # a CPU would look at the masks, which have no values here
        model = laid_out(config)
        observation = empty_observation(config, 1, cameras, prompt_tokens)
        x_t = torch.empty(1, config.action_horizon, config.action_dim)
        pictures = pixels(observation.images.flatten(0, 1))
        vision = flops_of(lambda: model.vision(pictures))
        encoded = flops_of(lambda: model.encode_prefix(observation))
        field = model.cached_velocity(observation)
        field.at(x_t, 0.5)  # what is made once a flow time is no part of an evaluation
        step = flops_of(lambda: field.at(x_t, 0.5))
    weights = _weight_bytes(model, BFLOAT16)
    return Work((vision, weights["vision"]), (encoded - vision, weights["backbone"]), (step, weights["action_expert"]))


def laid_out(config: Pi0Config) -> Pi0:
    """The network without numbers, on torch's device of the moment."""
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
    whole = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad and not is_adapter(name)}
    stages: tuple[tuple[Part, tuple[float, float]], ...] = (
        ("vision", forward.vision),
        ("backbone", forward.prefix),
        ("action_expert", forward.steps),
    )
    return sum(flops * (3 if part in whole else 2 if part in flowing else 1) for part, (flops, _) in stages)


def empty_observation(config: Pi0Config, batch: int, cameras: int, prompt_tokens: int) -> ModelObservation:
    """Shapes without numbers, on torch's device of the moment."""
    size = config.vision.image_size
    return ModelObservation(
        images=torch.empty(batch, cameras, size, size, 3, dtype=torch.uint8),
        image_mask=torch.empty(batch, cameras, dtype=torch.bool),
        prompt_tokens=torch.empty(batch, prompt_tokens, dtype=torch.int64),
        prompt_mask=torch.empty(batch, prompt_tokens, dtype=torch.bool),
        state=torch.empty(batch, config.state_dim),
    )


def flops_of(call: Callable[[], object]) -> int:
    """Operations of a call's matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def peak_bytes(device: torch.device) -> int:
    """Bytes that torch holds on the device at its highest moment since the last `forget_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def forget_peak(device: torch.device) -> None:
    """Begin to look for the highest moment anew, with freed memory given back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _weight_bytes(model: nn.Module, bytes_each: int) -> dict[str, int]:
    """Bytes of the matrices of each part; words are looked up, not read."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if "embedding" not in name:
            part = part_of(name)
            found[part] = found.get(part, 0) + parameter.numel() * bytes_each
    return found
