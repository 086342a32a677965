"""LeRobot's own PI0 policy at a size that a laptop trains, as the peer that pi0fm is compared with.

Owns: the constructors that LeRobot's named variants ("gemma_2b", "gemma_300m") leave no room for, and a prompt tokenizer that needs
no download. Does not know: data sets, budgets, simulators.

LeRobot's (inherited, not one line changed): every `forward`, `sample_actions` and `denoise_step`, the sampling of flow time and noise,
the loss, the attention masks, the layers, the preparation of pictures, states and actions, the normalisation steps, the optimiser presets.
Ours: three constructors that repeat theirs with other widths, depths and vocabulary, and ByT5's bytes in the place of PaliGemma's
gated tokenizer. Weights start as LeRobot's constructors leave them when nothing pretrained is loaded.

    PI0Policy ----------------- ShrunkPI0                    each arrow overrides __init__ alone
    PI0Pytorch ---------------- _ShrunkCore
    PaliGemmaWithExpertModel -- _ShrunkStreams
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    PolicyAction,
    PolicyProcessorPipeline,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor, nn
from transformers import ByT5Tokenizer, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from pi0fm.models.pi0 import Pi0Config
from pi0fm_client.errors import ConfigError, DatasetError

# LeRobot's joint layer reshapes its attention output to 8 heads whatever the configuration says (modeling_pi0.py, line 124).
QUERY_HEADS = 8

Processors = tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]]


@dataclass(frozen=True)
class ShrunkSize:
    """The widths of a small PI0. `width` and `mlp` are the backbone's; depth, heads and head_dim are shared by both streams.

    action_dim, state_dim: padded widths. prompt_tokens: bytes of the sentence and its end; LeRobot cuts longer ones without a word.
    Raises ConfigError for what LeRobot cannot build.
    """

    vision_width: int = 128
    vision_depth: int = 4
    vision_heads: int = 4
    vision_mlp: int = 512
    patch_size: int = 12
    image_size: int = 96
    width: int = 192
    mlp: int = 512
    expert_width: int = 128
    expert_mlp: int = 384
    depth: int = 4
    num_heads: int = QUERY_HEADS
    num_kv_heads: int = 1
    head_dim: int = 24
    vocab_size: int = 384
    prompt_tokens: int = 64
    action_dim: int = 8
    state_dim: int = 8
    action_horizon: int = 16

    def __post_init__(self) -> None:
        if self.num_heads != QUERY_HEADS:
            raise ConfigError(
                f"LeRobot's PI0 has {QUERY_HEADS} query heads written into its code, found num_heads {self.num_heads}: "
                f"type {QUERY_HEADS}, and change head_dim to keep their product"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads must be a multiple of num_kv_heads, found {self.num_heads} and {self.num_kv_heads}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size must be a multiple of patch_size, found {self.image_size} and {self.patch_size}")


def same_size(config: Pi0Config) -> ShrunkSize:
    """LeRobot's size for a pi0fm configuration: all widths equal, the query width split into the 8 heads that LeRobot insists on.

    Raises ConfigError when the query width is no multiple of 16 (8 heads of an even size), or the configuration is not a pi0.
    """
    vision, decoder = config.vision, config.decoder
    query_width = decoder.num_heads * decoder.head_dim
    if query_width % (2 * QUERY_HEADS):
        raise ConfigError(f"num_heads * head_dim must be a multiple of {2 * QUERY_HEADS} to be compared with LeRobot, found {query_width}")
    if config.state_input != "token" or config.time_conditioning != "concatenate":
        raise ConfigError(
            f"only a pi0 can be compared with LeRobot's PI0, found state_input {config.state_input!r} and "
            f"time_conditioning {config.time_conditioning!r}: type 'token' and 'concatenate'"
        )
    return ShrunkSize(
        vision_width=vision.width,
        vision_depth=vision.depth,
        vision_heads=vision.num_heads,
        vision_mlp=vision.mlp_width,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        width=decoder.backbone.width,
        mlp=decoder.backbone.mlp_width,
        expert_width=decoder.action_expert.width,
        expert_mlp=decoder.action_expert.mlp_width,
        depth=decoder.depth,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=query_width // QUERY_HEADS,
        vocab_size=config.vocab_size,
        prompt_tokens=config.max_prompt_tokens,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        action_horizon=config.action_horizon,
    )


@dataclass(frozen=True)
class RobotFeatures:
    """What the robot has: camera names as in the data set (`observation.images.NAME`), and its own widths before padding."""

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int


def image_key(camera: str) -> str:
    """The column of a data set, and the key of a batch, that holds a camera's pictures."""
    return f"{OBS_IMAGES}.{camera}"


