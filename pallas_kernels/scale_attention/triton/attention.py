"""q, k, v of a token pyramid → attended values on NVIDIA GPUs since Ampere (A100, L4, …), by Triton, with gradients.

Axis letters: B batch, L tokens, H heads, D head size.

`tiles` says which tiles are visited and how large they are, `kernels` what is computed of them. All read
and write the token-major layout directly, packed or not. `jax_triton` has no place for an estimate of their cost.

With QK-norm XLA finds the inverse norms of keys beforehand, 1/D of their size; those of rows are found in the kernels.

Forward and backward, milliseconds on an H200, block-diagonal, against the XLA path in the same run:

| L, B, H, D, dtype, QK-norm        | Triton     | XLA         |
| 680, 64, 16, 64, bfloat16, with   | 0.27, 0.73 | 1.16, 3.12  |
| 2240, 16, 24, 64, bfloat16, with  | 0.63, 2.10 | 2.67, 7.23  |
| 9451, 2, 24, 64, bfloat16, with   | 0.97, 4.34 | 4.32, 10.90 |
| 680, 32, 8, 128, bfloat16, with   | 0.15, 0.35 | 0.46, 1.31  |
| 680, 32, 8, 64, float32, with     | 0.29, 0.96 | 0.64, 0.91  |
| 680, 32, 8, 128, float32, without | 1.19, 2.03 | 0.57, 1.04  |

The backward kernels of D = 64 had two stages there in bfloat16; with three, as in `TUNED`, dq takes 0.79 rather than
0.95 ms at L = 2240, dk and dv 1.13 rather than 1.18. Of float32, dk and dv with 32 rows take 0.58 rather than 0.66 ms.
At D = 128 the forward kernel with 64 rows takes 0.11 rather than 0.14 ms; float32 had tiles too large for an L4.

Errors of float32 were below 1e-6, and 5e-4 by XLA, which multiplied in TF32 then. For A100 and L4 the kernels are
compiled by the tests, not timed. Turing (T4) is left to XLA: Triton 3.6 uses no tensor cores there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices
from pallas_kernels.scale_attention.operands import Static, check_operands, ranges_for, say, sign_of
from pallas_kernels.scale_attention.ranges import transpose_ranges
from pallas_kernels.scale_attention.triton import kernels
from pallas_kernels.scale_attention.triton.tiles import (
    Blocks,
    Spec,
    TritonBlocks,
    candidates,
    plan_tiles,
    shared_bytes,
    table_entry,
    tuned_blocks,
)

__all__ = ["TritonBlocks", "candidates", "table_entry", "triton_attention", "triton_attention_packed"]

LARGEST_HEAD = 128


def triton_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_ranges: np.ndarray,
    q_scale: jax.Array | None,
    *,
    blocks: TritonBlocks | None = None,
) -> jax.Array:
    """As `reference_attention`, with products in the dtype of q and the rest in float32; differentiable.

    Products of float32 are three of TF32 each.

    Args:
      q, k, v: (B,L,H,D), bfloat16, float16 or float32, D from 16 to 128, a power of 2 at best.
      key_ranges: (L,2) int, static: query i attends to keys in [start, end). Neither bound ever decreases, no range is
        empty, and together they leave no gap.
      q_scale: optional (H,): QK-norm, as in `scale_attention`.
      blocks: sizes of the tiles; None takes the fastest known, `tuned_blocks`.

    Returns:
      (B,L,H,D) in the dtype of q.

    Raises:
      ValueError: shapes, dtypes or ranges are not supported, or blocks need more shared memory than there is.
    """
    return _attend((q, k, v), key_ranges, q_scale, blocks)


def triton_attention_packed(
    qkv: jax.Array, key_ranges: np.ndarray, q_scale: jax.Array | None, *, blocks: TritonBlocks | None = None
) -> jax.Array:
    """As `triton_attention`, of (B,L,3,H,D), q, k and v as one projection gives them. So is the gradient; no copies."""
    return _attend((qkv,), key_ranges, q_scale, blocks)


def _attend(
    qkv: tuple[jax.Array, ...], key_ranges: np.ndarray, q_scale: jax.Array | None, blocks: TritonBlocks | None
) -> jax.Array:
    """Of q, k, v, each (B,L,H,D), or one (B,L,3,H,D), checked."""
    check_operands(qkv)
    first, size = qkv[0], qkv[0].shape[-1]
    if first.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or not 16 <= size <= LARGEST_HEAD:
        raise ValueError(
            f"The Triton kernels take bfloat16, float16 or float32 and heads of 16 to {LARGEST_HEAD}, not {say(first)}."
        )
    ranges = ranges_for(first, key_ranges)
    blocks = blocks or tuned_blocks(size, first.dtype)
    blocks.check(size, first.dtype.itemsize, shared_bytes())
    return _attention(qkv, devices.vary_as(first, q_scale), Static(ranges.tobytes(), blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(qkv: tuple[jax.Array, ...], q_scale: jax.Array | None, static: Static[TritonBlocks]) -> jax.Array:
    """Of q, k, v, each (B,L,H,D), or one (B,L,3,H,D)."""
    out, _ = _attention_forward(qkv, q_scale, static)
    return out


def _attention_forward(
    qkv: tuple[jax.Array, ...], q_scale: jax.Array | None, static: Static[TritonBlocks]
) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, length, *_, heads, size = qkv[0].shape
    if q_scale is None:
        factors = key_gains = jnp.full(heads, size**-0.5, jnp.float32)  # as gains it is not read
    else:
        factors = q_scale.astype(jnp.float32)
        key_gains = sign_of(factors)[:, None] * _inverse_norms(qkv[1] if len(qkv) == 3 else qkv[0][:, :, 1])
    shapes = _shape((batch, length, heads, size), qkv[0].dtype), _shape((batch, heads, length))
    out, lse = _launch(
        *(kernels.forward_kernel, static.blocks.forward, static.key_ranges, q_scale is not None),
        *(qkv, [factors, key_gains], [], shapes),
    )
    return out, (qkv, q_scale, factors, key_gains, out, lse)


def _attention_backward(static: Static[TritonBlocks], residuals: tuple[Any, ...], dout: jax.Array) -> tuple[Any, Any]:
    qkv, q_scale, factors, key_gains, out, lse = residuals
    ranges, blocks, norm = static.key_ranges, static.blocks, q_scale is not None
    batch, length, heads, _ = out.shape
    like_q = _shape(qkv[0].shape, out.dtype)
    dq, vectors = _launch(
        *(kernels.grad_queries_kernel, blocks.grad_queries, ranges, norm),
        *(qkv, [factors, key_gains], [out, dout, lse], [like_q, _shape((batch, heads, 3 if norm else 1, length))]),
    )
    rest = kernels.grad_keys_kernel, blocks.grad_keys, transpose_ranges(ranges), norm
    given = qkv, [factors], [dout, lse, vectors]
    if len(qkv) == 3:
        gradients = (dq, *_launch(*rest, *given, [like_q] * 2))
    else:
        gradients = tuple(_launch(*rest, *given, [like_q], into=dq))  # whose first third is done
    if q_scale is None:
        return gradients, None
    return gradients, (sign_of(q_scale) * jnp.sum(vectors[:, :, 2], axis=(0, 2))).astype(q_scale.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


def _inverse_norms(x: jax.Array) -> jax.Array:
    """(B,L,H,D) → (B,H,L) float32, a number for each vector."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
    return jax.lax.rsqrt(jnp.maximum(squares, kernels.SMALLEST_SQUARE.value)).swapaxes(1, 2)


