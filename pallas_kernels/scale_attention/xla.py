"""q, k, v → attended values by plain XLA, scale by scale: runs anywhere, and computes no pair that the mask hides.

Axis letters: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.reference import scale_queries_and_keys


def xla_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: np.ndarray, q_scale: jax.Array | None
) -> jax.Array:
    """As `reference_attention`, with products in the dtype of q and softmax in float32.

    Queries that share a key range, those of a scale, make one dense attention.
    """
    dtype = q.dtype
    q, k = (x.astype(dtype) for x in scale_queries_and_keys(q, k, q_scale))
    parts, first = [], 0
    for (start, end), run in itertools.groupby(map(tuple, key_ranges.tolist())):
        last = first + sum(1 for _ in run)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q[:, first:last], k[:, start:end], preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        parts.append(jnp.einsum("bhqk,bkhd->bqhd", weights, v[:, start:end]))
        first = last
    return jnp.concatenate(parts, axis=1)
