"""The Triton kernels behind `token_passes`.

A program works through a run of tokens, with whole rows of channels in its registers, and keeps the sums over them
there. What the programs have summed is added up by XLA, in the same order every time.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations itself, and knows pointers and tensors by what it is given.

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels import token_passes

EPS = tl.constexpr(token_passes.EPS)
GELU_SCALE, GELU_CUBE = tl.constexpr(token_passes.GELU_SCALE), tl.constexpr(token_passes.GELU_CUBE)


@triton.jit
def add_norm_kernel(x, y, bias, gate, scale, shift, total, operand, spec: tl.constexpr):
    """Of (B,L,C), (C,), (B,C)."""
    first, sample = tl.program_id(0) * spec.run, tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, spec.lanes)
    inside = channels < spec.width
    offset = tl.load(bias + channels, mask=inside, other=0.0)
    opening = tl.load(gate + sample * spec.width + channels, mask=inside, other=0.0)
    factor = 1 + tl.load(scale + sample * spec.width + channels, mask=inside, other=0.0)
    shifted = tl.load(shift + sample * spec.width + channels, mask=inside, other=0.0)
    for i in range(spec.run):
        at = (sample * tl.num_programs(0) * spec.run + first + i) * spec.width + channels
        given = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + offset
        rounded = (given + opening * added).to(x.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        n = rounded.to(tl.float32)
        n = tl.where(inside, n - tl.sum(n, 0) / spec.width, 0.0)
        n *= tl.rsqrt(tl.sum(n * n, 0) / spec.width + EPS)
        tl.store(operand + at, (n * factor + shifted).to(x.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(x, scale, doperand, dtotal, y, bias, gate, dx, dy, sums, spec: tl.constexpr):
    """Of (B,L,C), (B,C), (C,); sums (B,runs,4,C): by scale, shift, gate, and of the gradient itself."""
    run, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, spec.lanes)
    inside = channels < spec.width
    factor = 1 + tl.load(scale + sample * spec.width + channels, mask=inside, other=0.0)
    if spec.branch:
        opening = tl.load(gate + sample * spec.width + channels, mask=inside, other=0.0)
        offset = tl.load(bias + channels, mask=inside, other=0.0)
    by_scale = tl.zeros_like(factor)
    by_shift, by_gate, whole = by_scale, by_scale, by_scale
    for i in range(spec.run):
        token = run * spec.run + i
        mask = inside & (token < spec.length)
        at = (sample * spec.length + token) * spec.width + channels
        total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(doperand + at, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        if spec.branch:
            added = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) + offset
            total = (total + opening * added).to(x.dtype.element_ty).to(tl.float32)
        centred = tl.where(inside, total - tl.sum(total, 0) / spec.width, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / spec.width + EPS)
        n, dn = centred * inverse, d * factor
        gradient += inverse * (dn - tl.sum(dn, 0) / spec.width - n * (tl.sum(dn * n, 0) / spec.width))
        tl.store(dx + at, gradient.to(x.dtype.element_ty), mask=mask)
        by_scale += d * n
        by_shift += d
        if spec.branch:
            gradient = tl.where(mask, gradient, 0.0)
            tl.store(dy + at, (opening * gradient).to(x.dtype.element_ty), mask=mask)
            by_gate += gradient * added
            whole += gradient
    at = ((sample * tl.num_programs(0) + run) * 4) * spec.width + channels
    tl.store(sums + at, by_scale, mask=inside)
    tl.store(sums + at + spec.width, by_shift, mask=inside)
    if spec.branch:
        tl.store(sums + at + 2 * spec.width, by_gate, mask=inside)
        tl.store(sums + at + 3 * spec.width, whole, mask=inside)


@triton.jit
def zeros(rows: tl.constexpr, columns: tl.constexpr):
    """(rows, columns) float32."""
    return tl.zeros((rows, columns), tl.float32)


@triton.jit
def gelu_kernel(z, dy, value, dz, sums, spec: tl.constexpr):
    """Of (M,F); sums (runs,F) of dz."""
    run, features = tl.program_id(0), tl.program_id(1) * spec.columns + tl.arange(0, spec.columns)
    tokens = tl.arange(0, spec.rows)
    total = zeros(spec.rows, spec.columns)
    for i in range(0, spec.run, spec.rows):
        token = run * spec.run + i + tokens
        mask = (token < spec.length)[:, None] & (features < spec.width)[None, :]
        at = token.to(tl.int64)[:, None] * spec.width + features[None, :]
        given = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        square = given * given
        # Tensor first: Triton 3.9's interpreter makes a constexpr of a constexpr times a tensor, and exp refuses that.
        gate = tl.rsqrt(1 + tl.exp(given * -GELU_SCALE * (1 + square * GELU_CUBE)))
        gate = gate * gate
        slope = gate + given * gate * (1 - gate) * GELU_SCALE * (1 + 3 * GELU_CUBE * square)
        tl.store(value + at, (given * gate).to(z.dtype.element_ty), mask=mask)
        rounded = (d * slope).to(z.dtype.element_ty)
        tl.store(dz + at, rounded, mask=mask)
        total += rounded.to(tl.float32)
    tl.store(sums + run * spec.width + features, tl.sum(total, 0), mask=features < spec.width)
