"""Triton kernels of pi0's layers, for a GPU without a gradient.

Owns: the computation of one launch. Does not know: the order of a layer's launches and the sizes of tiles (models/fused.py).
Residual stream, sums and softmax are float32. A product of few columns is split along K, so that every multiprocessor has a share; the
norm that reads the parts sums them in a fixed order. For few rows the keys are split too, and a second kernel joins the parts.

Shape letters: B batch, T tokens, M = B T rows, D width, F hidden width, N heads, K head dim, J keys.
"""

import triton
import triton.language as tl


@triton.jit
def _after_previous(PDL: tl.constexpr):
    """Let the next kernel begin, and wait for the previous one. Code before this call overlaps with it, and may read weights only."""
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
    """Compute one row of x + gate * sum of the parts; `size` is the distance between parts."""
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
    """Compute the norm of one row; `factor` and `shift` point to its scale."""
    normed = value / tl.sqrt(tl.sum(value * value) / D + EPSILON)
    scale = tl.load(factor, mask=inside, other=0.0).to(tl.float32)
    if ADAPTIVE:
        normed = normed * scale + tl.load(shift, mask=inside, other=0.0).to(tl.float32)
    else:
        normed *= 1.0 + scale
    return normed


@triton.jit
def add_norm(
    x, parts, gate, factor, shift, sum_out, normed_out, rows, tokens, gate_stride, factor_stride, shift_stride,
    D: tl.constexpr, SLICES: tl.constexpr, GATED: tl.constexpr, ADAPTIVE: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute, one row per program, x + gate * sum of the parts, and its norm."""
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
    """Store columns `low` of both halves of a head: rotated queries to [M, N, K], rotated keys and values to the cache from `first` on."""
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
def rotated_qkv(
    x, matrix, cos, sin, query, key, value, rows, tokens, first, capacity,
    D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, DEPTH: tl.constexpr,
    SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the product of few rows, HALF columns of each half of one head per program, and store it by `_store_head`."""
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
def rotated_heads(
    qkv, cos, sin, query, key, value, rows, tokens, first, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HEADS_IN: tl.constexpr,
):  # fmt: skip
    """As `rotated_qkv`, for a computed product qkv [M, HEADS_IN, K], whose first HEADS are queries."""
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    low, live = tl.arange(0, K // 2), row[:, None] < rows
    place = (row[:, None] * HEADS_IN + head) * K + low[None, :]
    left = tl.load(qkv + place, mask=live, other=0.0).to(tl.float32)
    right = tl.load(qkv + place + K // 2, mask=live, other=0.0).to(tl.float32)
    _store_head(left, right, row, low, live, head, cos, sin, query, key, value, tokens, first, capacity, HEADS, KV, K)


@triton.jit
def attend(
    query, key, value, bias, sums, largest, totals, tokens, keys, capacity, bias_stride, alone, each, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attend from ROWS rows (a token's heads in a row) to KEYS keys: unnormalised sums, and the softmax's maximum and total.

    The first `alone` tokens do not see the keys of the later ones, which form chunks of `each`; no chunk sees another.
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
    asking, asked = row // GROUP - alone, seen - (keys - tokens + alone)  # places among the actions; earlier tokens are below 0
    other = (asking < 0)[:, None] | ((asking // each)[:, None] != (asked // each)[None, :])
    hidden = (asked >= 0)[None, :] & other
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
def join(
    sums, largest, totals, joined, tokens, cuts, HEADS: tl.constexpr, KV: tl.constexpr, K: tl.constexpr, CUTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Join, one row per program, the slices of the keys by their softmax weights, to [B, T, N K]."""
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
def sliced_product(
    x, matrix, parts, rows, N: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply x [M, D] by a slice of `matrix` [N, D] along D: float32 parts [slices, M, N]."""
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
def gated_product(
    x, matrix, out, rows, F: tl.constexpr, D: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPAN: tl.constexpr, PER_LINE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute gelu(x gate') * (x up') for COLUMNS hidden units; matrix [2 F, D] holds gate, then up."""
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
def gated(halves, out, F: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """Compute gelu(gate) * up of a row's two halves."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    place = halves + tl.program_id(0).to(tl.int64) * 2 * F + column
    gate, up = tl.load(place, mask=inside, other=0.0).to(tl.float32), tl.load(place + F, mask=inside, other=0.0).to(tl.float32)
    answer = _gelu(gate, TANH) * up
    tl.store(out + tl.program_id(0).to(tl.int64) * F + column, answer.to(out.dtype.element_ty), mask=inside)


@triton.jit
def head(
    x, parts, gate, factor, shift, matrix, bias, out, rows, tokens, first, gate_stride, factor_stride, shift_stride,
    D: tl.constexpr, A: tl.constexpr, SLICES: tl.constexpr, GATED: tl.constexpr, ADAPTIVE: tl.constexpr, EPSILON: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute, one token per program from `first` on, the last residual sum, its norm, and the negated head [A, D]; float32."""
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
def add_layer_norm(
    x, y, weight, bias, sum_out, normed_out, D: tl.constexpr, ADDED: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute, one row per program, x + y and its layer norm."""
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
