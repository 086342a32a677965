"""Networks, policies and inputs for measurements: random, all functions of a seed.

Owns: observations, noise and batches of a case; policies with random weights and observations for them, with prompts of an exact length.
Does not know: the sizes of a case (harness/sizes), LeRobot's library, clocks. A random policy takes as long as a trained one: no operation
depends on values. Shape letters: B batch, H horizon, A action dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi0fm.bench.harness.sizes import Case
from pi0fm.data.chain import Sample
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.data.loading.batch import Batch
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import Pi0Config
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.types import Observation

CAMERAS, FLOW_STEPS = ("base", "left_wrist", "right_wrist"), 10


def make_observation(case: Case, batch: int, seed: int) -> ModelObservation:
    """Make pictures of random bytes (0 for a missing camera, as in the chain), random tokens and states; on the CPU."""
    random = torch.Generator().manual_seed(seed)
    config, size = case.config, case.config.vision.image_size
    present = torch.tensor(case.present)
    images = torch.randint(0, 256, (batch, len(present), size, size, 3), dtype=torch.uint8, generator=random)
    prompt = torch.arange(config.max_prompt_tokens) < case.prompt_tokens
    return ModelObservation(
        images=images * present[None, :, None, None, None],
        image_mask=present.repeat(batch, 1),
        prompt_tokens=torch.randint(3, config.vocab_size, (batch, config.max_prompt_tokens), generator=random) * prompt,
        prompt_mask=prompt.repeat(batch, 1),
        state=torch.randn(batch, config.state_dim, generator=random),
    )


def make_noise(case: Case, batch: int, seed: int) -> Tensor:
    """Draw N(0, I), [B, H, A], independent of the observation."""
    random = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, case.config.action_horizon, case.config.action_dim, generator=random)


def make_batch(case: Case, seed: int, flow_draws: int = 1) -> Batch:
    """Make `training_batch` observations with actions and `flow_draws` draws of noise and time each, without padding."""
    random = torch.Generator().manual_seed(seed + 2)
    count, horizon, width = case.training_batch, case.config.action_horizon, case.config.action_dim
    return Batch(
        observation=make_observation(case, count, seed),
        actions=torch.randn(count, horizon, width, generator=random),
        action_mask=torch.ones(count, horizon, width, dtype=torch.bool),
        noise=torch.randn(count, flow_draws, horizon, width, generator=random),
        uniform=torch.rand(count, flow_draws, generator=random),
    )


@dataclass(frozen=True)
class CallSize:
    """Numbers of observations and of cameras in one call."""

    batch: int
    cameras: int

    def __str__(self) -> str:
        return f"{self.cameras} camera{'s' if self.cameras > 1 else ''}, batch {self.batch}"


def random_network(config: Pi0Config, device: torch.device, seed: int = 0) -> Pi0:
    """Build a network of small random weights on the device, without a copy on the host."""
    with torch.device("meta"):
        model = Pi0(config)
    model.to_empty(device=device)
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.02 if parameter.ndim == 1 else min(0.02, float(parameter[0].numel()) ** -0.5)
            parameter.normal_(std=spread, generator=random)
    return model


EULER = FlowConfig(solver="euler", num_flow_steps=FLOW_STEPS)


def random_policy(
    model: Pi0, cameras: int, device: torch.device, dtype: torch.dtype, compile: str = "off", flow: FlowConfig = EULER, joints: int = 7
) -> LocalPolicy:
    """Build a policy; several may share one network, whose matrices the first rearranges for all."""
    robot, stats = random_robot(model.config, cameras, joints)
    return LocalPolicy(model, FlowMatching.from_config(flow), robot.chain(stats), {}, device, dtype, compile=compile)


def random_robot(config: Pi0Config, cameras: int, joints: int = 7, flow: FlowConfig = EULER) -> tuple[PolicyConfig, NormStats]:
    """Configure a robot with `joints` joints, or as many as the network's widths allow, with the statistics of N(0, 1)."""
    width = min(joints, config.action_dim, config.state_dim)
    robot = Embodiment(cameras={name: f"observation.images.{name}" for name in CAMERAS[:cameras]}, state_dim=width, robot_action_dim=width)
    normal = np.random.default_rng(0).normal(size=(200, width)).astype(np.float32)
    stats = NormStats(column_stats(normal, "state"), column_stats(normal, "action"), len(normal))
    return PolicyConfig(model=config, flow=flow, embodiment=robot), stats


def random_observations(policy: LocalPolicy, batch: int, seed: int, prompt: str | None = None) -> list[Observation]:
    """Make random pictures of the network's size and random states. prompt: None for one that fills all prompt tokens."""
    random, chain = np.random.default_rng(seed), policy.chain
    size, (width, _) = chain.image_size, chain.embodiment.dims()
    found = []
    for _ in range(batch):
        state = random.normal(size=width).astype(np.float32)
        given = prompt
        if given is None:
            normal = chain.forward(Sample(state[None], None)).state[0, :width]
            given = "x" * (1 + policy.model.config.max_prompt_tokens - len(chain.tokenizer.text("x", normal)))
        images = {name: random.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in chain.embodiment.cameras}
        found.append(Observation(images, state, given))
    return found
