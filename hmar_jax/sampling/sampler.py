"""plan + controls + random keys → tokens and latent map: the loop over scales and steps (HMAR §4.3).

It is to be jitted whole. It takes functions of logits, not a model, so that a stand-in can be sampled from as well.
Axis letters: B batch, N tokens of one scale, L of all, h latents a side, V codebook, Z latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.sampling import filters, orders
from hmar_jax.sampling.presets import Order
from hmar_jax.sampling.schedule import Controls, Pass, Plan
from hmar_jax.tokenizer.quantizer import Quantizer


class ScaleInputs(NamedTuple):
    """What a pass knows: area(f_{k-1}) (B,N,Z), and for a masked pass area(u_k) (B,N,Z) and the mask (B,N) bool."""

    pooled: jax.Array
    current: jax.Array | None = None
    masked: jax.Array | None = None


class Draw(NamedTuple):
    """One pass's draw at every position.

    Attributes:
      tokens: (B,N) int32. masked: (B,N) bool, where it decides the token.
      confidence: (B,N) float32, the probability of each drawn token after guidance and filters.
    """

    tokens: jax.Array
    masked: jax.Array
    confidence: jax.Array


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
    tell: Callable[[int, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, list[Draw]]:
    """Samples all scales.

    Args:
      keys: (B,) one random key a sample, so that a picture depends on nothing but its own.
      greedy: argmax in place of filters and draw, and no noise on the confidence.
      leak_free: masked tokens are kept out of their scale's part of masked inputs, as in training.
      kept: tokens that stand from the start of their scale on; the steps share out those that are left, in the
        plan's proportions, rounded so that the first commit least.
      tell: given each scale and its tokens (B,N) once they are final; what it returns of them is used in their place.

    Returns:
      tokens (B,L) int32; the latent map f (B,h,h,Z) float32; every pass's draw, in order.
    """
    side = quantizer.ladder.sides[-1]
    latents = jnp.zeros((keys.shape[0], side, side, quantizer.codebook.shape[-1]))
    passes = jnp.asarray([at[:2] for scale in range(len(plan.counts)) for at in plan.passes(scale)], jnp.uint32)
    token_keys, order_keys = jax.vmap(pass_keys, in_axes=(None, 0, 0))(keys, *passes.T)
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
            drawn, confidence = _draw(logits, step, controls, token_keys, greedy)
            draws.append(Draw(drawn, masked, confidence))
            tokens = jnp.where(masked, drawn, tokens)
            if step.remaining:
                remaining = -(-step.remaining * to_draw // masked.shape[1])  # all of them, unless some are kept
                order = _order(plan.order, confidence, step, controls, order_keys, greedy)
                masked = filters.least_confident(order, masked, remaining)
        if tell is not None:
            tokens = tell(scale, tokens)
        committed.append(tokens)
        latents = latents + quantizer.lift(tokens, scale)
    return jnp.concatenate(committed, axis=1), latents, draws


def pass_keys(keys: jax.Array, scale: jax.Array | int, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """A pass's own keys for each sample, (B,) each: of its tokens, and of the order in which they are committed."""
    own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, scale), step)))(keys)
    return own[:, 0], own[:, 1]


def _draw(
    logits: jax.Array, step: Pass, controls: Controls, keys: jax.Array, greedy: bool
) -> tuple[jax.Array, jax.Array]:
    """Tokens and their probabilities, both (B,N); keys of all passes, (P,B)."""
    if greedy:
        return filters.argmax(logits)
    i = step.number
    filtered = filters.filter_logits(logits / controls.temperature[i], controls.top_k[i], controls.top_p[i])
    return filters.draw(filtered, keys[i])


def _order(
    policy: Order, confidence: jax.Array, step: Pass, controls: Controls, keys: jax.Array, greedy: bool
) -> jax.Array:
    """What decides which tokens are committed, (B,N): the greatest first; keys of all passes, (P,B)."""
    number = confidence.shape[1]
    match policy:
        case "random":  # the same in all steps of a scale
            return orders.random(keys[step.number - step.step], number)
        case "halton":
            return jnp.broadcast_to(-orders.halton(math.isqrt(number)), confidence.shape)
    if greedy:
        return confidence
    return orders.confident(confidence, controls.noise[step.number], keys[step.number])
