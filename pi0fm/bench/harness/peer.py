"""LeRobot's PI0 at a size that a laptop can train, with our weights: the peer of pi0fm's comparisons.

Owns: constructors for sizes other than LeRobot's named variants ("gemma_2b", "gemma_300m"), a prompt tokenizer that needs no download,
weights and gradients under both sides' names, the distance between chunks. Does not know: data sets, clocks, budgets.

LeRobot's (inherited, unchanged): every `forward`, `sample_actions` and `denoise_step`, the sampling of flow time and noise, the loss, the
attention masks, the layers, the preparation of pictures, states and actions, the normalisation steps, the optimiser presets.
Ours: three constructors that repeat LeRobot's with other widths, depths and vocabulary, and ByT5's bytes instead of PaliGemma's gated
tokenizer. Initial weights are those of LeRobot's constructors without a pretrained checkpoint.

    PI0Policy ----------------- ShrunkPI0                    each arrow overrides __init__ alone
    PI0Pytorch ---------------- _ShrunkCore
    PaliGemmaWithExpertModel -- _ShrunkStreams
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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

from pi0fm.bench.harness.sizes import Case
from pi0fm.convert.shapes import parts, sizes_of
from pi0fm.models.config import Pi0Config, StreamConfig
from pi0fm.models.pi0 import Pi0
from pi0fm_client.errors import ConfigError, DatasetError, Pi0fmError

# LeRobot's joint layer reshapes its attention output to 8 heads whatever the configuration says (modeling_pi0.py, line 124).
QUERY_HEADS = 8

Processors = tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]]


@dataclass(frozen=True)
class RobotFeatures:
    """A robot's camera names as in the data set (`observation.images.NAME`), and its widths before padding."""

    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int


def image_key(camera: str) -> str:
    """Data set column and batch key of a camera's pictures."""
    return f"{OBS_IMAGES}.{camera}"


