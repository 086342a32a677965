"""One softmax attention for every tower, by the fastest kernel of the device.

Owns: the choice of kernel. Does not know: what the tokens are, who made the mask.
On a GPU this is scaled_dot_product_attention. On a CPU its fused kernel is slow at these sizes, and slowest in bfloat16 (docs/adr/0002):
there the few key heads are not expanded; the query heads that share one are folded into its rows, so that each product is one large
matrix product:

    query [B, N, T, K]  ->  [B * kv heads, (N / kv heads) * T, K]  @  key [B * kv heads, K, J]

Shape letters: B batch, N heads, T queries, J keys, K head dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def attend(
    query: Float[Tensor, "B N T K"], key: Float[Tensor, "B kv J K"], value: Float[Tensor, "B kv J K"], mask: Tensor | None
) -> Float[Tensor, "B N T K"]:
    """softmax(query key^T / sqrt(K)) value. N is a multiple of kv.

    mask: [B, 1, T or 1, J], boolean with True where a key may be seen, or what `additive` made of it; None when all are seen.
    """
    if query.device.type == "cpu":
        return _folded(query, key, value, mask)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=key.shape[1] != query.shape[1])


def additive(mask: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """0 where the mask is True, minus infinity elsewhere: made once for all the layers that share a mask."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def siglip_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """`attend` in the form that transformers' attention interface calls: heads last but one on return, no weights."""
    if attention_mask is not None:
        raise ValueError("the vision tower takes no attention mask: every token of a picture is real")
    return attend(query, key, value, None).transpose(1, 2), None


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    rows = query.reshape(batch * kv_heads, groups * num_queries, head_dim)
    columns = key.flatten(0, 1).transpose(1, 2)
    # the scale and the mask ride along in the product: a pass over the scores each, saved
    if mask is None:
        scores = torch.baddbmm(rows.new_empty(()), rows, columns, beta=0.0, alpha=head_dim**-0.5)
    else:
        bias = (additive(mask) if mask.dtype == torch.bool else mask).to(rows.dtype)
        wide = bias[:, :, None].expand(batch, kv_heads, groups if bias.shape[2] > 1 else 1, bias.shape[2], num_keys)
        scores = torch.baddbmm(wide.reshape(batch * kv_heads, -1, num_keys), rows, columns, alpha=head_dim**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view(batch, heads, num_queries, head_dim)
