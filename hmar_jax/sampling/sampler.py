"""plan + controls + random keys → tokens and latent map: the loop over scales and steps (HMAR §4.3).

It is to be jitted whole. It takes functions of logits, not a model, so that a stand-in can be sampled from as well.
Axis letters: B batch, N tokens of one scale, L of all, h latents a side, V codebook, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.sampling import filters
from hmar_jax.sampling.schedule import Controls, Pass, Plan
from hmar_jax.tokenizer.quantizer import Quantizer


class ScaleInputs(NamedTuple):
    """What a pass knows: area(f_{k-1}) (B,N,Z), and for a masked pass area(u_k) (B,N,Z) and the mask (B,N) bool."""

    pooled: jax.Array
    current: jax.Array | None = None
    masked: jax.Array | None = None


class Draw(NamedTuple):
    """One pass's draw at every position: tokens (B,N) int32; masked (B,N) bool, where it decides the token."""

    tokens: jax.Array
    masked: jax.Array


class Kept(NamedTuple):
    """What editing leaves as it is: tokens (B,L) int32 where keep (B,L) bool; the others are drawn."""

    tokens: jax.Array
    keep: jax.Array


# (scale, inputs, cfg) → guided logits (B,N,V) float32; cfg is None where the pass is not guided.
Predict = Callable[[int, ScaleInputs, jax.Array | None], jax.Array]


def sample_tokens(
    predict: Predict,
    quantizer: Quantizer,
    plan: Plan,
    controls: Controls,
    keys: jax.Array,
    *,
    greedy: bool = False,
    leak_free: bool = False,
    kept: Kept | None = None,
) -> tuple[jax.Array, jax.Array, list[Draw]]:
    """Samples all scales.

    Args:
      keys: (B,) one random key a sample, so that a picture depends on nothing but its own.
      greedy: argmax in place of filters and draw.
      leak_free: masked tokens are kept out of their scale's part of masked inputs, as in training.
      kept: tokens that stand from the start of their scale on; the steps share out those that are left, in the
        plan's proportions, rounded so that the first commit least.

    Returns:
      tokens (B,L) int32; the latent map f (B,h,h,Z) float32; every pass's draw, in order.
    """
    side = quantizer.ladder.sides[-1]
    latents = jnp.zeros((keys.shape[0], side, side, quantizer.codebook.shape[-1]))
    committed, draws = [], []
    for scale in range(len(plan.counts)):
        pooled = quantizer.pool(latents, scale)
        if kept is None:
            tokens, masked = jnp.zeros(pooled.shape[:2], jnp.int32), jnp.ones(pooled.shape[:2], bool)
        else:
            where = quantizer.ladder.slices[scale]
            tokens, masked = kept.tokens[:, where], ~kept.keep[:, where]
        to_draw = jnp.sum(masked, axis=1)
        for step in plan.passes(scale):
            inputs = ScaleInputs(pooled)
            if step.step:
                lift = quantizer.lift(tokens, scale, ~masked if leak_free else None)
                inputs = ScaleInputs(pooled, quantizer.pool(lift, scale), masked)
            logits = predict(scale, inputs, controls.cfg[step.number] if step.guided else None)
            drawn, confidence = _draw(logits, step, controls, keys, greedy)
            draws.append(Draw(drawn, masked))
            tokens = jnp.where(masked, drawn, tokens)
            remaining = -(-step.remaining * to_draw // masked.shape[1])  # all of them, unless some are kept
            masked = filters.least_confident(confidence, masked, remaining)
        committed.append(tokens)
        latents = latents + quantizer.lift(tokens, scale)
    return jnp.concatenate(committed, axis=1), latents, draws


def _draw(
    logits: jax.Array, step: Pass, controls: Controls, keys: jax.Array, greedy: bool
) -> tuple[jax.Array, jax.Array]:
    """Tokens and the confidence that orders their commitment, both (B,N)."""
    if greedy:
        return filters.argmax(logits)
    own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step.scale), step.step)))
    token_keys, order_keys = jnp.moveaxis(own(keys), 1, 0)
    i = step.number
    filtered = filters.filter_logits(logits / controls.temperature[i], controls.top_k[i], controls.top_p[i])
    tokens, confidence = filters.draw(filtered, token_keys)
    if step.remaining:
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, confidence.shape[1:]))(order_keys)
        noisy = jnp.log(confidence) + controls.noise[i] * gumbel
        confidence = jnp.where(controls.noise[i] > 0, noisy, confidence)
    return tokens, confidence