def _shape(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _launch(
    kernel: Any,
    blocks: Blocks,
    ranges: np.ndarray,
    norm: bool,
    qkv: tuple[jax.Array, ...],
    before: Sequence[jax.Array],
    behind: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    into: jax.Array | None = None,
) -> Sequence[jax.Array]:
    """Runs a kernel for every tile of rows, head and sequence.

    Args:
      kernel: of `kernels`.
      blocks: how it is cut.
      ranges: (L,2) int32, the columns that each of its rows sees.
      norm: whether q and k are normalised.
      qkv: three arrays (B,L,H,D), or one (B,L,3,H,D).
      before, behind: what it takes before, and behind, that which says what tiles there are.
      outputs: what it gives.
      into: an array that becomes the output, to be written in parts.
    """
    batch, length, *_, heads, size = qkv[0].shape
    table = plan_tiles(ranges, blocks.rows, blocks.columns)
    arrays = [*(qkv * 3)[:3], *before, jnp.asarray(ranges.T), jnp.asarray(table), *behind]
    return devices.triton_call(
        *(arrays if into is None else [*arrays, into]),
        kernel=kernel,
        out_shape=list(outputs),
        grid=(len(table), heads, batch),
        name=f"scale_attention_{kernel.__name__}",
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        input_output_aliases={} if into is None else {len(arrays): 0},
        spec=Spec(length, heads, size, len(qkv) == 1, norm, blocks.rows, blocks.columns),
    )
