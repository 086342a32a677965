"""Tests of the tower against transformers' SigLIP: values, gradients, initial weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from pi0fm.models.config import VisionConfig
from pi0fm.models.initial import initialise
from pi0fm.models.vision import PatchEmbedding, ProductNorm, VisionTower

SMALL = VisionConfig(width=24, depth=2, num_heads=3, mlp_width=40, patch_size=4, image_size=12)
NAMES = {
    "patch_embedding.": "embeddings.patch_embedding.",
    "position_embedding": "embeddings.position_embedding.weight",
    "final_norm.": "post_layernorm.",
    "layers.": "encoder.layers.",
    "attention_norm.": "layer_norm1.",
    "mlp_norm.": "layer_norm2.",
    ".qkv.": ".self_attn.{}_proj.",
    ".out.": ".self_attn.out_proj.",
}


def library(config: VisionConfig = SMALL) -> SiglipVisionModel:
    torch.manual_seed(0)
    sizes = SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    return SiglipVisionModel(sizes)


def theirs(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """What of the library's stands for our tensor `name`."""
    for ours, other in NAMES.items():
        name = name.replace(ours, other)
    found = [tensors[f"vision_model.{name.format(part)}"] for part in ("qkv" if "{}" in name else " ")]
    return torch.cat(found)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_values_and_gradients_are_the_librarys(gelu):
    """In float64; every parameter is moved off its start, or biases and scales would hide."""
    config = VisionConfig(**{**vars(SMALL), "gelu": gelu})
    other, tower = library(config).double(), VisionTower(config, 16).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=random))
        own = {name: parameter for name, parameter in tower.named_parameters() if not name.startswith("projector")}
        for name, parameter in own.items():
            parameter.copy_(theirs(name, dict(other.named_parameters())))
    assert sum(parameter.numel() for parameter in own.values()) == sum(parameter.numel() for parameter in other.parameters())
    pictures = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=random)
    expected, found = tower.projector(other(pixel_values=pictures).last_hidden_state), tower(pictures)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    expected.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in other.named_parameters()}
    tower.zero_grad()
    found.square().sum().backward()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, theirs(name, wanted), rtol=1e-8, atol=1e-9)


def test_it_starts_with_the_librarys_variances():
    """Of matrices wide enough that their spread is told; zeros and ones are exact."""
    config = VisionConfig(width=192, depth=1, num_heads=3, mlp_width=512, patch_size=8, image_size=64)
    torch.manual_seed(1)
    other, tower = dict(library(config).named_parameters()), VisionTower(config, 16)
    initialise(tower, 1)
    for name, parameter in tower.named_parameters():
        if name.startswith("projector"):
            continue
        wanted = theirs(name, other)
        assert parameter.shape == wanted.shape
        if wanted.unique().numel() == 1:
            assert torch.equal(parameter, wanted), name
        else:
            deviation = parameter.std().item()
            assert deviation == pytest.approx(wanted.std().item(), rel=0.15 if wanted.ndim < 2 else 0.03), name
            if wanted.ndim == 2 and "position" not in name:  # uniform
                assert parameter.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.03), name


def test_a_tower_on_the_meta_device_has_nothing_but_parameters():
    with torch.device("meta"):
        tower = VisionTower(SMALL, 16)
    assert all(parameter.is_meta for parameter in tower.parameters())
    assert not list(tower.buffers())


@pytest.mark.parametrize(("height", "width"), [(12, 12), (8, 16)])
def test_patches_are_embedded_as_by_the_convolution(height, width):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 4, stride=4).double()
    pictures = torch.randn(2, 3, height, width, dtype=torch.float64)
    product = PatchEmbedding(5, 4).double()
    product.load_state_dict(convolution.state_dict())
    found, expected = product(pictures), convolution(pictures).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), tuple(convolution.parameters()))
    for one, other in zip(torch.autograd.grad((found * weights).sum(), tuple(product.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_norm_is_cast_once_for_all_the_products_behind_it():
    torch.manual_seed(0)
    plain, norm = nn.LayerNorm(8, eps=1e-6), ProductNorm(8)
    nn.init.normal_(plain.weight)
    norm.load_state_dict(plain.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(norm(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, plain(x).bfloat16())
    assert {type(module) for module in VisionTower(SMALL, 24).modules() if isinstance(module, nn.LayerNorm)} == {ProductNorm}
