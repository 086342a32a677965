"""pi0's layers on a GPU without a gradient: few launches a layer, and fewer bytes for the few rows of a chunk.

Owns: Triton kernels, the order in which a layer launches them. Does not know: what a token stands for, who solves the flow.
`with_fused_layers` puts `FusedVision` and `FusedDecoder` in the place of the tower and of the decoder; they answer the same calls.

    x, y -> [ x + gate * y, norm ] -> qkv -> [ rotation; keys and values into the cache ] -> attention -> out product -> y
    x, y -> [ x + gate * y, norm ] -> gate and up -> [ gelu(gate) * up ] -> down product -> y

A sampler reads every matrix of the action expert once a step, for fifty rows: the time is that of memory and of launches. Up to ROWS rows
each product has a kernel of its own, and what follows it is computed before it leaves the chip:

    [ qkv product, rotation, cache ]    [ gate and up products, gelu ]    [ a slice of out or down along K each ] -> y in parts

A product of few columns is split along K, so that every multiprocessor has a share; the norm that reads the parts sums them in a fixed
order. Few rows look at the keys in slices too, joined by a second kernel. Residual stream, sums and softmax are float32.

Shape letters: B batch, T tokens, M = B T rows, D width, F hidden width, N heads, K head dim, J keys, P prefix tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0fm.models.attention import additive
from pi0fm.models.joint_decoder import JointDecoder, JointDecoderLayer, Stream
from pi0fm.models.layers import NORM_EPSILON, AdaptiveRMSNorm, Modulation, RMSNorm, Rotation, rotation
from pi0fm.models.pi0 import FlowTime, Pi0
from pi0fm.models.prefix_cache import KeyValue, Modulations, PrefixCache
from pi0fm.models.vision import VisionLayer, VisionTower

# Sizes of tiles: the fastest of 15 choices for a step of released sizes on an H100 (docs/gpu.md)
ROWS = 64  # of a product's tile: the fewest that a Hopper matrix instruction takes
COLUMNS = 32  # of a product's tile
HALF = 16  # columns of either half of a head in the rotated product
SLICES = 2  # of K, of the products that have few columns
DEPTH = 128  # of K at a time
ASKING, KEYS = 32, 128  # rows and keys of a slice of the attention
PRODUCT: Any = {"num_warps": 4, "num_stages": 4}
LINE = 128  # bytes that one prefetch brings


@triton.jit
def _after_previous(PDL: tl.constexpr):
    """Let the next kernel begin, and wait for the previous one. What stands before overlaps with it, and may touch weights only."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _prefetch(matrix, row, first, STRIDE: tl.constexpr, SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr):
    """Bring columns first .. first + SPAN of these rows to the second-level cache while the previous kernel still runs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if SPAN > 0:
            place = matrix + row[:, None] * STRIDE + (first + tl.arange(0, SPAN // PER_LINE) * PER_LINE)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1];\n\tmov.u32 $0, 0;", "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit
def _dot(a, b, sum):
    return tl.dot(a, tl.trans(b), sum, input_precision="ieee")


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:  # 0.5 (1 + tanh(u)) is the logistic function of 2 u
        answer = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        answer = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return answer


@triton.jit
def _summed(x, parts, gate, place, gate_place, size, inside, SLICES: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """One row of x + gate * sum of the parts; `size` numbers from a part to the next."""
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if SLICES > 0:
        added = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(SLICES):
            added += tl.load(parts + part * size + place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added *= tl.load(gate + gate_place, mask=inside, other=0.0).to(tl.float32)
        value += added
    return value


@triton.jit
def _normed(value, factor, shift, inside, D: tl.constexpr, ADAPTIVE: tl.constexpr, EPSILON: tl.constexpr):
    """The norm of one row; `factor` and `shift` point to its scale."""
    normed = value / tl.sqrt(tl.sum(value * value) / D + EPSILON)
    scale = tl.load(factor, mask=inside, other=0.0).to(tl.float32)
    if ADAPTIVE:
        normed = normed * scale + tl.load(shift, mask=inside, other=0.0).to(tl.float32)
    else:
        normed *= 1.0 + scale
    return normed


@triton.jit
def _add_norm(
    x, parts, gate, factor, shift, sum_out, normed_out, rows, tokens, gate_stride, factor_stride, shift_stride,
    D: tl.constexpr, SLICES: tl.constexpr, GATED: tl.constexpr, ADAPTIVE: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row a program: x + gate * sum of the parts, stored, and its norm."""
    _after_previous(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    batch = row // tokens
    value = _summed(x, parts, gate, row * D + columns, batch * gate_stride + columns, rows * D, inside, SLICES, GATED, BLOCK)
    if SLICES > 0:
        tl.store(sum_out + row * D + columns, value, mask=inside)
    places = factor + batch * factor_stride + columns, shift + batch * shift_stride + columns
    normed = _normed(value, places[0], places[1], inside, D, ADAPTIVE, EPSILON)
    tl.store(normed_out + row * D + columns, normed.to(normed_out.dtype.element_ty), mask=inside)


@triton.jit
def _store_head(
    left, right, row, low, live, head, cos, sin, query, key, value, tokens, first, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Columns `low` of both halves of one head: queries, rotated, to [M, N, K]; keys, rotated, and values to the cache from `first` on."""
    if head < HEADS + KV:
        angle = row[:, None] * K + low[None, :]
        turned = left * tl.load(cos + angle, mask=live, other=0.0) + right * tl.load(sin + angle, mask=live, other=0.0)
        right = right * tl.load(cos + angle + K // 2, mask=live, other=0.0) + left * tl.load(sin + angle + K // 2, mask=live, other=0.0)
        left = turned
    dtype = key.dtype.element_ty
    if head < HEADS:
        place = (row[:, None] * HEADS + head) * K + low[None, :]
        tl.store(query + place, left.to(dtype), mask=live)
        tl.store(query + place + K // 2, right.to(dtype), mask=live)
    else:
        cached = ((row // tokens) * KV + (head - HEADS) % KV) * capacity + first + row % tokens
        place = cached[:, None] * K + low[None, :]
        if head < HEADS + KV:
            tl.store(key + place, left.to(dtype), mask=live)
            tl.store(key + place + K // 2, right.to(dtype), mask=live)
        else:
            tl.store(value + place, left.to(dtype), mask=live)
            tl.store(value + place + K // 2, right.to(dtype), mask=live)


@triton.jit
def _rotated_qkv(
    x, matrix, cos, sin, query, key, value, rows, tokens, first, capacity,
    D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, DEPTH: tl.constexpr,
    SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The product of few rows, HALF columns of each half of one head a program, and what `_store_head` does with it."""
    head, row = tl.program_id(0), tl.arange(0, ROWS)
    low = tl.program_id(1) * HALF + tl.arange(0, HALF)
    _prefetch(matrix, head * K + low, 0, D, SPAN, PER_LINE, PDL)
    _prefetch(matrix, head * K + K // 2 + low, 0, D, SPAN, PER_LINE, PDL)
    _after_previous(PDL)
    left, right = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    live = row[:, None] < rows
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        given = tl.load(x + row[:, None] * D + depth[None, :], mask=live, other=0.0)
        left = _dot(given, tl.load(matrix + (head * K + low)[:, None] * D + depth[None, :]), left)
        right = _dot(given, tl.load(matrix + (head * K + K // 2 + low)[:, None] * D + depth[None, :]), right)
    _store_head(left, right, row, low, live, head, cos, sin, query, key, value, tokens, first, capacity, HEADS, KV, K)


@triton.jit
def _rotated_heads(
    qkv, cos, sin, query, key, value, rows, tokens, first, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HEADS_IN: tl.constexpr,
):  # fmt: skip
    """The same for a product that is there: qkv [M, HEADS_IN, K], whose first HEADS are queries."""
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    low, live = tl.arange(0, K // 2), row[:, None] < rows
    place = (row[:, None] * HEADS_IN + head) * K + low[None, :]
    left = tl.load(qkv + place, mask=live, other=0.0).to(tl.float32)
    right = tl.load(qkv + place + K // 2, mask=live, other=0.0).to(tl.float32)
    _store_head(left, right, row, low, live, head, cos, sin, query, key, value, tokens, first, capacity, HEADS, KV, K)


@triton.jit
def _attend(
    query, key, value, bias, sums, largest, totals, tokens, keys, capacity, bias_stride, alone, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows (a token's heads one after the other) against KEYS keys: unnormalised sums, and the softmax's maximum and total.

    The first `alone` tokens see none of the own keys of the others.
    """
    GROUP: tl.constexpr = HEADS // KV
    _after_previous(PDL)
    cut, pair = tl.program_id(1), tl.program_id(2)
    batch, kv = pair // KV, pair % KV
    row, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
    live = row < tokens * GROUP
    asked = ((batch * tokens + row // GROUP) * HEADS + kv * GROUP + row % GROUP) * K
    seen = cut * KEYS + tl.arange(0, KEYS)
    there = seen < keys
    place = (pair * capacity + seen)[:, None] * K + depth[None, :]
    queries = tl.load(query + asked[:, None] + depth[None, :], mask=live[:, None], other=0.0)
    scores = _dot(queries, tl.load(key + place, mask=there[:, None], other=0.0), tl.zeros((ROWS, KEYS), tl.float32)) * scale
    scores += tl.load(bias + batch * bias_stride + seen, mask=there, other=0.0)[None, :]
    hidden = (row // GROUP < alone)[:, None] & (seen >= keys - tokens + alone)[None, :]
    scores = tl.where(there[None, :] & (hidden == 0), scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    values = tl.load(value + place, mask=there[:, None], other=0.0)
    found = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    line = (pair * tl.num_programs(1) + cut) * tokens * GROUP + row
    tl.store(sums + line[:, None] * K + depth[None, :], found, mask=live[:, None])
    tl.store(largest + line, top, mask=live)
    tl.store(totals + line, tl.sum(weights, 1), mask=live)


@triton.jit
def _join(
    sums, largest, totals, joined, tokens, cuts, HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, CUTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row a program: the slices of the keys weighed against each other; to [B, T, N K]."""
    _after_previous(PDL)
    GROUP: tl.constexpr = HEADS // KV
    row, pair = tl.program_id(0), tl.program_id(1)
    cut, depth = tl.arange(0, CUTS), tl.arange(0, K)
    line = (pair * cuts + cut) * tokens * GROUP + row
    top = tl.load(largest + line, mask=cut < cuts, other=float("-inf"))
    weights = tl.exp(top - tl.max(top))
    total = tl.sum(weights * tl.load(totals + line, mask=cut < cuts, other=0.0))
    found = tl.load(sums + line[:, None] * K + depth[None, :], mask=(cut < cuts)[:, None], other=0.0)
    answer = tl.sum(found * weights[:, None], 0) / total
    place = ((pair // KV * tokens + row // GROUP) * HEADS + pair % KV * GROUP + row % GROUP) * K
    tl.store(joined + place + depth, answer.to(joined.dtype.element_ty))


@triton.jit
def _sliced_product(
    x, matrix, parts, rows, N: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, D] times a slice of `matrix` [N, D] along D: float32 parts [slices, M, N]."""
    row, column, part = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    live = row[:, None] < rows
    _prefetch(matrix, column, part * SLICE, D, SPAN, PER_LINE, PDL)
    _after_previous(PDL)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SLICE, DEPTH):
        depth = part * SLICE + start + tl.arange(0, DEPTH)
        given = tl.load(x + row[:, None] * D + depth[None, :], mask=live, other=0.0)
        found = _dot(given, tl.load(matrix + column[:, None] * D + depth[None, :]), found)
    tl.store(parts + (part * rows + row)[:, None] * N + column[None, :], found, mask=live)


@triton.jit
def _gated_product(
    x, matrix, out, rows, F: tl.constexpr, D: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """gelu(x gate') * (x up') for COLUMNS hidden units; matrix [2 F, D] holds gate, then up."""
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = row[:, None] < rows
    _prefetch(matrix, column, 0, D, SPAN, PER_LINE, PDL)
    _prefetch(matrix, F + column, 0, D, SPAN, PER_LINE, PDL)
    _after_previous(PDL)
    gate, up = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        given = tl.load(x + row[:, None] * D + depth[None, :], mask=live, other=0.0)
        gate = _dot(given, tl.load(matrix + column[:, None] * D + depth[None, :]), gate)
        up = _dot(given, tl.load(matrix + (F + column)[:, None] * D + depth[None, :]), up)
    tl.store(out + row[:, None] * F + column[None, :], (_gelu(gate, TANH) * up).to(out.dtype.element_ty), mask=live)


@triton.jit
def _gate(halves, out, F: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """gelu(gate) * up of a row's two halves."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    place = halves + tl.program_id(0).to(tl.int64) * 2 * F + column
    gate, up = tl.load(place, mask=inside, other=0.0).to(tl.float32), tl.load(place + F, mask=inside, other=0.0).to(tl.float32)
    answer = _gelu(gate, TANH) * up
    tl.store(out + tl.program_id(0).to(tl.int64) * F + column, answer.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head(
    x, parts, gate, factor, shift, matrix, bias, out, rows, tokens, first, gate_stride, factor_stride, shift_stride,
    D: tl.constexpr, A: tl.constexpr, SLICES: tl.constexpr, GATED: tl.constexpr, ADAPTIVE: tl.constexpr, EPSILON: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A token a program, those from `first` on: the last residual sum, its norm, and the negated product with the head [A, D]; float32."""
    _after_previous(PDL)
    given = tokens - first
    batch = tl.program_id(0) // given
    row = batch * tokens + first + tl.program_id(0) % given
    columns, out_column = tl.arange(0, D), tl.arange(0, A)
    inside = columns < D
    value = _summed(x, parts, gate, row * D + columns, batch * gate_stride + columns, rows * D, inside, SLICES, GATED, D)
    places = factor + batch * factor_stride + columns, shift + batch * shift_stride + columns
    normed = _normed(value, places[0], places[1], inside, D, ADAPTIVE, EPSILON)
    weights = tl.load(matrix + out_column[:, None] * D + columns[None, :])
    answer = tl.sum(weights * normed[None, :], 1) + tl.load(bias + out_column)
    tl.store(out + tl.program_id(0) * A + out_column, -answer)


@triton.jit
def _add_layer_norm(
    x, y, weight, bias, sum_out, normed_out, D: tl.constexpr, ADDED: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr
):
    """A row a program: x + y, stored, and its layer norm."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(y + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_out + row * D + columns, value, mask=inside)
    centred = tl.where(inside, value - tl.sum(value) / D, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred) / D + EPSILON)
    normed = normed * tl.load(weight + columns, mask=inside, other=0.0) + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(normed_out + row * D + columns, normed.to(normed_out.dtype.element_ty), mask=inside)


class Cached(NamedTuple):
    """Where a layer's tokens put their keys and values: buffers [B, kv, J, K] from `first` on; what lies before is there already."""

    key: Tensor
    value: Tensor
    first: int


@dataclass(frozen=True)
class FusedContext:
    """What the action tokens need to know of the rest. buffers: a layer's keys and values each; rotary: of state and actions.

    state: tokens whose keys and values are not in the buffers yet: they ride along with the actions of the first step, which saves a pass
    over the weights. Emptied by it.
    """

    buffers: tuple[KeyValue, ...]
    rotary: Rotation
    bias: Tensor
    prefix: int
    state: list[Tensor]
    states: int


@final
class FusedDecoder(nn.Module):
    """`JointDecoder.encode` and `context` by these kernels, and the layers behind a velocity; the same answers up to rounding.

    space: how many tokens may follow the prefix, so that a cache has space for them from the start.
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

    def encode(self, prefix: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"]) -> PrefixCache:
        """Run the prefix alone; the cache's buffers have `space` behind it."""
        batch, tokens, _ = prefix.shape
        streams = [layer.backbone for layer in self.layers if isinstance(layer, JointDecoderLayer)]
        matrix, kv = streams[0].qkv.weight, streams[0].num_kv_heads
        buffers = matrix.new_empty(len(streams), 2, batch, kv, tokens + self._space, self.head_dim)
        rotary, bias = rotation(mask.long().cumsum(dim=1) - 1, self.head_dim), additive(mask[:, None, None]).to(matrix.dtype)

        def attend(query: Tensor, cached: Cached) -> Tensor:
            key, value = cached.key[:, :, :tokens], cached.value[:, :, :tokens]
            found = F.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, attn_mask=bias, enable_gqa=key.shape[1] != query.shape[2]
            )
            return found.transpose(1, 2).flatten(2)

        x, y = prefix.contiguous(), None
        for stream, buffer in zip(streams, buffers, strict=True):
            x, y, _ = _layer(stream, x, y, None, (None, None), rotary, Cached(buffer[0], buffer[1], 0), attend, few=False)
        return PrefixCache(tuple(KeyValue(buffer[0], buffer[1]) for buffer in buffers), mask, mask.sum(dim=1))

    def context(self, cache: PrefixCache, state: Float[Tensor, "B Z D"] | None, num_actions: int) -> FusedContext:
        """As JointDecoder's; nothing is run before the first step."""
        mask = cache.mask
        seen = torch.cat((mask, mask.new_ones(len(mask), self._space)), dim=1)
        rotary = rotation(mask.sum(dim=1)[:, None] + torch.arange(self._space, device=mask.device), self.head_dim)
        pending = [] if state is None else [state]
        return FusedContext(cache.layers, rotary, additive(seen[:, None, None]), mask.shape[1], pending, self._space - num_actions)

    def run(
        self, actions: Float[Tensor, "B H D"], context: FusedContext, made: Modulations | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Through all layers: x, parts and gate, whose sum is the residual stream, and how many tokens stand before the actions."""
        alone, first, rotary = 0, context.prefix + context.states, _rows_of(context.rotary, context.states, self._space)
        if context.state:
            state = context.state.pop()
            alone, first, rotary = state.shape[1], context.prefix, context.rotary
            actions = torch.cat((state.to(actions.dtype), actions), dim=1)
        x, y, gate = actions.contiguous(), None, None
        few = actions.shape[0] * actions.shape[1] <= ROWS
        for index, (layer, cached) in enumerate(zip(self.layers, context.buffers, strict=True)):
            assert isinstance(layer, JointDecoderLayer)
            by = (None, None) if made is None else made.layers[index]
            attend = partial(attend_in_slices, bias=context.bias, alone=alone)
            x, y, gate = _layer(layer.action_expert, x, y, gate, by, rotary, Cached(cached.key, cached.value, first), attend, few)
        return x, y, gate, alone


@final
class FusedPi0(Pi0):
    """A network for inference that shares another's weights, by these kernels."""

    def __init__(self, model: Pi0, decoder: JointDecoder) -> None:
        nn.Module.__init__(self)
        self.config = model.config
        for name, child in model.named_children():
            setattr(self, name, child)
        space = model.config.action_horizon + (model.config.state_input == "token")
        self.vision, self.decoder = FusedVision(model.vision), FusedDecoder(decoder, space)  # type: ignore[assignment]
        self.eval()

    def action_velocity(self, x_t: Float[Tensor, "B H A"], time: FlowTime, context: Any) -> Float[Tensor, "B H A"]:
        """As Pi0's."""
        decoder = cast(FusedDecoder, self.decoder)
        actions, condition = self._actions(x_t, time.embedded)
        made = time.modulations
        if made is None and condition is not None:
            made = decoder.modulations(condition)
        x, parts, gate, before = decoder.run(actions, context, made)
        assert parts is not None
        return head(x, parts, gate, decoder.final_norm, None if made is None else made.final, self.action_out, before)


def _layer(
    stream: Stream, x: Tensor, y: Tensor | None, gate: Tensor | None, by: tuple[Modulation | None, Modulation | None], rotary: Rotation,
    cached: Cached, attend, few: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """One layer of one stream. x + gate * y is the residual stream, before and after; y may be in parts, and None stands for 0."""
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
    """x [B, T, D] + gate * sum of the parts, float32 (x itself without parts), and its norm in `dtype`."""
    batch, tokens, width = x.shape
    total = x if parts is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    given, strides, flags = _norm_operands(x, parts, gate, norm, by)
    _add_norm[(batch * tokens,)](*given, total, normed, batch * tokens, tokens, *strides, BLOCK=triton.next_power_of_2(width), **flags)
    return total, normed


def rotated_qkv(x: Float[Tensor, "B T D"], stream: Stream, by: Rotation, cached: Cached, few: bool) -> Float[Tensor, "B T N K"]:
    """Rotated queries; the tokens' own keys and values go to the cache."""
    batch, tokens, width = x.shape
    kv, capacity, head_dim = cached.key.shape[1:]
    heads = stream.num_heads
    query = x.new_empty(batch, tokens, heads, head_dim)
    places = (by.cos, by.sin, query, cached.key, cached.value, batch * tokens, tokens, cached.first, capacity)
    if few:
        _rotated_qkv[(heads + 2 * kv, head_dim // 2 // HALF)](
            x, stream.qkv.weight, *places,
            D=width, HEADS=heads, KV=kv, K=head_dim, ROWS=ROWS, HALF=HALF, DEPTH=min(DEPTH, width), **_lines(stream.qkv.weight, width),
            **PRODUCT, **_overlap(x),
        )  # fmt: skip
    else:
        whole = heads + 2 * kv
        _rotated_heads[(triton.cdiv(batch * tokens, 8), whole)](
            F.linear(x, stream.qkv.weight), *places, HEADS=heads, KV=kv, K=head_dim, ROWS=8, HEADS_IN=whole
        )
    return query


def attend_in_slices(query: Float[Tensor, "B T N K"], cached: Cached, bias: Tensor, alone: int = 0) -> Float[Tensor, "B T NK"]:
    """Softmax attention of all rows to the cache up to the rows' own keys. bias: [B, 1, 1, J] float32; alone: see `_attend`."""
    batch, tokens, heads, head_dim = query.shape
    kv, capacity = cached.key.shape[1:3]
    keys = cached.first + tokens
    rows, cuts = tokens * heads // kv, triton.cdiv(keys, KEYS)
    sums = query.new_empty(batch * kv, cuts, rows, head_dim, dtype=torch.float32)
    largest, totals = (query.new_empty(batch * kv, cuts, rows, dtype=torch.float32) for _ in range(2))
    _attend[(triton.cdiv(rows, ASKING), cuts, batch * kv)](
        query, cached.key, cached.value, bias, sums, largest, totals, tokens, keys, capacity, bias.shape[-1], alone, head_dim**-0.5,
        HEADS=heads, KV=kv, K=head_dim, ROWS=ASKING, KEYS=KEYS, num_warps=8, num_stages=1, **_overlap(query),
    )  # fmt: skip
    joined = query.new_empty(batch, tokens, heads * head_dim)
    flags: Any = {"HEADS": heads, "KV": kv, "K": head_dim, "CUTS": triton.next_power_of_2(cuts)} | _overlap(query)
    _join[(rows, batch * kv)](sums, largest, totals, joined, tokens, cuts, **flags)
    return joined


def product(x: Float[Tensor, "B T D"], linear: nn.Linear, few: bool) -> Float[Tensor, "parts B T N"]:
    """x times the matrix, in parts to be summed: SLICES of them for few rows, else one."""
    if not few:
        return F.linear(x, linear.weight)[None]
    columns, width = linear.weight.shape
    part = width // SLICES
    parts = x.new_empty(SLICES, *x.shape[:2], columns, dtype=torch.float32)
    _sliced_product[(columns // COLUMNS, SLICES)](
        x, linear.weight, parts, x.shape[0] * x.shape[1],
        N=columns, D=width, SLICE=part, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=min(DEPTH, part), **_lines(linear.weight, part), **PRODUCT,
        **_overlap(x),
    )  # fmt: skip
    return parts


def gated_product(x: Float[Tensor, "B T D"], linear: nn.Linear, gelu: str, few: bool) -> Float[Tensor, "B T F"]:
    """`gelu(gate) * up`, the two halves of one product."""
    hidden, width = linear.out_features // 2, linear.in_features
    out = x.new_empty(*x.shape[:2], hidden)
    rows = x.shape[0] * x.shape[1]
    if few:
        _gated_product[(hidden // COLUMNS,)](
            x, linear.weight, out, rows, F=hidden, D=width, TANH=gelu == "tanh", ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=min(DEPTH, width),
            **_lines(linear.weight, width), **PRODUCT, **_overlap(x),
        )  # fmt: skip
    else:
        _gate[(rows, triton.cdiv(hidden, 2048))](F.linear(x, linear.weight), out, F=hidden, TANH=gelu == "tanh", BLOCK=2048, num_warps=8)
    return out


def head(
    x: Tensor, parts: Tensor, gate: Tensor | None, norm: nn.Module, by: Modulation | None, linear: nn.Linear, first: int
) -> Float[Tensor, "B H A"]:
    """The final norm and the head of released weights, which points from data to noise, negated; of the tokens from `first` on."""
    batch, tokens, _ = x.shape
    out = torch.empty(batch, tokens - first, linear.out_features, dtype=torch.float32, device=x.device)
    given, strides, flags = _norm_operands(x, parts, gate, norm, by)
    _head[(batch * (tokens - first),)](
        *given, linear.weight, linear.bias, out, batch * tokens, tokens, first, *strides, A=linear.out_features, num_warps=8, **flags
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
        """pictures in [-1, 1] to tokens."""
        x, y = (self.patch_embedding(pictures) + self.position_embedding).contiguous(), None
        for layer in self.layers:
            assert isinstance(layer, VisionLayer)
            dtype = layer.qkv.weight.dtype
            x, normed = add_layer_norm(x, y, layer.attention_norm, dtype)
            query, key, value = layer.qkv(normed).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value)
            x, normed = add_layer_norm(x, layer.out(attended.transpose(1, 2).flatten(2)), layer.mlp_norm, dtype)
            y = layer.mlp.fc2(_bias_gelu(normed, layer.mlp.fc1, layer.mlp.gelu))
        return cast(Tensor, self.projector(add_layer_norm(x, y, self.final_norm, self.projector.weight.dtype)[1]))


def add_layer_norm(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [B, V, D] + y, float32 (x itself without y), and its norm in `dtype`."""
    width = x.shape[-1]
    total = x if y is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    _add_layer_norm[(x.numel() // width,)](
        x, x if y is None else y, norm.weight, norm.bias, total, normed,
        D=width, ADDED=y is not None, EPSILON=norm.eps, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return total, normed


def _bias_gelu(x: Tensor, linear: nn.Linear, gelu: str) -> Tensor:
    if gelu == "tanh" and x.is_cuda:  # the product's own epilogue
        return torch._addmm_activation(linear.bias, x.flatten(0, 1), linear.weight.t(), use_gelu=True).unflatten(0, x.shape[:2])
    return F.gelu(linear(x), approximate=gelu)


def with_fused_layers(model: Pi0) -> Pi0 | None:
    """The same network and weights as `FusedPi0`, for inference; None where a size does not fit."""
    config, decoder = model.config, model.decoder
    if not isinstance(decoder, JointDecoder) or (config.state_input == "token" and config.time_conditioning == "adaptive_norm"):
        return None
    return FusedPi0(model, decoder) if fits(decoder) and config.action_dim in (16, 32, 64, 128) else None


def fits(decoder: JointDecoder) -> bool:
    """Whether these kernels take a decoder of this size: sizes in whole tiles, matrices as `nn.Linear` keeps them."""
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
    """How many columns to prefetch, and how many a line of the cache holds."""
    per_line = LINE // matrix.element_size()
    lines = columns // per_line
    return {"SPAN": columns if columns % per_line == 0 and lines & (lines - 1) == 0 else 0, "PER_LINE": per_line}


def _norm_operands(
    x: Tensor, parts: Tensor | None, gate: Tensor | None, norm: nn.Module, by: Modulation | None
) -> tuple[tuple[Tensor, ...], tuple[int, int, int], dict[str, Any]]:
    """What `_summed` and `_normed` read: tensors, the last three's strides from a row of the batch to the next, and sizes."""
    assert isinstance(norm, RMSNorm | AdaptiveRMSNorm)
    factor, shift = (cast(Tensor, norm.scale), cast(Tensor, norm.scale)) if by is None else (by.factor, by.shift)
    given = (x, x if parts is None else parts, x if gate is None else gate, factor, shift)
    strides = (_stride(gate), _stride(None if by is None else by.factor), _stride(None if by is None else by.shift))
    sizes = {"D": x.shape[-1], "SLICES": 0 if parts is None else len(parts), "GATED": gate is not None, "ADAPTIVE": by is not None}
    return given, strides, sizes | {"EPSILON": NORM_EPSILON} | _overlap(x)


def _stride(x: Tensor | None) -> int:
    """From a row of the batch to the next; 0 where one serves all."""
    return 0 if x is None or len(x) == 1 else x.stride(0)


def _rows_of(rotary: Rotation, first: int, last: int) -> Rotation:
    return Rotation(*(angle[:, :, first:last].contiguous() for angle in rotary))
