"""Networks, batches and differences for the tests that run on a CPU and on a GPU."""

import dataclasses
from collections.abc import Iterator

import torch
from small_pi0 import BOTH, network
from torch import Tensor

from pi0fm.data.loading.batch import Batch
from pi0fm.data.loading.loader import BatchMaker
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.joint_decoder import DecoderConfig, StreamConfig
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.models.vision import VisionConfig

FLOW = FlowMatching.from_config(FlowConfig())
# the widths of released weights on two layers of each tower, with few words
WIDE_PI0 = Pi0Config(
    vision=VisionConfig(width=1152, depth=2, num_heads=16, mlp_width=4304, patch_size=14, image_size=224),
    decoder=DecoderConfig(StreamConfig(2048, 16384), StreamConfig(1024, 4096), depth=2, num_heads=8, num_kv_heads=1, head_dim=256),
    vocab_size=384,
    max_prompt_tokens=48,
    action_dim=32,
    state_dim=32,
    action_horizon=50,
)
WIDE = {"pi0": WIDE_PI0, "pi05": dataclasses.replace(WIDE_PI0, state_input="prompt", time_conditioning="adaptive_norm")}


def configuration(name: str, size: str) -> Pi0Config:
    """`small` or `wide`."""
    return (BOTH if size == "small" else WIDE)[name]


def observe(
    config: Pi0Config, batch: int, cameras: int, seed: int = 0, *, missing: bool = False, prompt: int | None = None
) -> ModelObservation:
    """Random. missing: the last camera of every second row is masked; prompt: real tokens of the longest row, the others have fewer."""
    random, size = torch.Generator().manual_seed(seed), config.vision.image_size
    seen = torch.ones(batch, cameras, dtype=torch.bool)
    if missing:
        seen[::2, -1] = False
    longest = config.max_prompt_tokens if prompt is None else prompt
    lengths = (longest - torch.arange(batch) % longest).clamp(min=1)
    images = torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=random)
    return ModelObservation(
        images=images * seen[:, :, None, None, None],
        image_mask=seen,
        prompt_tokens=torch.randint(3, config.vocab_size, (batch, longest), generator=random),
        prompt_mask=torch.arange(longest) < lengths[:, None],
        state=torch.randn(batch, config.state_dim, generator=random),
    )


def make_batch(config: Pi0Config, size: int = 2, seed: int = 0, cameras: int = 1, draws: int = 1) -> Batch:
    """Random; the last two action dimensions and the second half of every second chunk are padding."""
    random = torch.Generator().manual_seed(1000 + seed)
    shape = (size, config.action_horizon, config.action_dim)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., -2:] = False
    mask[::2, config.action_horizon // 2 :] = False
    return Batch(
        observation=observe(config, size, cameras, seed),
        actions=torch.randn(shape, generator=random),
        action_mask=mask,
        noise=torch.randn(size, draws, *shape[1:], generator=random),
        uniform=torch.rand(size, draws, generator=random),
    )


def mean_loss(model: Pi0, batch: Batch) -> tuple[Tensor, Tensor]:
    """(velocity, mean loss) of one draw an observation, in the precision of the batch's actions."""
    t = FLOW.times(batch.uniform.flatten())
    pair = FLOW.training_pair(batch.actions, t, batch.noise.flatten(0, 1))
    velocity = model(batch.observation, pair.x_t, t)
    error = (velocity - pair.target)[batch.action_mask]
    return velocity, error.square().mean()


def in_float64(batch: Batch) -> Batch:
    """The same numbers in float64."""
    return Batch.of({name: value.double() if value.is_floating_point() else value for name, value in batch.named().items()})


def apart(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """|found - expected| / |expected|, Euclidean, in float64 on the host; the divisor is at least `least`."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm()) / max(float(expected.norm()), least, 1e-30)


def gradients(model: Pi0) -> dict[str, Tensor]:
    """By name, of what trains."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradient_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """`apart` of each. A gradient that nearly cancels is held against a thousandth of the largest one's entries."""
    assert found.keys() == expected.keys()
    typical = max(float(value.detach().norm()) / value.numel() ** 0.5 for value in expected.values())
    return {name: apart(found[name], value, 1e-3 * typical * value.numel() ** 0.5) for name, value in expected.items()}


class Synthetic(BatchMaker):
    """Batches that are a function of their place in the stream."""

    def __init__(self, config: Pi0Config) -> None:
        self._config = config

    def __call__(self, first: int, count: int) -> Batch:
        return make_batch(self._config, count, seed=first)

    def valid_elements(self, first: int, count: int) -> int:
        return int(self(first, count).action_mask.sum())

    def count_ahead(self, first: int, count: int) -> None:
        """Nothing to look up."""

    def expect_after(self, first: int, count: int) -> None:
        """Nothing to fetch."""


def endless(batch: Batch) -> Iterator[Batch]:
    """The same again and again."""
    while True:
        yield batch


def on(device: torch.device, name: str = "pi0", size: str = "small") -> Pi0:
    """A random network on the device."""
    return network(configuration(name, size)).to(device)
