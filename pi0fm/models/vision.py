"""Pictures to prefix tokens: transformers' SigLIP tower and a linear projector.

Owns: the tower's configuration and its call. Does not know: cameras, prompts, the decoder's sizes but one width.
Shape letters: B pictures, V tokens of a picture, D backbone width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pi0fm.errors import ConfigError
from pi0fm.models.attention import siglip_attention
from pi0fm.models.layers import product_dtype


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; a picture gives (image_size / patch_size)^2 tokens."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    gelu: Literal["tanh", "none"] = "tanh"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size must be a multiple of patch_size, found {self.image_size} and {self.patch_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"the vision width must be a multiple of its heads, found {self.width} and {self.num_heads}")

    @property
    def tokens_per_image(self) -> int:
        """V."""
        return (self.image_size // self.patch_size) ** 2


class PatchEmbedding(nn.Module):
    """What a convolution without overlap computes, as one matrix product: in bfloat16 an eighth of its time on a CPU (docs/LOG.md).

    It has the convolution's own parameters, weight [D, 3, P, P] and bias [D], under their names.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, pictures: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B D rows columns"]:
        """One column of numbers for each patch."""
        side = self.weight.shape[-1]
        grid = pictures.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, rows, P, columns, P]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ProductNorm(nn.LayerNorm):
    """A layer's norm with its parameters, its output in the type of the products behind it: autocast would cast it for each of them."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(list(norm.normalized_shape), norm.eps)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """The normed input."""
        return super().forward(x).to(product_dtype(x))


class VisionTower(nn.Module):
    """SigLIP without pooling, then a projection to the backbone's width."""

    def __init__(self, config: VisionConfig, backbone_width: int) -> None:
        super().__init__()
        # four seconds of imports that whoever only reads a configuration does without
        from transformers import AttentionInterface, SiglipVisionConfig, SiglipVisionModel

        AttentionInterface.register("pi0fm", siglip_attention)
        siglip = SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
            vision_use_head=False,
            attn_implementation="pi0fm",
        )
        self.tower = SiglipVisionModel(siglip)
        embeddings = self.tower.vision_model.embeddings
        embeddings.patch_embedding = PatchEmbedding(embeddings.patch_embedding)
        for layer in self.tower.vision_model.encoder.layers:
            layer.layer_norm1, layer.layer_norm2 = ProductNorm(layer.layer_norm1), ProductNorm(layer.layer_norm2)
        self.projector = nn.Linear(config.width, backbone_width)

    def reset_buffers(self) -> None:
        """Make anew what no checkpoint holds: a model that was laid out without memory has nothing in its buffers."""
        embeddings = self.tower.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]

    def checkpoint_activations(self) -> None:
        """In training, keep only what enters each layer; see `Pi0.checkpoint_activations`."""
        self.tower.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    def forward(self, pictures: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B V D"]:
        """pictures in [-1, 1] to tokens; unlike word embeddings they are not scaled."""
        return self.projector(self.tower(pixel_values=pictures).last_hidden_state)
