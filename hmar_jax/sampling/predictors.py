"""model + labels → a function of logits, for the sampler: HMAR's without memory, VAR's with kept keys and values.

Axis letters: B batch, N tokens of one scale, V codebook.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmar_jax.sampling import filters
from hmar_jax.sampling.sampler import Predict, ScaleInputs
from hmar_jax.sampling.schedule import Plan
from hmar_jax.transformer.hmar import HMAR, Condition


def predictor(model: HMAR, labels: jax.Array, null_label: int, plan: Plan) -> Predict:
    """The model as a function of logits; the null half runs in the same batch, where there is guidance at all."""
    cond = _condition(model, labels, null_label, plan)
    of_labels, ladder = cond.first(labels.shape[0]), model.ladder

    @jax.named_scope("transformer")
    def predict(scale: int, inputs: ScaleInputs, cfg: jax.Array | None) -> jax.Array:
        given, tiled = (of_labels, inputs) if cfg is None else (cond, _twice(inputs))
        pooled = tiled.pooled if scale else tiled.pooled[:, :0]
        x = model.inputs(given, range(scale, scale + 1), pooled, tiled.current, tiled.masked)
        run = model.next_scale_logits if inputs.masked is None else model.masked_logits
        logits = run(x, given, ladder.only(scale))
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
    cond = _condition(model, labels, null_label, plan)
    batch = cond.embedding.shape[0]
    guided, cache = batch > labels.shape[0], model.empty_cache(batch)

    @jax.named_scope("transformer")
    def predict(scale: int, inputs: ScaleInputs, cfg: jax.Array | None) -> jax.Array:
        nonlocal cache
        pooled = _twice(inputs).pooled if guided else inputs.pooled
        x = model.inputs(cond, range(scale, scale + 1), pooled if scale else pooled[:, :0])
        logits, cache = model.extend(x, cond, model.ladder.until(scale), cache)
        if not guided:
            return logits
        cond_logits, null_logits = jnp.split(logits, 2)
        return cond_logits if cfg is None else filters.guide(cond_logits, null_logits, cfg)

    return predict


@jax.named_scope("transformer")
def _condition(model: HMAR, labels: jax.Array, null_label: int, plan: Plan) -> Condition:
    """Of the labels and, where any pass is guided, as many null labels after them."""
    guided = any(any(steps) for steps in plan.guided)
    return model.condition(jnp.concatenate([labels, jnp.full_like(labels, null_label)]) if guided else labels)


def _twice(inputs: ScaleInputs) -> ScaleInputs:
    """For both halves of a guided batch."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
