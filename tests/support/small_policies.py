"""A small random policy, in memory and as a bundle."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import small_tokenizer
import tiny_dataset
import torch
from torch import Tensor

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.types import Observation


@dataclass(frozen=True)
class SmallPolicy:
    """What a bundle is made of."""

    config: PolicyConfig
    stats: NormStats
    weights: dict[str, Tensor]

    def in_memory(self, dtype: torch.dtype = torch.float32) -> LocalPolicy:
        """The policy, without passing through a file."""
        model = Pi0(self.config.model)
        model.load_state_dict(self.weights)
        flow = FlowMatching.from_config(self.config.flow)
        return LocalPolicy(model, flow, self.config.chain(self.stats), self.config.metadata(), torch.device("cpu"), dtype)


@pytest.fixture(scope="session")
def small_policy() -> SmallPolicy:
    """Two cameras, state 4, action 3, horizon 4."""
    embodiment = Embodiment(
        cameras={"base": "observation.images.base", "wrist": "observation.images.wrist"},
        state_dim=4,
        robot_action_dim=3,
        delta_actions=(0,),
    )
    random = np.random.default_rng(0)
    stats = NormStats(
        column_stats(random.normal(1, 2, (50, 4)).astype(np.float32), "state"),
        column_stats(random.normal(-1, 3, (50, 3)).astype(np.float32), "action"),
        50,
    )
    config = PolicyConfig(
        model=tiny_dataset.network(),
        flow=FlowConfig(num_flow_steps=4),
        embodiment=embodiment,
        execution_horizon=2,
        fps=10.0,
        demonstration_seeds={"press": [3, 9]},
        training={"steps": "7"},
    )
    torch.manual_seed(0)
    return SmallPolicy(config, stats, Pi0(config.model).state_dict())


@pytest.fixture(scope="session")
def saved(small_policy, tmp_path_factory) -> Path:
    """The bundle; copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    bundle.save(path, small_policy.weights, small_policy.config, small_policy.stats)
    return path


@pytest.fixture(scope="session")
def observations() -> list[Observation]:
    """Four that differ in everything: size of pictures, cameras, prompt lengths."""
    random = np.random.default_rng(1)

    def one(cameras: tuple[str, ...], height: int, prompt: str) -> Observation:
        images = {name: random.integers(0, 256, (height, 40, 3), dtype=np.uint8) for name in cameras}
        return Observation(images, random.normal(size=4).astype(np.float32), prompt)

    return [
        one(("base", "wrist"), 32, "press"),
        one(("base",), 20, "open the drawer"),
        one(("wrist",), 40, "x"),
        one(("base", "wrist"), 40, "press the button!"),
    ]


@pytest.fixture(scope="session")
def character_tokenizer(tmp_path_factory) -> Path:
    """A directory with 24 characters, called as PaliGemma's."""
    return small_tokenizer.write(tmp_path_factory.mktemp("words") / "tokenizer")
