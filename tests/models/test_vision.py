"""Pictures to tokens: the patches' product is the convolution it stands for."""

import pytest
import torch
from torch import nn

from pi0fm.models.vision import PatchEmbedding, VisionConfig, VisionTower


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
