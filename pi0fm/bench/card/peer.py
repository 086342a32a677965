"""LeRobot's own PI0 at full size, where LeRobot can be imported.

Owns: its construction on the device, its inputs. Does not know: clocks.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pi0fm.bench.card.policies import FLOW_STEPS
from pi0fm.bench.lerobot_pi0 import RobotFeatures, ShrunkPI0, policy_config, same_size
from pi0fm.models.presets import PI0, TINY

CAMERAS = 3


def lerobot_call(device: torch.device, whole: bool) -> Callable[[], Tensor]:
    """`sample_actions` for one observation of three cameras, ten steps, in bfloat16 as LeRobot keeps it; random weights."""
    tiny = replace(TINY, decoder=replace(TINY.decoder, num_heads=8, head_dim=24))
    config = PI0 if whole else tiny
    size = same_size(config)
    robot = RobotFeatures(tuple(f"camera_{number}" for number in range(CAMERAS)), config.state_dim, config.action_dim)
    with device:
        policy = ShrunkPI0(policy_config(size, robot), size).to(device).eval()
    if device.type == "cuda":
        policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    side = config.vision.image_size
    random = torch.Generator(device).manual_seed(0)
    pictures = [torch.rand(1, 3, side, side, generator=random, device=device) * 2 - 1 for _ in range(CAMERAS)]
    there = [torch.ones(1, dtype=torch.bool, device=device) for _ in range(CAMERAS)]
    words = torch.randint(3, size.vocab_size, (1, config.max_prompt_tokens), generator=random, device=device)
    state = torch.randn(1, config.state_dim, generator=random, device=device)
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=random, device=device)

    def call() -> Tensor:
        with torch.no_grad():
            return policy.model.sample_actions(
                pictures, there, words, torch.ones_like(words, dtype=torch.bool), state, noise=noise, num_steps=FLOW_STEPS
            )

    return call
