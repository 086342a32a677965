"""Layers of pi0 on a GPU without a gradient: few launches per layer, and fewer bytes for the few rows of a chunk.

Owns: the order in which a layer launches the kernels of models/kernels.py, the sizes of their tiles. Does not know: what a token stands
for, who solves the flow. `with_fused_layers` replaces the tower and the decoder by `FusedVision` and `FusedDecoder`, which have the
same methods.

    x, y -> [ x + gate * y, norm ] -> qkv -> [ rotation; keys and values into the cache ] -> attention -> out product -> y
    x, y -> [ x + gate * y, norm ] -> gate and up -> [ gelu(gate) * up ] -> down product -> y

A sampler reads every matrix of the action expert once per step, for 50 rows: the time is that of memory and of launches. Up to ROWS rows
each product has a separate kernel, which also computes the operations after it on chip:

    [ qkv product, rotation, cache ]    [ gate and up products, gelu ]    [ a slice of out or down along K each ] -> y in parts

Shape letters: B batch, T tokens, M = B T rows, D width, F hidden width, N heads, K head dim, J keys, P prefix tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0fm.models import kernels
from pi0fm.models.attention import additive
from pi0fm.models.joint_decoder import JointDecoder, JointDecoderLayer, Stream, joined_chunks
from pi0fm.models.layers import NORM_EPSILON, AdaptiveRMSNorm, Modulation, RMSNorm, Rotation, rotation
from pi0fm.models.pi0 import FlowTime, Pi0
from pi0fm.models.prefix_cache import KeyValue, Modulations, PrefixCache, with_space
from pi0fm.models.vision import VisionLayer, VisionTower
from pi0fm_client.errors import ConfigError

# Sizes of tiles: the fastest of 15 choices for a step of released sizes on an H100 (docs/gpu.md)
ROWS = 64  # of a product's tile: the fewest that a Hopper matrix instruction takes
COLUMNS = 32  # of a product's tile
HALF = 16  # columns of either half of a head in the rotated product
SLICES = 2  # of K, of the products that have few columns
DEPTH = 128  # of K at a time
ASKING, KEYS = 32, 128  # rows and keys of a slice of the attention
PRODUCT: Any = {"num_warps": 4, "num_stages": 4}
LINE = 128  # bytes that one prefetch brings


class Cached(NamedTuple):
    """Buffers [B, kv, J, K] of a layer's keys and values, which its tokens write from `first` on; those before are there already."""

    key: Tensor
    value: Tensor
    first: int


@dataclass(frozen=True)
class FusedContext:
    """Inputs of the action tokens from prefix and state. buffers: keys and values of each layer; rotary: of state and actions.

    state: tokens whose keys and values are not yet in the buffers: the first step runs them with the actions, which saves a pass over the
    weights, and empties the list. chunks: as in ActionContext.
    """

    buffers: tuple[KeyValue, ...]
    rotary: Rotation
    bias: Tensor
    prefix: int
    state: list[Tensor]
    states: int
    chunks: int


