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
from hmar_jax.transformer.hmar import HMAR


class ScaleInputs(NamedTuple):
    """What a pass knows: area(f_{k-1}) (B,N,Z), and for a masked pass area(u_k) (B,N,Z) and the mask (B,N) bool."""

    pooled: jax.Array
    current: jax.Array | None = None
    masked: jax.Array | None = None


class Draw(NamedTuple):
    """One pass's draw at every position: tokens (B,N) int32; masked (B,N) bool, where it decides the token."""

    tokens: jax.Array
    masked: jax.Array


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
) -> tuple[jax.Array, jax.Array, list[Draw]]:
    """Samples all scales.

    Args:
      keys: (B,) one random key a sample, so that a picture depends on nothing but its own.
      greedy: argmax in place of filters and draw.
      leak_free: masked tokens are kept out of their scale's part of masked inputs, as in training.

    Returns:
      tokens (B,L) int32; the latent map f (B,h,h,Z) float32; every pass's draw, in order.
    """
    side = quantizer.ladder.sides[-1]
    latents = jnp.zeros((keys.shape[0], side, side, quantizer.codebook.shape[-1]))
    committed, draws = [], []
    for scale in range(len(plan.counts)):
        pooled = quantizer.pool(latents, scale)
        tokens = jnp.zeros(pooled.shape[:2], jnp.int32)
        masked = jnp.ones(pooled.shape[:2], bool)
        for step in plan.passes(scale):
            inputs = ScaleInputs(pooled)
            if step.step:
                lift = quantizer.lift(tokens, scale, ~masked if leak_free else None)
                inputs = ScaleInputs(pooled, quantizer.pool(lift, scale), masked)
            logits = predict(scale, inputs, controls.cfg[step.number] if step.guided else None)
            drawn, confidence = _draw(logits, step, controls, keys, greedy)
            draws.append(Draw(drawn, masked))
            tokens = jnp.where(masked, drawn, tokens)
            masked = filters.least_confident(confidence, masked, step.remaining)
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


def predictor(model: HMAR, labels: jax.Array, null_label: int) -> Predict:
    """The model as a function of logits; the null half runs in the same batch, where there is guidance at all."""
    ladder = model.ladder

    def predict(scale: int, inputs: ScaleInputs, cfg: jax.Array | None) -> jax.Array:
        if cfg is None:
            both, tiled = labels, inputs
        else:
            both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
            tiled = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
        cond = model.condition(both)
        pooled = tiled.pooled if scale else tiled.pooled[:, :0]
        x = model.inputs(cond, range(scale, scale + 1), pooled, tiled.current, tiled.masked)
        run = model.next_scale_logits if inputs.masked is None else model.masked_logits
        logits = run(x, cond, ladder.only(scale))
        if cfg is None:
            return logits
        cond_logits, null_logits = jnp.split(logits, 2)
        return filters.guide(cond_logits, null_logits, cfg)

    return predict


def cached_predictor(model: HMAR, labels: jax.Array, null_label: int, plan: Plan) -> Predict:
    """As `predictor`, for VAR: a scale's tokens see the coarser ones, whose keys and values are kept between passes.

    Scales are to be asked for in order, once each. Where any pass is guided all run the null half, which has its own
    keys and values.
    """
    guided = any(any(steps) for steps in plan.guided)
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)]) if guided else labels
    cond, cache = model.condition(both), model.empty_cache(both.shape[0])

    def predict(scale: int, inputs: ScaleInputs, cfg: jax.Array | None) -> jax.Array:
        nonlocal cache
        pooled = jnp.concatenate([inputs.pooled] * 2) if guided else inputs.pooled
        x = model.inputs(cond, range(scale, scale + 1), pooled if scale else pooled[:, :0])
        logits, cache = model.extend(x, cond, model.ladder.until(scale), cache)
        if not guided:
            return logits
        cond_logits, null_logits = jnp.split(logits, 2)
        return cond_logits if cfg is None else filters.guide(cond_logits, null_logits, cfg)

    return predict
