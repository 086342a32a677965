"""Networks of width 32, like pi0 and pi0.5, in other sizes for some tests, and observations for them."""

import dataclasses
from typing import Any

import torch

from pi0fm import options
from pi0fm.models.config import DecoderConfig, Pi0Config, StreamConfig, VisionConfig
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0

LIKE_PI0 = Pi0Config(
    vision=VisionConfig(width=16, depth=1, num_heads=2, mlp_width=32, patch_size=16, image_size=32),
    decoder=DecoderConfig(StreamConfig(32, 48), StreamConfig(24, 40), depth=3, num_heads=4, num_kv_heads=2, head_dim=8),
    vocab_size=40,
    max_prompt_tokens=8,
    action_dim=5,
    state_dim=6,
    action_horizon=4,
)
TOKENS_PER_IMAGE = LIKE_PI0.vision.tokens_per_image


def resized(config: Pi0Config = LIKE_PI0, **changes: Any) -> Pi0Config:
    """`config` with other sizes: resized(vocab_size=48, decoder={"depth": 2})."""
    return options.decode(Pi0Config, options.merge(options.encode(config), changes))


def both(config: Pi0Config = LIKE_PI0) -> dict[str, Pi0Config]:
    """The pi0 of these sizes, and the pi0.5."""
    return {"pi0": config, "pi05": dataclasses.replace(config, state_input="prompt", time_conditioning="adaptive_norm")}


BOTH = both()
LIKE_PI05 = BOTH["pi05"]


def network(config: Pi0Config) -> Pi0:
    """Every parameter random, those too that start at zero: nothing hides behind a closed gate."""
    torch.manual_seed(0)
    model = Pi0(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def observation(
    batch: int = 3,
    cameras: int = 2,
    prompts: tuple[int, ...] = (3, 8, 5),
    config: Pi0Config = LIKE_PI0,
    seed: int = 1,
    length: int | None = None,
) -> ModelObservation:
    """Random pictures, states, and `prompts` tokens a row in tensors of `length`, the network's longest if None; no camera is missing."""
    random, size = torch.Generator().manual_seed(seed), config.vision.image_size
    length = length or config.max_prompt_tokens
    return ModelObservation(
        images=torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=random),
        image_mask=torch.ones(batch, cameras, dtype=torch.bool),
        prompt_tokens=torch.randint(0, config.vocab_size, (batch, length), generator=random),
        prompt_mask=torch.arange(length) < torch.tensor(prompts)[:, None],
        state=torch.randn(batch, config.state_dim, generator=random),
    )


def question(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t [B, 4, 5], t [B])."""
    random = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, 5, generator=random), torch.rand(batch, generator=random)
