"""q, k, v of a token pyramid → attended values on Hopper (H100, H200), by Mosaic GPU, with gradients.

Axis letters: B batch, L tokens, H heads, D head size.

`blocks` says how large tiles are, `tiles` which to visit, `pipeline` how thread blocks are kept busy, `forward` and
`backward` what is computed. All read and write the token-major layout directly. No sum is split between thread blocks,
so results are bit-equal from run to run.

With QK-norm the loading warpgroup normalises column tiles in shared memory, and the inverse norm of a row is a factor
of its logits: normalised q and k never go to global memory, but for keys with `Blocks.paired`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import vary_as
from pallas_kernels.scale_attention.hopper.backward import grad_keys, grad_queries
from pallas_kernels.scale_attention.hopper.blocks import HopperBlocks, candidates, table_entry, tuned_blocks
from pallas_kernels.scale_attention.hopper.forward import forward
from pallas_kernels.scale_attention.operands import Static, check_operands, ranges_for, say, sign_of

__all__ = ["HopperBlocks", "candidates", "hopper_attention", "hopper_attention_packed", "table_entry"]

HEAD_SIZES = (32, 64)  # whose vectors are as long as a swizzle, see `common`


def hopper_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_ranges: np.ndarray,
    q_scale: jax.Array | None,
    *,
    blocks: HopperBlocks | None = None,
) -> jax.Array:
    """As `reference_attention`, with products in the dtype of q and the rest in float32; differentiable.

    Args:
      q, k, v: (B,L,H,D), bfloat16 or float16, D of 32 or 64.
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


def hopper_attention_packed(
    qkv: jax.Array, key_ranges: np.ndarray, q_scale: jax.Array | None, *, blocks: HopperBlocks | None = None
) -> jax.Array:
    """As `hopper_attention`, of (B,L,3,H,D), q, k and v as one projection gives them. So is the gradient; no copies."""
    return _attend((qkv,), key_ranges, q_scale, blocks)


def _attend(
    qkv: tuple[jax.Array, ...], key_ranges: np.ndarray, q_scale: jax.Array | None, blocks: HopperBlocks | None
) -> jax.Array:
    """Of q, k, v, each (B,L,H,D), or one (B,L,3,H,D), checked."""
    check_operands(qkv)
    first, size = qkv[0], qkv[0].shape[-1]
    if first.dtype not in (jnp.bfloat16, jnp.float16) or size not in HEAD_SIZES:
        raise ValueError(f"The Hopper kernels take bfloat16 or float16 and heads of {HEAD_SIZES}, not {say(first)}.")
    ranges = ranges_for(first, key_ranges)
    blocks = blocks or tuned_blocks(ranges, q_scale is not None)
    blocks.check(size)
    return _attention(qkv, vary_as(first, q_scale), Static(ranges.tobytes(), blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(qkv: tuple[jax.Array, ...], q_scale: jax.Array | None, static: Static[HopperBlocks]) -> jax.Array:
    return _attention_forward(qkv, q_scale, static)[0]


def _attention_forward(
    qkv: tuple[jax.Array, ...], q_scale: jax.Array | None, static: Static[HopperBlocks]
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = vary_as(qkv[0], forward(qkv, q_scale, static.key_ranges, static.blocks.forward))
    return out, (qkv, q_scale, out, lse)


def _attention_backward(static: Static[HopperBlocks], residuals: tuple[Any, ...], dout: jax.Array) -> tuple[Any, Any]:
    qkv, q_scale, out, lse = residuals
    ranges, blocks = static.key_ranges, static.blocks
    dq, delta, dots = grad_queries(qkv, out, dout, lse, q_scale, ranges, blocks.grad_queries)
    given = qkv, dout, lse, delta, q_scale, ranges, blocks.grad_keys
    if len(qkv) == 3:
        gradients = (dq, *grad_keys(*given))
    else:
        packed = jax.new_ref(dq)  # its first third is done; the others are written in place
        grad_keys(*given, into=packed)
        gradients = (jax.freeze(packed),)
    dscale = None
    if q_scale is not None:
        dscale = sign_of(q_scale) * jnp.sum(dots[0][:, :, : dout.shape[1]], axis=(0, 2))
        dscale = dscale.astype(q_scale.dtype)
    return vary_as(qkv[0], (gradients, dscale))  # what references hold, as the packed one, cannot vary


_attention.defvjp(_attention_forward, _attention_backward)
