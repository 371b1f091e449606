"""The Triton kernels for attention over token pyramids: forward, one for dq, and one for dk and dv.

Axis letters: B batch, L tokens, H heads, D head size.

A program works on the rows of one tile for one head of one sequence: queries, or in the kernel for dk and dv keys. It
visits its columns, the other way round, tile by tile: first those that all rows see, then those at the edges, which
need a mask. Rows behind the last are computed as copies of it and not stored; no load needs a mask for them.

Logits are in units of log 2. With QK-norm they are products of the raw vectors times a *gain* of their row and one of
their column, which hold the inverse norms: normalised vectors exist nowhere. Both backward kernels compute the weights
again, so that neither has to add to what another program wrote, and results are bit-equal from run to run.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations itself, and knows pointers and tensors by what it is given.

from __future__ import annotations

import triton
import triton.language as tl

PRECISION = tl.constexpr("tf32x3")  # of products of float32: three of TF32 add up to all but the last bits
LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST_SQUARE = tl.constexpr(1e-24)  # of a vector's norm, as in the reference
SMALLEST_FACTOR = tl.constexpr(1e-30)  # that row gains have, so that -inf times a gain is never not a number
NOTHING_SEEN = tl.constexpr(-1e30)  # a running maximum at first; finite, so that exp2(-inf - NOTHING_SEEN) is 0


@triton.jit
def load_vectors(array, at, stride: tl.constexpr, spec: tl.constexpr):
    """(tokens, width), zeros behind D."""
    channels = tl.arange(0, spec.width)
    pointers = array + at[:, None] * stride + channels[None, :]
    if spec.size == spec.width:
        vectors = tl.load(pointers)
    else:
        vectors = tl.load(pointers, mask=channels[None, :] < spec.size, other=0.0)
    return vectors


@triton.jit
def store_vectors(array, at, stored, vectors, stride: tl.constexpr, spec: tl.constexpr):
    """The rows that are `stored`, in the array's dtype."""
    channels = tl.arange(0, spec.width)
    pointers = array + at[:, None] * stride + channels[None, :]
    mask = stored[:, None] & (channels[None, :] < spec.size)
    tl.store(pointers, vectors.to(array.dtype.element_ty), mask=mask)


@triton.jit
def place(spec: tl.constexpr):
    """Where the program's head begins: in (B,L,[3,]H,D), in (B,L,H,D), and in (B,H,L)."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens = batch * spec.length
    return tokens * spec.stride + head * spec.size, tokens * spec.row + head * spec.size, batch * spec.heads + head


@triton.jit
def tile_of(table, limits, spec: tl.constexpr):
    """The program's rows, which of them it stores, their [start, end), and its columns, see `tiles`."""
    entry = table + tl.program_id(0) * 6
    row, stop = tl.load(entry), tl.load(entry + 1)
    rows = row + tl.arange(0, spec.rows)
    at = tl.minimum(rows, stop - 1)
    bounds = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    return at, rows < stop, tl.load(limits + at), tl.load(limits + spec.length + at), bounds


@triton.jit
def zeros(rows: tl.constexpr, width: tl.constexpr):
    """(rows, width) float32."""
    return tl.zeros((rows, width), tl.float32)


@triton.jit
def filled(value, rows: tl.constexpr):
    """(rows,) float32."""
    return tl.zeros((rows,), tl.float32) + value


@triton.jit
def columns_at(position, full_first, full_last, masked: tl.constexpr, spec: tl.constexpr):
    """The columns of a tile, and whence to load them. Positions of masked ones skip what all rows see."""
    if masked:
        position += tl.where(position < full_first, 0, full_last - full_first)
    columns = position + tl.arange(0, spec.columns)
    return columns, tl.minimum(columns, spec.length - 1) if masked else columns


@triton.jit
def hide(logits, columns, starts, ends):
    """-inf outside of each row's [start, end)."""
    visible = (columns[None, :] >= starts[:, None]) & (columns[None, :] < ends[:, None])
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def inverse_norm(x):
    """(rows, D) → (rows,) float32."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), SMALLEST_SQUARE))


@triton.jit
def through_norm(gradient, x, gain):
    """Gradient by rows that were normalised → by the rows, and (rows,) its inner products with the normalised rows.

    The gain was theirs in the logits; the gradient does not contain it yet.
    """
    x = x.to(tl.float32)
    inverse = inverse_norm(x)
    dots = tl.sum(gradient * x, 1) * inverse
    return (gradient - (dots * inverse)[:, None] * x) * gain[:, None], dots


@triton.jit
def narrow(gradient, array, spec: tl.constexpr):
    """To the array's dtype. Only vectors of subnormal numbers have gains that float16 cannot hold: they are clipped."""
    if spec.norm and array.dtype.element_ty == tl.float16:
        gradient = tl.clamp(gradient, -65504.0, 65504.0)
    return gradient.to(array.dtype.element_ty)


