"""Pictures to tokens: the patches' product is the convolution it stands for."""

import pytest
import torch
from torch import nn

from pi0fm.models.vision import PatchEmbedding, ProductNorm, VisionConfig, VisionTower


@pytest.mark.parametrize(("height", "width"), [(12, 12), (8, 16)])
def test_patches_are_embedded_as_by_the_convolution(height, width):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 4, stride=4).double()
    pictures = torch.randn(2, 3, height, width, dtype=torch.float64)
    product = PatchEmbedding(convolution)
    found, expected = product(pictures), convolution(pictures)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), tuple(convolution.parameters()))
    for one, other in zip(torch.autograd.grad((found * weights).sum(), tuple(product.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_tower_has_the_convolutions_parameters_under_their_names():
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(width=16, depth=1, num_heads=2, mlp_width=32, patch_size=4, image_size=8), 24)
    patches = dict(tower.tower.vision_model.embeddings.patch_embedding.named_parameters())
    assert {name: tuple(parameter.shape) for name, parameter in patches.items()} == {"weight": (16, 3, 4, 4), "bias": (16,)}
    assert not any(isinstance(module, nn.Conv2d) for module in tower.modules())
    assert tower(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 24)


def test_a_layers_norm_is_cast_once_for_all_the_products_behind_it():
    torch.manual_seed(0)
    plain = nn.LayerNorm(8)
    nn.init.normal_(plain.weight)
    x, norm = torch.randn(3, 8), ProductNorm(plain)
    assert norm.weight is plain.weight and norm.bias is plain.bias
    assert torch.equal(norm(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, plain(x).bfloat16())
    tower = VisionTower(VisionConfig(width=16, depth=2, num_heads=2, mlp_width=32, patch_size=4, image_size=8), 24)
    assert [type(module) for module in tower.modules() if isinstance(module, nn.LayerNorm)] == [ProductNorm] * 4 + [nn.LayerNorm]
