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
    query: Float[Tensor, "B N T K"],
    key: Float[Tensor, "B kv J K"],
    value: Float[Tensor, "B kv J K"],
    mask: Bool[Tensor, "B #1 #T J"] | None,
) -> Float[Tensor, "B N T K"]:
    """softmax(query key^T / sqrt(K)) value; True in the mask where a key may be seen. N is a multiple of kv."""
    if query.device.type == "cpu":
        return _folded(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=key.shape[1] != query.shape[1])


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
    rows = (query * head_dim**-0.5).reshape(batch * kv_heads, groups * num_queries, head_dim)
    scores = torch.bmm(rows, key.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
        scores = (scores.view(batch, heads, num_queries, num_keys) + bias).view_as(scores)
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view(batch, heads, num_queries, head_dim)
