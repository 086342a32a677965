"""Networks, batches and differences for the tests that run on a CPU and on a GPU."""

from dataclasses import replace

import small_pi0
import torch
from small_pi0 import BOTH, network, resized
from torch import Tensor

from pi0fm.data.loading.batch import Batch
from pi0fm.data.loading.loader import BatchMaker
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import PI0, Pi0Config
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0

FLOW = FlowMatching.from_config(FlowConfig())
# the widths of released weights on two layers of each tower, with few words
WIDE = small_pi0.both(resized(PI0, vision={"depth": 2}, decoder={"depth": 2}, vocab_size=384))


def configuration(name: str, size: str) -> Pi0Config:
    """`small` or `wide`."""
    return (BOTH if size == "small" else WIDE)[name]


def observe(
    config: Pi0Config, batch: int, cameras: int, seed: int = 0, *, missing: bool = False, prompt: int | None = None
) -> ModelObservation:
    """Random. missing: the last camera of every second row is masked; prompt: real tokens of the longest row, the others have fewer."""
    longest = config.max_prompt_tokens if prompt is None else prompt
    seen = small_pi0.observation(batch, cameras, tuple(max(1, longest - row % longest) for row in range(batch)), config, seed, longest)
    there = torch.ones(batch, cameras, dtype=torch.bool)
    if missing:
        there[::2, -1] = False
    return replace(seen, images=seen.images * there[:, :, None, None, None], image_mask=there)


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
    return Batch.from_named({name: value.double() if value.is_floating_point() else value for name, value in batch.named().items()})


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

    def announce_after(self, first: int, count: int) -> None:
        """Nothing to fetch."""


def on(device: torch.device, name: str = "pi0", size: str = "small") -> Pi0:
    """A random network on the device."""
    return network(configuration(name, size)).to(device)