@triton.jit
def query_gain(x, factor, spec: tl.constexpr):
    """What logits of rows that are queries are multiplied by, (rows,), positive."""
    factor = tl.maximum(tl.abs(factor), SMALLEST_FACTOR) * LOG2E
    return inverse_norm(x) * factor if spec.norm else filled(factor, spec.rows)


# --- Forward: a running maximum and sum as in FlashAttention (Dao 2023).


@triton.jit
def attend(carry, x, gain, k, v, key_gains, limits, bounds, masked: tl.constexpr, spec: tl.constexpr):
    """Adds the masked, or the other, column tiles to the sum of weighted values, the maxima and the sums of weights."""
    total, peak, mass = carry
    first, last, full_first, full_last = bounds
    for position in tl.range(first, last, spec.columns):
        columns, at = columns_at(position, full_first, full_last, masked, spec)
        keys = load_vectors(k, at, spec.stride, spec)
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
        if spec.norm:
            s *= tl.load(key_gains + at)[None, :]
        if masked:
            s = hide(s, columns, limits[0], limits[1])
        new_peak = tl.maximum(peak, tl.max(s, 1) * gain)
        p = tl.exp2(s * gain[:, None] - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        values = load_vectors(v, at, spec.stride, spec)
        mass = mass * shrink + tl.sum(p, 1)
        total = tl.dot(p.to(values.dtype), values, total * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return total, peak, mass


@triton.jit
def forward_kernel(q, k, v, factors, key_gains, limits, table, out, lse, spec: tl.constexpr):
    """q, k, v → out (B,L,H,D), and lse (B,H,L), log2 of the sums of exp2 of logits.

    Args:
      q, k, v: (B,L,H,D), or thrice one (B,L,3,H,D).
      factors: (H,) float32, the softmax scale; with QK-norm the learned one.
      key_gains: with QK-norm (B,H,L) float32, the inverse norms of keys with the signs of factors; else never read.
      limits: (2,L) int32, the first column that each row sees, and the one behind the last.
      table: (tiles, 6) int32, see `tiles`.
    """
    operand, token, vector = place(spec)
    q, k, v = q + operand, k + operand + spec.part, v + operand + 2 * spec.part
    at, stored, starts, ends, bounds = tile_of(table, limits, spec)
    first, last, full_first, full_last = bounds
    x = load_vectors(q, at, spec.stride, spec)
    gain = query_gain(x, tl.load(factors + tl.program_id(1)), spec)
    key_gains += vector * spec.length
    carry = zeros(spec.rows, spec.width), filled(NOTHING_SEEN, spec.rows), filled(0.0, spec.rows)
    limits = (starts, ends)
    carry = attend(carry, x, gain, k, v, key_gains, limits, (full_first, full_last, 0, 0), False, spec)
    edges = (first, last - (full_last - full_first), full_first, full_last)
    total, peak, mass = attend(carry, x, gain, k, v, key_gains, limits, edges, True, spec)
    store_vectors(out + token, at, stored, total / mass[:, None], spec.row, spec)
    tl.store(lse + vector * spec.length + at, peak + tl.log2(mass), mask=stored)


# --- Backward.


@triton.jit
def add_keys(total, x, dx, gain, lse, delta, k, v, key_gains, limits, bounds, masked: tl.constexpr, spec: tl.constexpr):
    """Adds what the masked, or the other, column tiles give to dq, without its rows' gain."""
    first, last, full_first, full_last = bounds
    for position in tl.range(first, last, spec.columns):
        columns, at = columns_at(position, full_first, full_last, masked, spec)
        keys, values = load_vectors(k, at, spec.stride, spec), load_vectors(v, at, spec.stride, spec)
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
        if spec.norm:
            column_gain = tl.load(key_gains + at)[None, :]
            s *= column_gain
        if masked:
            s = hide(s, columns, limits[0], limits[1])
        p = tl.exp2(s * gain[:, None] - lse[:, None])
        ds = p * (tl.dot(dx, tl.trans(values), input_precision=PRECISION) - delta[:, None])
        if spec.norm:
            ds *= column_gain
        total = tl.dot(narrow(ds, k, spec), keys, total, input_precision=PRECISION)
    return total


@triton.jit
def grad_queries_kernel(
    q, k, v, factors, key_gains, limits, table, out, dout, lse, dq, vectors, spec: tl.constexpr
):  # fmt: skip
    """As `forward_kernel`, and out, dout (B,L,H,D) and lse → dq, as q, and `vectors` of queries.

    These are (B,H,1,L) float32, the inner products of out and dout; with QK-norm (B,H,3,L), then the gains of queries
    with the signs of factors, and what each query adds to the gradient by the absolute factor.
    """
    operand, token, vector = place(spec)
    q, k, v = q + operand, k + operand + spec.part, v + operand + 2 * spec.part
    at, stored, starts, ends, bounds = tile_of(table, limits, spec)
    first, last, full_first, full_last = bounds
    x, dx = load_vectors(q, at, spec.stride, spec), load_vectors(dout + token, at, spec.row, spec)
    o = load_vectors(out + token, at, spec.row, spec)
    delta = tl.sum(o.to(tl.float32) * dx.to(tl.float32), 1)
    factor = tl.load(factors + tl.program_id(1))
    gain = query_gain(x, factor, spec)
    row_lse = tl.load(lse + vector * spec.length + at)
    key_gains += vector * spec.length
    limits = (starts, ends)
    inner, edges = (full_first, full_last, 0, 0), (first, last - (full_last - full_first), full_first, full_last)
    total = zeros(spec.rows, spec.width)
    total = add_keys(total, x, dx, gain, row_lse, delta, k, v, key_gains, limits, inner, False, spec)
    total = add_keys(total, x, dx, gain, row_lse, delta, k, v, key_gains, limits, edges, True, spec)
    vectors += vector * (spec.vectors * spec.length) + at
    tl.store(vectors, delta, mask=stored)
    if spec.norm:
        total, dots = through_norm(total, x, gain / LOG2E)
        tl.store(vectors + spec.length, inverse_norm(x) * (factor * LOG2E), mask=stored)
        tl.store(vectors + 2 * spec.length, dots, mask=stored)
    else:
        total *= factor
    store_vectors(dq + operand, at, stored, total, spec.stride, spec)


@triton.jit
def add_queries(carry, x, y, gain, q, dout, lse, vectors, limits, bounds, masked: tl.constexpr, spec: tl.constexpr):
    """Adds what the masked, or the other, column tiles give to dk, without its rows' gain, and dv."""
    dk, dv = carry
    first, last, full_first, full_last = bounds
    for position in tl.range(first, last, spec.columns):
        columns, at = columns_at(position, full_first, full_last, masked, spec)
        queries, dx = load_vectors(q, at, spec.stride, spec), load_vectors(dout, at, spec.row, spec)
        s = tl.dot(x, tl.trans(queries), input_precision=PRECISION)
        if spec.norm:
            column_gain = tl.load(vectors + spec.length + at)[None, :]
            s *= column_gain
        if masked:
            s = hide(s, columns, limits[0], limits[1])
        p = tl.exp2(s * gain[:, None] - tl.load(lse + at)[None, :])
        dv = tl.dot(p.to(dx.dtype), dx, dv, input_precision=PRECISION)
        ds = p * (tl.dot(y, tl.trans(dx), input_precision=PRECISION) - tl.load(vectors + at)[None, :])
        if spec.norm:
            ds *= column_gain
        dk = tl.dot(narrow(ds, q, spec), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def grad_keys_kernel(q, k, v, factors, limits, table, dout, lse, vectors, dk, dv, spec: tl.constexpr):
    """As `grad_queries_kernel`, with its vectors, rows being keys and columns queries → dk, dv as k and v."""
    operand, token, vector = place(spec)
    q, k, v = q + operand, k + operand + spec.part, v + operand + 2 * spec.part
    at, stored, starts, ends, bounds = tile_of(table, limits, spec)
    first, last, full_first, full_last = bounds
    x, y = load_vectors(k, at, spec.stride, spec), load_vectors(v, at, spec.stride, spec)
    factor = tl.load(factors + tl.program_id(1))
    gain = inverse_norm(x) if spec.norm else filled(factor * LOG2E, spec.rows)
    dout += token
    lse += vector * spec.length
    vectors += vector * (spec.vectors * spec.length)
    limits = (starts, ends)
    inner, edges = (full_first, full_last, 0, 0), (first, last - (full_last - full_first), full_first, full_last)
    carry = zeros(spec.rows, spec.width), zeros(spec.rows, spec.width)
    carry = add_queries(carry, x, y, gain, q, dout, lse, vectors, limits, inner, False, spec)
    dk_total, dv_total = add_queries(carry, x, y, gain, q, dout, lse, vectors, limits, edges, True, spec)
    if spec.norm:
        dk_total, _ = through_norm(dk_total, x, gain / LOG2E)
    else:
        dk_total *= factor
    store_vectors(dk + operand + spec.part, at, stored, dk_total, spec.stride, spec)
    store_vectors(dv + operand + 2 * spec.part, at, stored, dv_total, spec.stride, spec)
