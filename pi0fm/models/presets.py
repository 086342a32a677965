"""The sizes that have names.

Owns: `tiny` for a laptop, `pi0` and `pi05` as released. Does not know: data sets; a run may override any field.
"""

from pi0fm.models.joint_decoder import DecoderConfig, StreamConfig
from pi0fm.models.pi0 import Pi0Config
from pi0fm.models.vision import VisionConfig
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

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
    """The named configuration. Raises ConfigError that names the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}: {nearest(name, list(PRESETS))}")
    return PRESETS[name]
