"""Sizes of the network and of its adapters, and the named presets.

Owns: `Pi0Config` and its parts, `LoraConfig`; `tiny` for a laptop, `pi0` and `pi05` as released. Does not know: torch, which is not
imported, so that a command line is parsed quickly; data sets; a run may override any field.
"""

from dataclasses import dataclass
from typing import Literal

from pi0fm.models.parts import Part
from pi0fm.options import nearest, option, refuse_below
from pi0fm_client.errors import ConfigError

Gelu = Literal["tanh", "none"]
CHECKPOINTING = ("none", "selective", "full")
ADAPTABLE: tuple[Part, ...] = ("vision", "backbone", "action_expert")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; a picture gives (image_size / patch_size)^2 tokens."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    gelu: Gelu = "tanh"

    def __post_init__(self) -> None:
        refuse_below(self, "model.vision.", width=1, depth=1, num_heads=1, mlp_width=1, patch_size=1, image_size=1)
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size must be a multiple of patch_size, found {self.image_size} and {self.patch_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"the vision width must be a multiple of its heads, found {self.width} and {self.num_heads}")

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens of a picture, V."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class StreamConfig:
    """Width of one stream's residual and of its MLP."""

    width: int
    mlp_width: int

    def __post_init__(self) -> None:
        refuse_below(self, "model.decoder.*.", width=1, mlp_width=1)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; heads are shared, since both streams meet in one softmax. gelu: see GatedMLP."""

    backbone: StreamConfig
    action_expert: StreamConfig
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gelu: Gelu = "tanh"

    def __post_init__(self) -> None:
        refuse_below(self, "model.decoder.", depth=1, num_heads=1, num_kv_heads=1, head_dim=1)


@dataclass(frozen=True)
class Pi0Config:
    """Configuration that fixes the network's shape.

    state_input: "token" puts the state before the actions (pi0); "prompt" expects it written into the prompt (pi0.5).
    time_conditioning: "concatenate" joins the time to every action token (pi0); "adaptive_norm" feeds it to the norms (pi0.5).
    action_dim, state_dim: padded widths, at least the robot's.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    vocab_size: int
    max_prompt_tokens: int
    action_dim: int
    state_dim: int
    action_horizon: int
    state_input: Literal["token", "prompt"] = "token"
    time_conditioning: Literal["concatenate", "adaptive_norm"] = "concatenate"

    def __post_init__(self) -> None:
        refuse_below(self, "model.", vocab_size=1, max_prompt_tokens=1, action_dim=1, state_dim=1, action_horizon=1)
        if self.decoder.num_heads % self.decoder.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, found {self.decoder.num_heads} and {self.decoder.num_kv_heads}"
            )
        if self.decoder.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, found {self.decoder.head_dim}")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a run; none at rank 0."""

    rank: int = option(0, "rank of the low-rank adapters; 0 for none")
    alpha: float = option(16.0, "the adapters' product is multiplied by alpha / rank")
    targets: tuple[str, ...] = option(
        ("backbone", "action_expert"),
        "parts to adapt: vision, backbone, action_expert, or names of linear layers with *; the rest of such a part is frozen",
    )

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank must be >= 0, found {self.rank}; type --lora.rank 16, or 0 for none")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha must be > 0, found {self.alpha}; type --lora.alpha 16")
        if self.rank and not self.targets:
            raise ConfigError(
                f"lora.rank {self.rank} needs something to adapt, found no targets; type --lora.targets backbone,action_expert"
            )

    @property
    def scaling(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank


TINY = Pi0Config(
    vision=VisionConfig(width=128, depth=4, num_heads=4, mlp_width=512, patch_size=16, image_size=96, gelu="none"),
    decoder=DecoderConfig(StreamConfig(192, 512), StreamConfig(128, 384), depth=4, num_heads=4, num_kv_heads=1, head_dim=48, gelu="none"),
    vocab_size=384,  # ByT5: 256 bytes and its special tokens
    max_prompt_tokens=64,
    action_dim=8,
    state_dim=8,
    action_horizon=16,
)


_PALIGEMMA_VISION = VisionConfig(width=1152, depth=27, num_heads=16, mlp_width=4304, patch_size=14, image_size=224)
_GEMMA = DecoderConfig(StreamConfig(2048, 16384), StreamConfig(1024, 4096), depth=18, num_heads=8, num_kv_heads=1, head_dim=256)
PI0 = Pi0Config(
    vision=_PALIGEMMA_VISION, decoder=_GEMMA, vocab_size=257_152, max_prompt_tokens=48, action_dim=32, state_dim=32, action_horizon=50
)
PI05 = Pi0Config(
    vision=_PALIGEMMA_VISION,
    decoder=_GEMMA,
    vocab_size=257_152,
    max_prompt_tokens=200,
    action_dim=32,
    state_dim=32,
    action_horizon=50,
    state_input="prompt",
    time_conditioning="adaptive_norm",
)
PRESETS = {"tiny": TINY, "pi0": PI0, "pi05": PI05}


def preset(name: str) -> Pi0Config:
    """Look up a configuration by name. Raises ConfigError that names the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}: {nearest(name, list(PRESETS))}")
    return PRESETS[name]