@final
class FusedDecoder(nn.Module):
    """`JointDecoder.encode` and `context` by these kernels, and the layers of a velocity; equal results up to rounding.

    space: number of tokens that may follow the prefix, for which every cache has space from the start.
    """

    def __init__(self, decoder: JointDecoder, space: int) -> None:
        super().__init__()
        self.layers, self.final_norm, self.head_dim, self.modulations = (
            decoder.layers,
            decoder.final_norm,
            decoder.head_dim,
            decoder.modulations,
        )
        self._space = space

    def encode(self, prefix: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"], whole: bool = False) -> PrefixCache:
        """Encode as JointDecoder does; the cache's buffers have `space` after the prefix."""
        batch, tokens, _ = prefix.shape
        streams = [layer.backbone for layer in self.layers if isinstance(layer, JointDecoderLayer)]
        matrix, kv = streams[0].qkv.weight, streams[0].num_kv_heads
        buffers = matrix.new_empty(len(streams), 2, batch, kv, tokens + self._space, self.head_dim)
        rotary = rotation(mask.long().cumsum(dim=1) - 1, self.head_dim)
        bias = None if whole else additive(mask[:, None, None]).to(matrix.dtype)

        def attend(query: Tensor, cached: Cached) -> Tensor:
            key, value = cached.key[:, :, :tokens], cached.value[:, :, :tokens]
            found = F.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, attn_mask=bias, enable_gqa=key.shape[1] != query.shape[2]
            )
            return found.transpose(1, 2).flatten(2)

        x, y = prefix.contiguous(), None
        for stream, buffer in zip(streams, buffers, strict=True):
            x, y, _ = _layer(stream, x, y, None, (None, None), rotary, Cached(buffer[0], buffer[1], 0), attend, few=False)
        return PrefixCache(tuple(KeyValue(buffer[0], buffer[1]) for buffer in buffers), mask, mask.sum(dim=1), whole)

    def context(self, cache: PrefixCache, state: Float[Tensor, "B Z D"] | None, num_actions: int, chunks: int = 1) -> FusedContext:
        """Make the context as JointDecoder does; nothing is run before the first step."""
        mask, states, layers = cache.mask, self._space - num_actions, cache.layers
        more = (chunks - 1) * num_actions  # tokens for which `encode` left no space
        if more:
            layers = tuple(buffer.seen for buffer in with_space(layers, more)[0])
        seen = torch.cat((mask, mask.new_ones(len(mask), self._space + more)), dim=1)
        steps = torch.arange(self._space, device=mask.device)
        steps = torch.cat((steps[:states], steps[states:].repeat(chunks)))
        rotary = rotation(mask.sum(dim=1)[:, None] + steps, self.head_dim)
        pending = [] if state is None else [state]
        return FusedContext(layers, rotary, additive(seen[:, None, None]), mask.shape[1], pending, states, chunks)

    def run(
        self, actions: Float[Tensor, "BN H D"], context: FusedContext, made: Modulations | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Run all layers: x, parts and gate, whose sum is the residual stream, and the number of tokens before the actions."""
        each, actions = actions.shape[1], joined_chunks(actions, context.chunks)
        alone, first, rotary = 0, context.prefix + context.states, _rows_from(context.rotary, context.states)
        if context.state:
            state = context.state.pop()
            alone, first, rotary = state.shape[1], context.prefix, context.rotary
            actions = torch.cat((state.to(actions.dtype), actions), dim=1)
        x, y, gate = actions.contiguous(), None, None
        few = actions.shape[0] * actions.shape[1] <= ROWS
        for index, (layer, cached) in enumerate(zip(self.layers, context.buffers, strict=True)):
            assert isinstance(layer, JointDecoderLayer)
            by = (None, None) if made is None else made.layers[index]
            attend = partial(attend_in_slices, bias=context.bias, alone=alone, each=each)
            x, y, gate = _layer(layer.action_expert, x, y, gate, by, rotary, Cached(cached.key, cached.value, first), attend, few)
        return x, y, gate, alone


@final
class FusedPi0(Pi0):
    """Network for inference by these kernels, with the weights of another network."""

    def __init__(self, model: Pi0, decoder: JointDecoder) -> None:
        nn.Module.__init__(self)
        self.config = model.config
        for name, child in model.named_children():
            setattr(self, name, child)
        space = model.config.action_horizon + (model.config.state_input == "token")
        self.vision, self.decoder = FusedVision(model.vision), FusedDecoder(decoder, space)  # type: ignore[assignment]
        self.eval()

    def velocity(self, cache: PrefixCache, state: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Raise ConfigError: `CachedVelocity` calls it where rows of one observation may have different times."""
        raise ConfigError(
            "several chunks from one prefix need a solver of fixed steps without noise where a network with adaptive norms is compiled; "
            "type --solver euler, or --compile off"
        )

    def action_velocity(self, x_t: Float[Tensor, "BN H A"], time: FlowTime, context: Any) -> Float[Tensor, "BN H A"]:
        """Evaluate the velocity as Pi0 does."""
        decoder = cast(FusedDecoder, self.decoder)
        actions, condition = self._actions(x_t, time.embedded)
        made = time.modulations
        if made is None and condition is not None:
            made = decoder.modulations(condition)
        x, parts, gate, before = decoder.run(actions, context, made)
        assert parts is not None
        found = head(x, parts, gate, decoder.final_norm, None if made is None else made.final, self.action_out, before)
        return found.view(x_t.shape)


def _layer(
    stream: Stream, x: Tensor, y: Tensor | None, gate: Tensor | None, by: tuple[Modulation | None, Modulation | None], rotary: Rotation,
    cached: Cached, attend: Callable[[Tensor, Cached], Tensor], few: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Run one layer of one stream. x + gate * y is the residual stream, before and after; y may be in parts, None is 0."""
    dtype = stream.qkv.weight.dtype
    x, normed = add_norm(x, y, gate, stream.attention_norm, by[0], dtype)
    query = rotated_qkv(normed, stream, rotary, cached, few)
    if not stream.num_heads:  # the last layer of the prefix: only its keys and values are read
        return x, None, None
    x, normed = add_norm(
        x, product(attend(query, cached), stream.out, few), None if by[0] is None else by[0].gate, stream.mlp_norm, by[1], dtype
    )
    hidden = gated_product(normed, stream.mlp.gate_up, stream.mlp.gelu, few)
    return x, product(hidden, stream.mlp.down, few), None if by[1] is None else by[1].gate


def add_norm(
    x: Tensor, parts: Tensor | None, gate: Tensor | None, norm: nn.Module, by: Modulation | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute x [B, T, D] + gate * sum of the parts, float32 (x itself without parts), and its norm in `dtype`."""
    batch, tokens, width = x.shape
    total = x if parts is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    given, strides, flags = _norm_operands(x, parts, gate, norm, by)
    kernels.add_norm[(batch * tokens,)](
        *given, total, normed, batch * tokens, _sharing(tokens, by), *strides, BLOCK=triton.next_power_of_2(width), **flags
    )
    return total, normed


def rotated_qkv(x: Float[Tensor, "B T D"], stream: Stream, by: Rotation, cached: Cached, few: bool) -> Float[Tensor, "B T N K"]:
    """Compute rotated queries, and write the tokens' keys and values to the cache."""
    batch, tokens, width = x.shape
    kv, capacity, head_dim = cached.key.shape[1:]
    heads = stream.num_heads
    query = x.new_empty(batch, tokens, heads, head_dim)
    places = (by.cos, by.sin, query, cached.key, cached.value, batch * tokens, tokens, cached.first, capacity)
    if few:
        kernels.rotated_qkv[(heads + 2 * kv, head_dim // 2 // HALF)](
            x, stream.qkv.weight, *places,
            D=width, HEADS=heads, KV=kv, K=head_dim, ROWS=ROWS, HALF=HALF, DEPTH=min(DEPTH, width), **_lines(stream.qkv.weight, width),
            **PRODUCT, **_overlap(x),
        )  # fmt: skip
    else:
        whole = heads + 2 * kv
        kernels.rotated_heads[(triton.cdiv(batch * tokens, 8), whole)](
            F.linear(x, stream.qkv.weight), *places, HEADS=heads, KV=kv, K=head_dim, ROWS=8, HEADS_IN=whole
        )
    return query


def attend_in_slices(query: Float[Tensor, "B T N K"], cached: Cached, bias: Tensor, alone: int, each: int) -> Float[Tensor, "B T NK"]:
    """Attend from all rows to the cache up to the rows' own keys. bias: [B, 1, 1, J] float32; alone, each: `kernels.attend`."""
    batch, tokens, heads, head_dim = query.shape
    kv, capacity = cached.key.shape[1:3]
    keys = cached.first + tokens
    rows, cuts = tokens * heads // kv, triton.cdiv(keys, KEYS)
    sums = query.new_empty(batch * kv, cuts, rows, head_dim, dtype=torch.float32)
    largest, totals = (query.new_empty(batch * kv, cuts, rows, dtype=torch.float32) for _ in range(2))
    kernels.attend[(triton.cdiv(rows, ASKING), cuts, batch * kv)](
        query, cached.key, cached.value, bias, sums, largest, totals, tokens, keys, capacity, bias.shape[-1], alone, each, head_dim**-0.5,
        HEADS=heads, KV=kv, K=head_dim, ROWS=ASKING, KEYS=KEYS, num_warps=8, num_stages=1, **_overlap(query),
    )  # fmt: skip
    joined = query.new_empty(batch, tokens, heads * head_dim)
    flags: Any = {"HEADS": heads, "KV": kv, "K": head_dim, "CUTS": triton.next_power_of_2(cuts)} | _overlap(query)
    kernels.join[(rows, batch * kv)](sums, largest, totals, joined, tokens, cuts, **flags)
    return joined


def product(x: Float[Tensor, "B T D"], linear: nn.Linear, few: bool) -> Float[Tensor, "parts B T N"]:
    """Multiply x by the matrix, in parts to be summed: SLICES of them for few rows, else one."""
    if not few:
        return F.linear(x, linear.weight)[None]
    columns, width = linear.weight.shape
    part = width // SLICES
    parts = x.new_empty(SLICES, *x.shape[:2], columns, dtype=torch.float32)
    kernels.sliced_product[(columns // COLUMNS, SLICES)](
        x, linear.weight, parts, x.shape[0] * x.shape[1],
        N=columns, D=width, SLICE=part, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=min(DEPTH, part), **_lines(linear.weight, part), **PRODUCT,
        **_overlap(x),
    )  # fmt: skip
    return parts


def gated_product(x: Float[Tensor, "B T D"], linear: nn.Linear, gelu: str, few: bool) -> Float[Tensor, "B T F"]:
    """Compute `gelu(gate) * up` of the two halves of one product."""
    hidden, width = linear.out_features // 2, linear.in_features
    out = x.new_empty(*x.shape[:2], hidden)
    rows = x.shape[0] * x.shape[1]
    if few:
        kernels.gated_product[(hidden // COLUMNS,)](
            x, linear.weight, out, rows, F=hidden, D=width, TANH=gelu == "tanh", ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=min(DEPTH, width),
            **_lines(linear.weight, width), **PRODUCT, **_overlap(x),
        )  # fmt: skip
    else:
        kernels.gated[(rows, triton.cdiv(hidden, 2048))](
            F.linear(x, linear.weight), out, F=hidden, TANH=gelu == "tanh", BLOCK=2048, num_warps=8
        )
    return out


def head(
    x: Tensor, parts: Tensor, gate: Tensor | None, norm: nn.Module, by: Modulation | None, linear: nn.Linear, first: int
) -> Float[Tensor, "B H A"]:
    """Apply the final norm, and negate the head of released weights, which points from data to noise; for tokens from `first` on."""
    batch, tokens, _ = x.shape
    out = torch.empty(batch, tokens - first, linear.out_features, dtype=torch.float32, device=x.device)
    given, strides, flags = _norm_operands(x, parts, gate, norm, by)
    shape = (batch * tokens, _sharing(tokens, by), first)
    kernels.head[(batch * (tokens - first),)](
        *given, linear.weight, linear.bias, out, *shape, *strides, A=linear.out_features, num_warps=8, **flags
    )
    return out


@final
class FusedVision(nn.Module):
    """`VisionTower.forward` by these kernels."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.patch_embedding, self.position_embedding, self.layers = tower.patch_embedding, tower.position_embedding, tower.layers
        self.final_norm, self.projector = tower.final_norm, tower.projector

    def forward(self, pictures: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B V E"]:
        """Encode pictures in [-1, 1] to tokens."""
        x, y = (self.patch_embedding(pictures) + self.position_embedding).contiguous(), None
        for layer in self.layers:
            assert isinstance(layer, VisionLayer)
            dtype = layer.qkv.weight.dtype
            x, normed = add_layer_norm(x, y, layer.attention_norm, dtype)
            query, key, value = layer.qkv(normed).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value)
            x, normed = add_layer_norm(x, layer.out(attended.transpose(1, 2).flatten(2)), layer.mlp_norm, dtype)
            y = layer.mlp(normed)
        return cast(Tensor, self.projector(add_layer_norm(x, y, self.final_norm, self.projector.weight.dtype)[1]))


def add_layer_norm(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute x [B, V, D] + y, float32 (x itself without y), and its norm in `dtype`."""
    width = x.shape[-1]
    total = x if y is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    kernels.add_layer_norm[(x.numel() // width,)](
        x, x if y is None else y, norm.weight, norm.bias, total, normed,
        D=width, ADDED=y is not None, EPSILON=norm.eps, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return total, normed


def with_fused_layers(model: Pi0) -> Pi0 | None:
    """Make a `FusedPi0` with the same weights, for inference; None where a size does not fit."""
    config, decoder = model.config, model.decoder
    if not isinstance(decoder, JointDecoder) or (config.state_input == "token" and config.time_conditioning == "adaptive_norm"):
        return None
    return FusedPi0(model, decoder) if fits(decoder) and config.action_dim in (16, 32, 64, 128) else None


def fits(decoder: JointDecoder) -> bool:
    """Whether the kernels support a decoder's sizes: whole tiles, matrices in `nn.Linear`'s layout."""
    layer = decoder.layers[0]
    assert isinstance(layer, JointDecoderLayer)
    stream = layer.action_expert

    def whole(size: int, slices: int) -> bool:
        return size % slices == 0 and size // slices % min(DEPTH, size // slices) == 0 and min(DEPTH, size // slices) in (16, 32, 64, 128)

    width, attended, hidden, head_dim = stream.qkv.in_features, stream.out.in_features, stream.mlp.down.in_features, stream.head_dim
    products = whole(width, 1) and whole(attended, SLICES) and whole(hidden, SLICES)
    return products and triton.next_power_of_2(width) == width and hidden % COLUMNS == 0 and head_dim in (32, 64, 128, 256)


def _overlap(x: Tensor) -> dict[str, Any]:
    """Whether a kernel may begin before its predecessor ends (programmatic dependent launch, Hopper and later)."""
    overlaps = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}


def _lines(matrix: Tensor, columns: int) -> dict[str, int]:
    """Number of columns to prefetch, and number of columns in a cache line."""
    per_line = LINE // matrix.element_size()
    lines = columns // per_line
    return {"SPAN": columns if columns % per_line == 0 and lines & (lines - 1) == 0 else 0, "PER_LINE": per_line}


def _norm_operands(
    x: Tensor, parts: Tensor | None, gate: Tensor | None, norm: nn.Module, by: Modulation | None
) -> tuple[tuple[Tensor, ...], tuple[int, int, int], dict[str, Any]]:
    """Operands of the kernels' residual sum and norm: tensors, the last three's strides between rows of the batch, and sizes."""
    assert isinstance(norm, RMSNorm | AdaptiveRMSNorm)
    factor, shift = (cast(Tensor, norm.scale), cast(Tensor, norm.scale)) if by is None else (by.factor, by.shift)
    given = (x, x if parts is None else parts, x if gate is None else gate, factor, shift)
    strides = (_stride(gate), _stride(None if by is None else by.factor), _stride(None if by is None else by.shift))
    sizes = {"D": x.shape[-1], "SLICES": 0 if parts is None else len(parts), "GATED": gate is not None, "ADAPTIVE": by is not None}
    return given, strides, sizes | {"EPSILON": NORM_EPSILON} | _overlap(x)


def _stride(x: Tensor | None) -> int:
    """Stride between rows of the batch, or between tokens with different times; 0 where one row serves all."""
    if x is None or x.shape[:2] == (1, 1):
        return 0
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _sharing(tokens: int, by: Modulation | None) -> int:
    """Number of successive tokens that share a flow time. Where it is 1, no token precedes the actions (`first` is 0)."""
    return tokens if by is None or by.factor.shape[1] == 1 else 1


def _rows_from(rotary: Rotation, first: int) -> Rotation:
    return Rotation(*(angle[:, :, first:].contiguous() for angle in rotary))
