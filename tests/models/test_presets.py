"""Tests of the released sizes by three counts: of the network on the meta device, by formula, and of LeRobot's class (tests/parity)."""

import pytest
import torch

from pi0fm.models.config import PRESETS, preset
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm_client.errors import ConfigError

VOCABULARY, WIDTH, MLP, EXPERT, EXPERT_MLP, DEPTH = 257_152, 2048, 16_384, 1024, 4096, 18
QUERY, KEY_VALUE = 8 * 256, 256


def siglip() -> int:
    """So400m/14 at 224 x 224, without pooling: 0.41 B."""
    width, mlp, depth, tokens = 1152, 4304, 27, 256
    embeddings = 3 * 14 * 14 * width + width + tokens * width
    attention = 4 * (width * width + width)
    layer = attention + width * mlp + mlp + mlp * width + width + 2 * 2 * width
    return embeddings + depth * layer + 2 * width


def stream(width: int, mlp: int, norm: int) -> int:
    """q, k, v, o, three MLP matrices and two norms, 18 times."""
    return DEPTH * (2 * width * QUERY + 2 * width * KEY_VALUE + 3 * width * mlp + 2 * norm)


def dead(width: int, mlp: int) -> int:
    """What the last backbone layer holds beyond one norm, k and v."""
    return 2 * width * QUERY + 3 * width * mlp + width


def derived(name: str) -> int:
    """interop.md, section 1, as arithmetic."""
    backbone = VOCABULARY * WIDTH + stream(WIDTH, MLP, WIDTH) - dead(WIDTH, MLP)
    shared = siglip() + 1152 * WIDTH + WIDTH + backbone + (32 * EXPERT + EXPERT) + (EXPERT * 32 + 32)
    linear = EXPERT * EXPERT + EXPERT
    if name == "pi0":
        return shared + stream(EXPERT, EXPERT_MLP, EXPERT) + EXPERT + (32 * EXPERT + EXPERT) + (2 * EXPERT * EXPERT + EXPERT) + linear
    adaptive = EXPERT * 3 * EXPERT + 3 * EXPERT
    return shared + stream(EXPERT, EXPERT_MLP, adaptive) + adaptive + 2 * linear


@pytest.mark.parametrize(("name", "billions"), [("pi0", 3.13), ("pi05", 3.25)])
def test_released_sizes(name, billions):
    with torch.device("meta"):
        model = Pi0(preset(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameter_count(model) == derived(name)
    assert derived(name) / 1e9 == pytest.approx(billions, abs=0.01)


def test_tiny_is_three_to_four_million():
    with torch.device("meta"):
        assert 3e6 <= parameter_count(Pi0(preset("tiny"))) <= 4e6


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        preset("tinny")
    assert all(preset(name) is config for name, config in PRESETS.items())