def policy_config(size: ShrunkSize, robot: RobotFeatures, learning_rate: float = 1e-3) -> PI0Config:
    """LeRobot's configuration for a CPU, its defaults but for sizes and learning rate. Its two `variant` fields are not read here.

    The last learning rate stays a tenth of the peak, as in LeRobot's preset. Raises ConfigError for a robot wider than the padding.
    """
    if robot.state_dim > size.state_dim or robot.action_dim > size.action_dim:
        raise ConfigError(
            f"state_dim and action_dim must hold the robot's {robot.state_dim} and {robot.action_dim}, "
            f"found {size.state_dim} and {size.action_dim}: make them larger"
        )
    picture = (3, size.image_size, size.image_size)
    inputs = {image_key(camera): PolicyFeature(FeatureType.VISUAL, picture) for camera in robot.cameras}
    return PI0Config(
        input_features=inputs | {OBS_STATE: PolicyFeature(FeatureType.STATE, (robot.state_dim,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (robot.action_dim,))},
        chunk_size=size.action_horizon,
        n_action_steps=size.action_horizon,
        max_state_dim=size.state_dim,
        max_action_dim=size.action_dim,
        image_resolution=(size.image_size, size.image_size),
        tokenizer_max_length=size.prompt_tokens,
        optimizer_lr=learning_rate,
        scheduler_decay_lr=learning_rate / 10,
        device="cpu",
        push_to_hub=False,
    )


@final
class ShrunkPI0(PI0Policy):
    """LeRobot's PI0Policy around a small PI0Pytorch; `forward(batch)` and `predict_action_chunk(batch)` are LeRobot's."""

    def __init__(self, config: PI0Config, size: ShrunkSize) -> None:
        # PI0Policy's own constructor would build three billion parameters first.
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.config = config
        self.init_rtc_processor()
        self.model = _ShrunkCore(config, size)
        self.model.to(config.device)
        self.reset()


@final
class _ShrunkCore(PI0Pytorch):
    def __init__(self, config: PI0Config, size: ShrunkSize) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.rtc_processor = None
        self.paligemma_with_expert = _ShrunkStreams(size)
        self.action_in_proj = nn.Linear(size.action_dim, size.expert_width)
        self.action_out_proj = nn.Linear(size.expert_width, size.action_dim)
        self.state_proj = nn.Linear(size.state_dim, size.expert_width)
        self.action_time_mlp_in = nn.Linear(2 * size.expert_width, size.expert_width)
        self.action_time_mlp_out = nn.Linear(size.expert_width, size.expert_width)
        self.gradient_checkpointing_enabled = False


@final
class _ShrunkStreams(PaliGemmaWithExpertModel):
    def __init__(self, size: ShrunkSize) -> None:
        nn.Module.__init__(self)
        self.freeze_vision_encoder = False
        self.train_expert_only = False
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=paligemma_config(size))
        self.gemma_expert = PiGemmaForCausalLM(config=gemma_config(size, size.expert_width, size.expert_mlp))
        self.gemma_expert.model.embed_tokens = None
        self.to_bfloat16_for_selected_params("float32")
        self._set_requires_grad()


def gemma_config(size: ShrunkSize, width: int, mlp: int) -> GemmaConfig:
    """One stream's configuration, without adaptive norms."""
    return GemmaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        vocab_size=size.vocab_size,
        hidden_activation="gelu_pytorch_tanh",
        dtype="float32",
        use_adarms=False,
        adarms_cond_dim=None,
    )


def paligemma_config(size: ShrunkSize) -> PaliGemmaConfig:
    """The vision tower and the backbone."""
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_depth,
        num_attention_heads=size.vision_heads,
        patch_size=size.patch_size,
        image_size=size.image_size,
        vision_use_head=False,
        dtype="float32",
    )
    text = gemma_config(size, size.width, size.mlp)
    # No token stands for a picture here, so the index lies outside the vocabulary, as it does in LeRobot.
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        vocab_size=size.vocab_size,
        image_token_index=size.vocab_size,
        projection_dim=size.width,
        hidden_size=size.width,
    )


@final
class PromptTokenizer:
    """ByT5's bytes, each sentence once.

    transformers' ByT5 is plain Python, 3 ms a sentence where PaliGemma's compiled tokenizer takes microseconds: LeRobot must not pay
    for a tokenizer that it did not choose.
    """

    def __init__(self) -> None:
        self._tokenizer = ByT5Tokenizer()
        self._known: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def __call__(self, text: list[str], **settings: Any) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 [len(text), length]; settings as a transformers tokenizer takes them."""
        rows = [self._row(sentence, settings) for sentence in text]
        return {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}

    def _row(self, sentence: str, settings: dict[str, Any]) -> dict[str, Tensor]:
        key = (sentence, *sorted(settings.items()))
        if key not in self._known:
            self._known[key] = dict(self._tokenizer([sentence], **settings))
        return self._known[key]


def processors(config: PI0Config, stats: Mapping[str, Mapping[str, Any]]) -> Processors:
    """LeRobot's steps before and after the policy, in its order, with ByT5's bytes for the prompt.

    stats: `mean` and `std` of `observation.state` and `action`, as in `LeRobotDataset.meta.stats`.
    Raises DatasetError when one is missing: LeRobot would leave that column as it is, without a word.
    """
    for key in (OBS_STATE, ACTION):
        if not {"mean", "std"} <= set(stats.get(key, {})):
            raise DatasetError(
                f"the statistics must hold mean and std of {key}, found {sorted(stats.get(key, {}))}: "
                "write them into the data set's meta/stats.json"
            )
    steps = make_default_policy_processor_steps(config, {key: dict(value) for key, value in stats.items()})
    tokenizer = TokenizerProcessorStep(
        tokenizer=PromptTokenizer(), max_length=config.tokenizer_max_length, padding_side="right", padding="max_length"
    )
    before = [steps.rename_observations, steps.add_batch_dim, Pi0NewLineProcessor(), tokenizer, steps.to_device, steps.normalize]
    return make_policy_processor_pipelines(input_steps=before, output_steps=[steps.unnormalize, steps.to_cpu])
