"""A policy of random weights on the device, and observations for it as a robot would send them.

Owns: its robot, its chain, prompts of an exact length. Does not know: clocks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pi0fm.data.chain import Chain, Sample, make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.data.prompt import BYTES, PromptTokenizer, load_tokenizer
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.policy.local import LocalPolicy
from pi0fm_client.types import Observation

ROBOT_DIM = 7
CAMERAS = ("base", "left_wrist", "right_wrist")
FLOW_STEPS = 10


@dataclass(frozen=True)
class Asked:
    """What one call is given: so many observations of so many cameras."""

    batch: int
    cameras: int

    def __str__(self) -> str:
        return f"{self.cameras} camera{'s' if self.cameras > 1 else ''}, batch {self.batch}"


def random_network(config: Pi0Config, device: torch.device, seed: int = 0) -> Pi0:
    """Small random numbers, made where they lie: the host never holds the network."""
    with torch.device("meta"):
        model = Pi0(config)
    fill(model, device, seed)
    return model


def fill(model_on_meta: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Memory on the device for a network that has none yet, and random numbers in it."""
    model_on_meta.to_empty(device=device)
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model_on_meta.parameters():
            spread = 0.02 if parameter.ndim == 1 else min(0.02, float(parameter[0].numel()) ** -0.5)
            parameter.normal_(std=spread, generator=random)


def make_policy(model: Pi0, cameras: int, device: torch.device, dtype: torch.dtype, compile: str) -> LocalPolicy:
    """Several policies may share one network: the first arranges its matrices, which the others find arranged."""
    flow = FlowMatching.from_config(FlowConfig(solver="euler", num_flow_steps=FLOW_STEPS))
    return LocalPolicy(model, flow, chain(model.config, cameras), {}, device, dtype, compile=compile)


def chain(config: Pi0Config, cameras: int) -> Chain:
    """Of a robot with seven joints, all of whose statistics are those of N(0, 1)."""
    embodiment = Embodiment(
        cameras={name: f"observation.images.{name}" for name in CAMERAS[:cameras]},
        state_dim=_width(config),
        robot_action_dim=_width(config),
    )
    normal = np.random.default_rng(0).normal(size=(200, _width(config))).astype(np.float32)
    stats = NormStats(column_stats(normal, "state"), column_stats(normal, "action"), len(normal))
    return make_chain(
        embodiment,
        stats,
        PromptTokenizer(load_tokenizer(BYTES, config.vocab_size), config.max_prompt_tokens, config.state_input == "prompt"),
        normalization="z_score",
        floor=1e-3,
        image_size=config.vision.image_size,
        padded_state_dim=config.state_dim,
        padded_action_dim=config.action_dim,
    )


def observations(policy: LocalPolicy, asked: Asked, seed: int) -> list[Observation]:
    """Random pictures of the network's own size and random states; every prompt fills all the tokens that there are."""
    random, config = np.random.default_rng(seed), policy.model.config
    size, words = config.vision.image_size, policy.chain.tokenizer
    found = []
    for _ in range(asked.batch):
        state = random.normal(size=_width(config)).astype(np.float32)
        normal = policy.chain.forward(Sample(state[None], None)).state[0, : _width(config)]
        prompt = "x" * (1 + config.max_prompt_tokens - len(words.text("x", normal)))
        images = {name: random.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in CAMERAS[: asked.cameras]}
        found.append(Observation(images, state, prompt))
    return found


def _width(config: Pi0Config) -> int:
    return min(ROBOT_DIM, config.action_dim, config.state_dim)
