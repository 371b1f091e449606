"""q, k, v → attended values by plain XLA, scale by scale: runs anywhere, and computes next to no pair that is hidden.

Axis letters: B batch, L tokens, N queries, H heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.ranges import runs
from pallas_kernels.scale_attention.reference import scale_queries_and_keys

# Neighbouring scales of up to so many tokens together make one masked attention: on an accelerator each would cost more
# to launch than the hidden pairs cost to compute.
MERGED_TOKENS = 128


class Part(NamedTuple):
    """Queries [first, last) attend to keys [start, end), as far as `visible` (N,keys) lets them; None hides nothing."""

    first: int
    last: int
    start: int
    end: int
    visible: np.ndarray | None


def parts(key_ranges: np.ndarray) -> Iterator[Part]:
    """The dense attentions that cover all queries: a large scale by itself, neighbouring small ones together."""
    merged: list[tuple[int, int]] = []
    for run in runs(key_ranges):
        if merged and run.last - merged[-1][0] <= MERGED_TOKENS:
            merged[-1] = (merged[-1][0], run.last)
        else:
            merged.append((run.first, run.last))
    for first, last in merged:
        own = key_ranges[first:last]
        start, end = own[:, 0].min(), own[:, 1].max()
        keys = np.arange(start, end)
        visible = (keys >= own[:, :1]) & (keys < own[:, 1:])
        yield Part(first, last, int(start), int(end), None if visible.all() else visible)


def xla_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: np.ndarray, q_scale: jax.Array | None
) -> jax.Array:
    """As `reference_attention`, with products in the dtype of q and softmax in float32."""
    dtype = q.dtype
    # As in the kernels, float32 is float32: accelerators would multiply parts of its bits.
    einsum = functools.partial(jnp.einsum, precision="highest" if dtype == jnp.float32 else None)
    q, k = (x.astype(dtype) for x in scale_queries_and_keys(q, k, q_scale))
    attended = []
    for part in parts(key_ranges):
        queries, keys = slice(part.first, part.last), slice(part.start, part.end)
        logits = einsum("bqhd,bkhd->bhqk", q[:, queries], k[:, keys], preferred_element_type=jnp.float32)
        if part.visible is not None:
            logits = jnp.where(part.visible, logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        attended.append(einsum("bhqk,bkhd->bqhd", weights, v[:, keys]))
    return jnp.concatenate(attended, axis=1)
