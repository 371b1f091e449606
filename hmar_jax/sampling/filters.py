"""logits → tokens and their confidence: guidance, top-k, top-p, draw, order of commitment.

Axis letters: B batch, N tokens of one scale, V codebook. Random numbers are per sample: `keys` is (B,).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guide(cond: jax.Array, null: jax.Array, cfg: jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans 2022) as VAR scales it: (1+t)·cond - t·null."""
    return (1 + cfg) * cond - cfg * null


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Top-k, then top-p of what is left: (…,V) float32, dropped logits -inf.

    Args:
      top_k: int32, logits kept, with all that tie with the last; 0 or V keeps all.
      top_p: float32 in (0,1]; the ascending tail of mass at most 1 - top_p goes, with no tie between kept and dropped
        (a value equal to a kept one is kept). The largest stays always.
    """
    size = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    kth = jnp.take(ascending, size - kept, axis=-1)[..., None]
    ascending = jnp.where(ascending < kth, -jnp.inf, ascending)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    dropped = (mass <= 1 - top_p).at[..., -1].set(False)
    # Both filters keep a run at the top, so one threshold says it all.
    threshold = jnp.min(jnp.where(dropped, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def draw(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples every token: (B,N,V) filtered logits → tokens (B,N) int32, their probabilities (B,N) float32."""
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)
    return tokens, _probability(logits, tokens)


def argmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens, and their probabilities, as `draw` gives them."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, _probability(logits, tokens)


def _probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]


def least_confident(confidence: jax.Array, candidates: jax.Array, number: jax.Array | int) -> jax.Array:
    """Which `number` of the candidates have the least confidence, the lowest index first among ties: (B,N) bool.

    Args:
      confidence: (B,N) float32. candidates: (B,N) bool. number: int32 () or (B,), at most a row's candidates.
    """
    order = jnp.lexsort((confidence, ~candidates), axis=-1)  # candidates first, whatever the others' confidence
    rows = jnp.arange(confidence.shape[0])[:, None]
    among_least = jnp.arange(confidence.shape[1]) < jnp.asarray(number)[..., None]
    return jnp.zeros_like(candidates).at[rows, order].set(among_least)