def at_lerobots_heads(config: Pi0Config) -> Pi0Config:
    """`config` with its query width split into the 8 heads that LeRobot requires.

    Raises ConfigError when the query width is not a multiple of 16 (8 heads of an even size), or the configuration is not of pi0.
    """
    query_width = config.decoder.num_heads * config.decoder.head_dim
    if query_width % (2 * QUERY_HEADS):
        raise ConfigError(f"num_heads * head_dim must be a multiple of {2 * QUERY_HEADS} to be compared with LeRobot, found {query_width}")
    if config.state_input != "token" or config.time_conditioning != "concatenate":
        raise ConfigError(
            f"only a pi0 can be compared with LeRobot's PI0, found state_input {config.state_input!r} and "
            f"time_conditioning {config.time_conditioning!r}: type 'token' and 'concatenate'"
        )
    return replace(config, decoder=replace(config.decoder, num_heads=QUERY_HEADS, head_dim=query_width // QUERY_HEADS))


def policy_config(config: Pi0Config, robot: RobotFeatures, learning_rate: float = 1e-3) -> PI0Config:
    """LeRobot's configuration for a CPU: defaults except for sizes and learning rate; its two `variant` fields are not used.

    The last learning rate stays a tenth of the peak, as in LeRobot's preset. Raises ConfigError for a robot wider than the padding.
    """
    if robot.state_dim > config.state_dim or robot.action_dim > config.action_dim:
        raise ConfigError(
            f"state_dim and action_dim must hold the robot's {robot.state_dim} and {robot.action_dim}, "
            f"found {config.state_dim} and {config.action_dim}: make them larger"
        )
    side = config.vision.image_size
    inputs = {image_key(camera): PolicyFeature(FeatureType.VISUAL, (3, side, side)) for camera in robot.cameras}
    return PI0Config(
        input_features=inputs | {OBS_STATE: PolicyFeature(FeatureType.STATE, (robot.state_dim,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (robot.action_dim,))},
        chunk_size=config.action_horizon,
        n_action_steps=config.action_horizon,
        max_state_dim=config.state_dim,
        max_action_dim=config.action_dim,
        image_resolution=(side, side),
        tokenizer_max_length=config.max_prompt_tokens,
        optimizer_lr=learning_rate,
        scheduler_decay_lr=learning_rate / 10,
        device="cpu",
        push_to_hub=False,
    )


@final
class ShrunkPI0(PI0Policy):
    """LeRobot's PI0Policy with a small PI0Pytorch; `forward(batch)` and `predict_action_chunk(batch)` are LeRobot's."""

    def __init__(self, config: PI0Config, size: Pi0Config) -> None:
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
    def __init__(self, config: PI0Config, size: Pi0Config) -> None:
        nn.Module.__init__(self)
        width = size.decoder.action_expert.width
        self.config = config
        self.rtc_processor = None
        self.paligemma_with_expert = _ShrunkStreams(size)
        self.action_in_proj = nn.Linear(size.action_dim, width)
        self.action_out_proj = nn.Linear(width, size.action_dim)
        self.state_proj = nn.Linear(size.state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.gradient_checkpointing_enabled = False


@final
class _ShrunkStreams(PaliGemmaWithExpertModel):
    def __init__(self, size: Pi0Config) -> None:
        nn.Module.__init__(self)
        self.freeze_vision_encoder = False
        self.train_expert_only = False
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=paligemma_config(size))
        self.gemma_expert = PiGemmaForCausalLM(config=gemma_config(size, size.decoder.action_expert))
        self.gemma_expert.model.embed_tokens = None
        self.to_bfloat16_for_selected_params("float32")
        self._set_requires_grad()


def gemma_config(size: Pi0Config, stream: StreamConfig) -> GemmaConfig:
    """Configuration of one stream, without adaptive norms. Raises ConfigError for a number of query heads other than 8."""
    if size.decoder.num_heads != QUERY_HEADS:
        raise ConfigError(
            f"LeRobot's PI0 has {QUERY_HEADS} query heads written into its code, found num_heads {size.decoder.num_heads}: "
            f"type {QUERY_HEADS}, and change head_dim to keep their product"
        )
    heads = {"num_attention_heads": QUERY_HEADS, "num_key_value_heads": size.decoder.num_kv_heads, "head_dim": size.decoder.head_dim}
    widths = {"hidden_size": stream.width, "intermediate_size": stream.mlp_width, "num_hidden_layers": size.decoder.depth}
    kind = {"hidden_activation": "gelu_pytorch_tanh", "dtype": "float32", "use_adarms": False, "adarms_cond_dim": None}
    return GemmaConfig(vocab_size=size.vocab_size, **widths, **heads, **kind)


def paligemma_config(size: Pi0Config) -> PaliGemmaConfig:
    """Configuration of vision tower and backbone; the picture token's index is outside the vocabulary, as in LeRobot."""
    tower, width = size.vision, size.decoder.backbone.width
    widths = {"hidden_size": tower.width, "intermediate_size": tower.mlp_width, "num_hidden_layers": tower.depth}
    pictures = {"num_attention_heads": tower.num_heads, "patch_size": tower.patch_size, "image_size": tower.image_size}
    vision = SiglipVisionConfig(**widths, **pictures, vision_use_head=False, dtype="float32")
    text = gemma_config(size, size.decoder.backbone)
    words = {"vocab_size": size.vocab_size, "image_token_index": size.vocab_size}
    return PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=width, hidden_size=width, **words)


@final
class ByteTokenizer:
    """ByT5 tokenizer that caches each sentence.

    transformers' ByT5 is plain Python and takes 3 ms per sentence, PaliGemma's compiled tokenizer microseconds: without the cache our
    choice of tokenizer would slow LeRobot's side.
    """

    def __init__(self) -> None:
        self._tokenizer = ByT5Tokenizer()
        self._known: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def __call__(self, text: list[str], **settings: Any) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, int64 [len(text), length]; settings as a transformers tokenizer takes them."""
        keys = [(sentence, *sorted(settings.items())) for sentence in text]
        for key in keys:
            if key not in self._known:
                self._known[key] = dict(self._tokenizer([key[0]], **settings))
        return {name: torch.cat([self._known[key][name] for key in keys]) for name in ("input_ids", "attention_mask")}


def processors(config: PI0Config, stats: Mapping[str, Mapping[str, Any]]) -> Processors:
    """LeRobot's processors before and after the policy, in its order, with ByT5's bytes for the prompt.

    stats: `mean` and `std` of `observation.state` and `action`, as in `LeRobotDataset.meta.stats`.
    Raises DatasetError when one is missing: LeRobot would silently leave that column unnormalised.
    """
    for key in (OBS_STATE, ACTION):
        if not {"mean", "std"} <= set(stats.get(key, {})):
            raise DatasetError(
                f"the statistics must hold mean and std of {key}, found {sorted(stats.get(key, {}))}: "
                "write them into the data set's meta/stats.json"
            )
    steps = make_default_policy_processor_steps(config, {key: dict(value) for key, value in stats.items()})
    tokenizer = TokenizerProcessorStep(
        tokenizer=ByteTokenizer(), max_length=config.tokenizer_max_length, padding_side="right", padding="max_length"
    )
    before = [steps.rename_observations, steps.add_batch_dim, Pi0NewLineProcessor(), tokenizer, steps.to_device, steps.normalize]
    return make_policy_processor_pipelines(input_steps=before, output_steps=[steps.unnormalize, steps.to_cpu])


@dataclass(frozen=True)
class PeerPair:
    """Two networks with the same weights."""

    case: Case
    theirs: ShrunkPI0
    ours: Pi0


def build_theirs(case: Case) -> ShrunkPI0:
    """LeRobot's policy at the case's size, with the padded widths as the robot's widths."""
    cameras = tuple(f"camera_{number}" for number in range(len(case.present)))
    return ShrunkPI0(policy_config(case.config, RobotFeatures(cameras, case.config.state_dim, case.config.action_dim)), case.config)


def build_pair(case: Case, seed: int, device: torch.device) -> PeerPair:
    """LeRobot's policy with random weights, and ours with the same. The caller's random state does not change.

    The weights give every token a variance of about 1: with LeRobot's initial weights, norms and biases 0 and the rest small, a network
    hardly moves its noise, which would hide errors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = build_theirs(case)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
        ours = Pi0(case.config)
    ours.load_state_dict(to_our_names(theirs.model.state_dict(), case.config), strict=True)
    return PeerPair(case, theirs.to(device), ours.to(device))


def to_our_names(theirs: Mapping[str, Tensor], config: Pi0Config) -> dict[str, Tensor]:
    """Convert weights or gradients of LeRobot's `model` to our names and shapes."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in Pi0(config).state_dict().items()}
    named = parts("torch", "pi0", sizes_of(config)).items()
    return {ours: torch.cat([part.rows(theirs[part.name], tuple(wanted[ours][1:])) for part in group]) for ours, group in named}


def displacement_difference(ours: Tensor, theirs: Tensor, noise: Tensor) -> float:
    """Largest difference of two chunks, relative to the largest displacement of an action from its noise.

    Stricter than relative to the chunk, which consists mostly of the noise that both sides share.
    """
    theirs, noise = theirs.float(), noise.float()
    return float((ours.float() - theirs).abs().max() / (theirs - noise).abs().max())


def gradient_difference(pair: PeerPair) -> float:
    """Largest difference of a parameter's gradient, relative to its largest entry or, if that is more, to 1 % of the largest of all."""
    named = pair.theirs.model.named_parameters(remove_duplicate=False)
    expected = to_our_names(
        {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named}, pair.case.config
    )
    largest = max(float(value.abs().max()) for value in expected.values())
    differences = []
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None, name
        scale = max(float(expected[name].abs().max()), 1e-2 * largest)
        differences.append(float((parameter.grad - expected[name]).abs().max()) / scale)
    return max(differences)


def check_alike(where: str, what: str, difference: float, bound: float) -> None:
    """Raise Pi0fmError when the two sides do not compute the same, which makes their times incomparable."""
    if not difference <= bound:  # NaN too
        raise Pi0fmError(
            f"{what} of both sides must agree within {bound:g} before they are timed, found {difference:.3g} for {where}; "
            "no ratio is printed: type another --seed, and report it when that differs too"
        )
