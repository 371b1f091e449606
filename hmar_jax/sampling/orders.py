"""order policy → which tokens of a scale are committed first: by confidence, at random, or spread out evenly.

Axis letters: B batch, N tokens of one scale, p its side.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.sampling.presets import ORDERS as ORDERS


def confident(confidence: jax.Array, noise: jax.Array, keys: jax.Array) -> jax.Array:
    """The published order (MaskGIT §3.2): log-confidence with Gumbel noise, (B,N) float32, the greatest first.

    Args:
      confidence: (B,N) float32 probabilities. noise: float32 (), the noise's factor; 0 leaves the confidence as it is.
      keys: (B,) random keys.
    """
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, confidence.shape[1:]))(keys)
    return jnp.where(noise > 0, jnp.log(confidence) + noise * gumbel, confidence)


def random(keys: jax.Array, number: int) -> jax.Array:
    """A uniformly random order of N tokens for each of the keys (B,): (B,N) float32, the greatest first."""
    return jax.vmap(lambda key: jax.random.uniform(key, (number,)))(keys)


@functools.cache
def halton(side: int) -> np.ndarray:
    """The place of each token, row by row, in a low-discrepancy order (Besnier et al. 2025): (p²,) int32, from 0.

    A position's place in the order is that of the first point of the Halton sequence in bases 2 (down) and 3 (across)
    that falls into it; the sequence starts at its first point, (1/2, 1/3).
    """
    # In any run of 2^a·3^b points there is one in each of 2^a by 3^b boxes. Where 2^a and 3^b are at least 2p, every
    # position holds a whole box.
    number = 2 ** math.ceil(math.log2(2 * side)) * 3 ** math.ceil(math.log(2 * side, 3))
    index = np.arange(1, number + 1)
    _, first = np.unique(_cell(index, 2, side) * side + _cell(index, 3, side), return_index=True)
    return np.argsort(np.argsort(first)).astype(np.int32)


def _cell(index: np.ndarray, base: int, side: int) -> np.ndarray:
    """Which of `side` equal parts of [0,1) has an index's radical inverse, its digits mirrored at the point: exact."""
    mirrored, power = np.zeros_like(index), 1
    while index.any():
        index, digit = np.divmod(index, base)
        mirrored, power = mirrored * base + digit, power * base
    return side * mirrored // power
