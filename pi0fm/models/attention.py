"""Softmax attention of every tower, by the fastest kernel of the device.

Owns: the choice of kernel. Does not know: what the tokens are, who made the mask.
On a GPU this is scaled_dot_product_attention. On a CPU the few key heads are not expanded, which would copy keys and values for every
query head; the query heads that share one are folded into its rows:

    query [B, N, T, K]  ->  [B * kv heads, (N / kv heads) * T, K]  @  key [B * kv heads, K, J]

    few keys     two large matrix products with a softmax between them: the fused kernel is slow there, slowest backwards in bfloat16
    many keys    torch's fused kernel on the same rows: scores that outgrow the cache would be written and read three times

Forward and backward on an Intel Xeon with AMX, 104 keys, bfloat16: products 11.5 ms, torch's math backend 41, fused 104; other sizes are
in docs/LOG.md, 2026-11-22. A row of the mask with no True would be NaN: an observation has one picture at least and a prompt.

Shape letters: B batch, N heads, T queries, J keys, K head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# Sizes from which the fused kernel is faster on a CPU; its backward pass is slow in bfloat16. A velocity must be equal with and without a
# gradient, so that a score changes no action: only the pictures' tower, which no gradient of an action reaches, may treat them differently.
FUSED_KEYS, FUSED_KEYS_BFLOAT16, FUSED_ROWS_BFLOAT16 = 192, 512, 1024


def attend(
    query: Float[Tensor, "B N T K"], key: Float[Tensor, "B kv J K"], value: Float[Tensor, "B kv J K"], mask: Tensor | None
) -> Float[Tensor, "B N T K"]:
    """Compute softmax(query key^T / sqrt(K)) value. N is a multiple of kv.

    mask: [B, 1, T or 1, J], boolean with True where a key may be seen, or as converted by `additive`; None when all are seen.
    """
    if query.device.type == "cpu":
        narrow = query.dtype == torch.bfloat16
        few = narrow and query.shape[1] * query.shape[2] < FUSED_ROWS_BFLOAT16 * key.shape[1]  # a chunk's, not a prefix's
        return _folded(query, key, value, mask, None if few else FUSED_KEYS_BFLOAT16 if narrow else FUSED_KEYS)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=key.shape[1] != query.shape[1])


def additive(mask: Bool[Tensor, "*n"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*n"]:
    """Convert a mask to 0 where it is True and minus infinity elsewhere, once for all layers that share it. dtype: of their queries."""
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, float("-inf"))


def attend_pictures(
    query: Float[Tensor, "B N T K"], key: Float[Tensor, "B N T K"], value: Float[Tensor, "B N T K"]
) -> Float[Tensor, "B N T K"]:
    """`attend` for the pictures' tower, which may take the fused kernel earlier where no gradient is needed."""
    if query.device.type == "cpu" and not torch.is_grad_enabled():
        return _folded(query, key, value, None, FUSED_KEYS)
    return attend(query, key, value, None)


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, fused_keys: int | None) -> Tensor:
    """Attend with query heads folded into rows.

    fused_keys: least number of keys for the fused kernel, None for never; unused in float64, which supports derivatives of any order.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    fused = fused_keys is not None and num_keys >= fused_keys and query.dtype != torch.float64
    if fused and groups == 1 and mask is None:  # nothing to fold, and the kernel takes heads as they are
        return _fused(query, key, value, None)
    rows, keys, values = query.reshape(batch * kv_heads, groups * num_queries, head_dim), key.flatten(0, 1), value.flatten(0, 1)
    bias = None
    if mask is not None:
        bias = (additive(mask) if mask.dtype == torch.bool else mask).to(rows.dtype)
        bias = bias[:, :, None].expand(batch, kv_heads, groups if bias.shape[2] > 1 else 1, bias.shape[2], num_keys)
        bias = bias.reshape(batch * kv_heads, -1, num_keys)
    if fused:
        attended = _fused(rows[:, None], keys[:, None], values[:, None], None if bias is None else bias[:, None])
    else:
        attended = _products(rows, keys, values, bias)
    return attended.view(batch, heads, num_queries, head_dim)


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _products(rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    # scale and mask are part of the product, which saves a pass over the scores each
    start, beta = (rows.new_empty(()), 0.0) if bias is None else (bias, 1.0)
    scores = torch.baddbmm(start, rows, keys.transpose(1, 2), beta=beta, alpha=rows.shape[-1] ** -0.5)
    return torch.bmm(_softmax(scores), values)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys. In bfloat16 torch takes those beyond the last multiple of 32 one by one: with few keys, most of its time."""
    keys = scores.shape[-1]
    if scores.dtype != torch.bfloat16 or keys % 32 < 8 or keys >= 128 or torch.compiler.is_compiling():
        return scores.softmax(dim=-1)
    return _WideSoftmax.apply(scores) if torch.is_grad_enabled() else _wide_softmax(scores)


def _wide_softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(dim=-1).to(scores.dtype)


class _WideSoftmax(torch.autograd.Function):
    """Softmax in float32, rounded once; only the rounded result is kept for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor) -> Tensor:
        return _wide_softmax(scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)
