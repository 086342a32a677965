"""LeRobot's PI05 at a small size: only constructors, as pi0fm/bench/harness/peer.py has them for PI0, and both with processors."""

from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PaliGemmaWithExpertModel, PI05Policy, PI05Pytorch
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import nn

from pi0fm.bench.harness.peer import RobotFeatures, ShrunkPI0, gemma_config, image_key, paligemma_config, policy_config
from pi0fm.models.config import Pi0Config


class ShrunkPI05(PI05Policy):
    """LeRobot's PI05Policy around a small PI05Pytorch."""

    def __init__(self, config: PI05Config, size: Pi0Config) -> None:
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.config = config
        self.init_rtc_processor()
        self.model = _Core(config, size)
        self.model.to(config.device)
        self.reset()


class _Core(PI05Pytorch):
    def __init__(self, config: PI05Config, size: Pi0Config) -> None:
        nn.Module.__init__(self)
        width = size.decoder.action_expert.width
        self.config = config
        self.rtc_processor = None
        self.paligemma_with_expert = _Streams(size)
        self.action_in_proj = nn.Linear(size.action_dim, width)
        self.action_out_proj = nn.Linear(width, size.action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.gradient_checkpointing_enabled = False


class _Streams(PaliGemmaWithExpertModel):
    def __init__(self, size: Pi0Config) -> None:
        nn.Module.__init__(self)
        self.freeze_vision_encoder = False
        self.train_expert_only = False
        expert = gemma_config(size, size.decoder.action_expert)
        expert.use_adarms, expert.adarms_cond_dim = True, size.decoder.action_expert.width
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=paligemma_config(size))
        self.gemma_expert = PiGemmaForCausalLM(config=expert)
        self.gemma_expert.model.embed_tokens = None
        self.to_bfloat16_for_selected_params("float32")
        self._set_requires_grad()


POLICIES = {"pi0": ShrunkPI0, "pi05": ShrunkPI05}


def make_config(kind: str, size: Pi0Config, robot: RobotFeatures, **changes: Any) -> Any:
    """LeRobot's configuration of either, for a CPU; `changes` are fields of it."""
    if kind == "pi0":
        config = policy_config(size, robot)
    else:
        side = size.vision.image_size
        config = PI05Config(
            input_features={image_key(camera): PolicyFeature(FeatureType.VISUAL, (3, side, side)) for camera in robot.cameras}
            | {OBS_STATE: PolicyFeature(FeatureType.STATE, (robot.state_dim,))},
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (robot.action_dim,))},
            chunk_size=size.action_horizon,
            n_action_steps=size.action_horizon,
            max_state_dim=size.state_dim,
            max_action_dim=size.action_dim,
            image_resolution=(side, side),
            tokenizer_max_length=size.max_prompt_tokens,
            device="cpu",
            push_to_hub=False,
        )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def make_policy(kind: str, config: Any, size: Pi0Config) -> Any:
    """Every parameter random, those too that start at zero."""
    torch.manual_seed(0)
    policy = POLICIES[kind](config, size).eval()
    for name, parameter in policy.named_parameters():
        if parameter.ndim == 1 or ".dense." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


def make_processors(kind: str, config: Any, stats: dict[str, dict[str, Any]], tokenizer: Path) -> tuple[Any, Any]:
    """LeRobot's steps in LeRobot's order, with a tokenizer that is here."""
    steps = make_default_policy_processor_steps(config, stats)
    relative = RelativeActionsProcessorStep(config.use_relative_actions, config.relative_exclude_joints, config.action_feature_names)
    words = TokenizerProcessorStep(
        tokenizer_name=str(tokenizer), max_length=config.tokenizer_max_length, padding_side="right", padding="max_length"
    )
    first = [steps.rename_observations, steps.add_batch_dim]
    if kind == "pi0":
        before = [*first, Pi0NewLineProcessor(), words, steps.to_device, relative, steps.normalize]
    else:
        state = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim)
        before = [*first, relative, steps.normalize, state, words, steps.to_device]
    after = [steps.unnormalize, AbsoluteActionsProcessorStep(config.use_relative_actions, relative), steps.to_cpu]
    return make_policy_processor_pipelines(input_steps=before, output_steps=after)
