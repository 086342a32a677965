"""Encoder of pictures to prefix tokens: SigLIP's tower without pooling, and a linear projector.

Owns: the tower, its initial weights. Does not know: cameras, prompts, the decoder's sizes but one width.
Source: Zhai et al. 2023 (arXiv 2303.15343), as PaliGemma's weights define it; tests hold it to transformers' class (docs/adr/0025).

    picture -> patches -> linear, + positions -> [ x + attention(norm(x)), x + MLP(norm(x)) ] per layer -> norm -> projector

Shape letters: B pictures, V tokens of a picture, D tower width, E backbone width, P patch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pi0fm.models.attention import attend_pictures
from pi0fm.models.config import Gelu, VisionConfig
from pi0fm.models.initial import ConstantInit, Initial, NormalInit, UniformInit
from pi0fm.models.layers import Linear, at_least_float32, by_kernels, product_dtype, recomputed, recomputes, run_layer, writes


class PatchEmbedding(nn.Module):
    """Convolution without overlap as one matrix product: in bfloat16 an eighth of its time on a CPU (docs/LOG.md).

    It has the convolution's parameters, weight [D, 3, P, P] and bias [D].
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, 3, patch_size, patch_size)), nn.Parameter(torch.empty(width))

    def forward(self, pictures: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B V D"]:
        """Embed each patch, row by row of the picture."""
        side = self.weight.shape[-1]
        grid = pictures.to(self.weight.dtype).unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, rows, P, columns, P]
        return F.linear(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


class ProductNorm(nn.LayerNorm):
    """Layer norm whose output has the type of the products after it, which autocast would cast for each of them."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Norm x. A sharded network may give the parameters in the type of the products."""
        normed = F.layer_norm(x, self.normalized_shape, at_least_float32(self.weight), at_least_float32(self.bias), self.eps)
        return normed.to(product_dtype(x))


class VisionMLP(nn.Module):
    """`fc2(gelu(fc1(x)))`. gelu: see GatedMLP."""

    def __init__(self, width: int, hidden_width: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden_width), Linear(hidden_width, width)
        self.gelu, self.recompute = gelu, False

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Map x to the same shape."""
        if self._takes_gelu_along(x):
            hidden = torch._addmm_activation(self.fc1.bias, x.flatten(0, -2), self.fc1.weight.t(), use_gelu=True)
            return self.fc2(hidden.view(*x.shape[:-1], -1))
        hidden = self.fc1(x)
        return recomputed(self._activated, hidden) if self.recompute and recomputes(self) else self._activated(hidden)

    def _takes_gelu_along(self, x: Tensor) -> bool:
        """Whether a GPU's product applies gelu to what it writes."""
        plain = type(self.fc1) is Linear and self.gelu == "tanh" and self.fc1.weight.dtype == x.dtype
        return plain and by_kernels(self, x) and writes(x)

    def _activated(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden, approximate=self.gelu))


class VisionLayer(nn.Module):
    """One layer: the tower's unit of activation checkpointing.

    Rows of `qkv` are the query's, the key's and the value's, in that order; heads are rows of each.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.recompute, self.num_heads = False, config.num_heads
        self.attention_norm = ProductNorm(config.width)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.mlp_norm = ProductNorm(config.width)
        self.mlp = VisionMLP(config.width, config.mlp_width, config.gelu)

    def forward(self, x: Float[Tensor, "B V D"]) -> Float[Tensor, "B V D"]:
        """Run the layer without a mask: every token of a picture sees every other."""
        qkv = self.qkv(self.attention_norm(x))
        x = x + (recomputed(self._attention, qkv) if self.recompute and recomputes(self) else self._attention(qkv))
        return x + self.mlp(self.mlp_norm(x))

    def _attention(self, qkv: Tensor) -> Tensor:
        heads = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(attend_pictures(*heads.unbind()).transpose(1, 2).flatten(2))


class VisionTower(nn.Module):
    """SigLIP, then a projection to the backbone's width."""

    def __init__(self, config: VisionConfig, backbone_width: int) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.patch_embedding = PatchEmbedding(config.width, config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(config.tokens_per_image, config.width))
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))
        self.final_norm = ProductNorm(config.width)
        self.projector = Linear(config.width, backbone_width)

    def forward(self, pictures: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B V E"]:
        """Encode pictures in [-1, 1] to tokens, which unlike word embeddings are not scaled."""
        x = self.patch_embedding(pictures) + self.position_embedding
        for layer in self.layers:
            x = run_layer(layer, self.activation_checkpointing, x)
        return self.projector(self.final_norm(x))

    def initial_values(self) -> dict[str, Initial]:
        """Variances of transformers' class; the projector keeps torch's."""
        patch, (_, width) = self.patch_embedding, self.position_embedding.shape
        found: dict[str, Initial] = {
            # deviation of a normal whose truncation at 2 deviations has the fan-in's variance; untruncated, it learns faster (docs/LOG.md)
            "patch_embedding.weight": NormalInit(patch.weight[0].numel() ** -0.5 / 0.87962566),
            "patch_embedding.bias": ConstantInit(0.0),
            "position_embedding": NormalInit(width**-0.5),
        }
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, VisionLayer)
            hidden = layer.mlp.fc1.out_features
            square, wide = UniformInit((3 / width) ** 0.5), UniformInit((6 / (width + hidden)) ** 0.5)  # Xavier's
            weights = {"qkv": square, "out": square, "mlp.fc1": wide, "mlp.fc2": wide}
            biases = {"qkv": ConstantInit(0.0), "out": ConstantInit(0.0), "mlp.fc1": NormalInit(1e-6), "mlp.fc2": NormalInit(1e-6)}
            found |= {f"layers.{number}.{name}.weight": initial for name, initial in weights.items()}
            found |= {f"layers.{number}.{name}.bias": initial for name, initial in biases.items()}
        return found
