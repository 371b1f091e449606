"""model + labels → a function of logits, for the sampler: HMAR's without memory, VAR's with kept keys and values.

Axis letters: B batch, N tokens of one scale, V codebook.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmar_jax.sampling import filters
from hmar_jax.sampling.sampler import Predict, ScaleInputs
from hmar_jax.sampling.schedule import Plan
from hmar_jax.transformer.hmar import HMAR


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
