"""q, k, v of a token pyramid → attended values on Hopper (H100, H200), by Mosaic GPU, with gradients.

Axis letters: B batch, L tokens, H heads, D head size.

`hopper_tiles` says which tiles to visit, `hopper_pipeline` how thread blocks are kept busy, `hopper_forward` and
`hopper_backward` what is computed. All read and write the token-major layout directly. No sum is split between thread
blocks, so results are bit-equal from run to run.

With QK-norm the loading warpgroup normalises column tiles in shared memory, and the inverse norm of a row is a factor
of its logits: normalised q and k never go to global memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.hopper_backward import grad_keys, grad_queries
from pallas_kernels.scale_attention.hopper_common import sign_of
from pallas_kernels.scale_attention.hopper_forward import forward
from pallas_kernels.scale_attention.ranges import check_ranges

HEAD_SIZES = (32, 64)  # whose vectors are as long as a swizzle, see `hopper_common`


def hopper_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: np.ndarray, q_scale: jax.Array | None
) -> jax.Array:
    """As `reference_attention`, with products in the dtype of q and the rest in float32; differentiable.

    Args:
      q, k, v: (B,L,H,D), bfloat16 or float16, D of 32 or 64.
      key_ranges: (L,2) int, static: query i attends to keys in [start, end). Neither bound ever decreases, no range is
        empty, and together they leave no gap.
      q_scale: optional (H,): QK-norm, as in `scale_attention`.

    Returns:
      (B,L,H,D) in the dtype of q.

    Raises:
      ValueError: shapes, dtypes or ranges are not supported.
    """
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype or q.ndim != 4:
        raise ValueError(f"q, k, v are {_say(q)}, {_say(k)}, {_say(v)}; expected thrice the same (B, L, H, D).")
    return _attention((q, k, v), q_scale, _check(q, key_ranges))


def hopper_attention_packed(qkv: jax.Array, key_ranges: np.ndarray, q_scale: jax.Array | None) -> jax.Array:
    """As `hopper_attention`, of (B,L,3,H,D), q, k and v as one projection gives them. So is the gradient; no copies."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv is {_say(qkv)}; expected (B, L, 3, H, D).")
    return _attention((qkv,), q_scale, _check(qkv, key_ranges))


class _Ranges:
    """Key ranges that can be a static argument."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.key = values.tobytes()

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ranges) and self.key == other.key


def _check(array: jax.Array, key_ranges: np.ndarray) -> _Ranges:
    if array.dtype not in (jnp.bfloat16, jnp.float16) or array.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"The Hopper kernels take bfloat16 or float16 and heads of {HEAD_SIZES}, not {_say(array)}.")
    ranges = np.asarray(key_ranges, np.int32)
    check_ranges(ranges)
    if len(ranges) != array.shape[1]:
        raise ValueError(f"key_ranges are of {len(ranges)} tokens, {_say(array)} has {array.shape[1]}.")
    return _Ranges(ranges)


def _say(array: jax.Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(qkv: tuple[jax.Array, ...], q_scale: jax.Array | None, ranges: _Ranges) -> jax.Array:
    return forward(qkv, q_scale, ranges.values)[0]


def _attention_forward(
    qkv: tuple[jax.Array, ...], q_scale: jax.Array | None, ranges: _Ranges
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = forward(qkv, q_scale, ranges.values)
    return out, (qkv, q_scale, out, lse)


def _attention_backward(ranges: _Ranges, residuals: tuple[Any, ...], dout: jax.Array) -> tuple[Any, Any]:
    qkv, q_scale, out, lse = residuals
    dq, delta, *dots = grad_queries(qkv, out, dout, lse, q_scale, ranges.values)
    given = qkv, dout, lse, delta, q_scale, ranges.values
    if len(qkv) == 3:
        gradients = (dq, *grad_keys(*given))
    else:
        packed = jax.new_ref(dq)  # its first third is done; the others are written in place
        grad_keys(*given, into=packed)
        gradients = (jax.freeze(packed),)
    if q_scale is None:
        return gradients, None
    dscale = sign_of(q_scale) * jnp.sum(dots[0][:, :, : dout.shape[1]], axis=(0, 2))
    return gradients, dscale.astype(q_scale.dtype)


_attention.defvjp(_attention_forward, _attention_backward)
