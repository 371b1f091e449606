"""q, k, v → attended values: the specification, dense and in float32 at highest precision.

Axis letters: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def reference_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: np.ndarray | jax.Array, q_scale: jax.Array | None
) -> jax.Array:
    """Every query i attends to the keys in [key_ranges[i,0], key_ranges[i,1]).

    Args:
      q: (B,N,H,D), k, v: (B,L,H,D), any float dtype.
      key_ranges: (N,2) int.
      q_scale: optional (H,). With it q and k are L2-normalised along D (eps 1e-12), q is multiplied by it and the
        softmax scale is 1; without it the softmax scale is D^-0.5.

    Returns:
      (B,N,H,D) in the dtype of q.
    """
    dtype = q.dtype
    q, k = scale_queries_and_keys(q, k, q_scale)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    keys = np.arange(k.shape[1])
    visible = (keys >= key_ranges[:, :1]) & (keys < key_ranges[:, 1:])
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v.astype(jnp.float32), precision="highest").astype(dtype)


def scale_queries_and_keys(q: jax.Array, k: jax.Array, q_scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Both in float32, such that their products are the logits."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    if q_scale is None:
        return q * q.shape[-1] ** -0.5, k
    return _normalize(q) * q_scale.astype(jnp.float32)[:, None], _normalize(k)


def _normalize(x: jax.Array) -> jax.Array:
    """L2 normalisation whose gradient is finite at zero: x / max(|x|, 1e-12)."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
