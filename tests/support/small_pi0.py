"""Networks of width 32 and batches for them; a pi0-like and a pi0.5-like one."""

import dataclasses

import torch

from pi0fm.models.joint_decoder import DecoderConfig, StreamConfig
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.models.vision import VisionConfig

LIKE_PI0 = Pi0Config(
    vision=VisionConfig(width=16, depth=1, num_heads=2, mlp_width=32, patch_size=16, image_size=32),
    decoder=DecoderConfig(StreamConfig(32, 48), StreamConfig(24, 40), depth=3, num_heads=4, num_kv_heads=2, head_dim=8),
    vocab_size=40,
    max_prompt_tokens=8,
    action_dim=5,
    state_dim=6,
    action_horizon=4,
)
LIKE_PI05 = dataclasses.replace(LIKE_PI0, state_input="prompt", time_conditioning="adaptive_norm")
BOTH = {"pi0": LIKE_PI0, "pi05": LIKE_PI05}
TOKENS_PER_IMAGE = LIKE_PI0.vision.tokens_per_image


def network(config: Pi0Config) -> Pi0:
    """Every parameter random, those too that start at zero: nothing hides behind a closed gate."""
    torch.manual_seed(0)
    model = Pi0(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def observation(batch: int = 3, cameras: int = 2, prompts: tuple[int, ...] = (3, 8, 5)) -> ModelObservation:
    """Random pictures, states, and prompts of the given lengths; every camera is there."""
    random = torch.Generator().manual_seed(1)
    return ModelObservation(
        images=torch.randint(0, 256, (batch, cameras, 32, 32, 3), dtype=torch.uint8, generator=random),
        image_mask=torch.ones(batch, cameras, dtype=torch.bool),
        prompt_tokens=torch.randint(0, 40, (batch, 8), generator=random),
        prompt_mask=torch.arange(8) < torch.tensor(prompts)[:, None],
        state=torch.randn(batch, 6, generator=random),
    )


def question(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t [B, 4, 5], t [B])."""
    random = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, 5, generator=random), torch.rand(batch, generator=random)
