"""model + labels → a function of logits, for the sampler: HMAR's without memory, VAR's with kept keys and values.

Axis letters: B batch, N tokens of one scale, V codebook.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmar_jax.sampling import filters
from hmar_jax.sampling.sampler import Predict, ScaleInputs
from hmar_jax.sampling.schedule import Plan
from hmar_jax.transformer import fused
from hmar_jax.transformer.hmar import HMAR, BranchName, Condition


def predictor(model: HMAR, labels: jax.Array, null_label: int, plan: Plan) -> Predict:
    """The model as a function of logits; in guided passes a sample runs twice, with its label and without."""
    cond, ladder = _condition(model, labels, null_label, plan), model.ladder
    of_labels = cond.every(cond.embedding.shape[0] // labels.shape[0])

    @jax.named_scope("transformer")
    def predict(scale: int, inputs: ScaleInputs, cfg: jax.Array | None) -> jax.Array:
        given, tiled = (of_labels, inputs) if cfg is None else (cond, _twice(inputs))
        pooled = tiled.pooled if scale else tiled.pooled[:, :0]
        x = model.inputs(given, range(scale, scale + 1), pooled, tiled.current, tiled.masked)
        branch: BranchName = "next_scale" if inputs.masked is None else "masked"
        logits = model.predict(branch, x, given, ladder.only(scale), fused.logits)
        if cfg is None:
            return logits
        return filters.guide(*_apart(logits), cfg)

    return predict


def cached_predictor(model: HMAR, labels: jax.Array, null_label: int, plan: Plan) -> Predict:
    """As `predictor`, for VAR: a scale's tokens see the coarser ones, whose keys and values are kept between passes.

    Scales are to be asked for in order, once each. Where any pass is guided all run for the null label too, which has
    its own keys and values.
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
        of_labels, of_null = _apart(logits)
        return of_labels if cfg is None else filters.guide(of_labels, of_null, cfg)

    return predict


@jax.named_scope("transformer")
def _condition(model: HMAR, labels: jax.Array, null_label: int, plan: Plan) -> Condition:
    """Of the labels, each followed by the null label where any pass is guided.

    Side by side, not in two halves: where devices share the batch, one has both.
    """
    guided = any(any(steps) for steps in plan.guided)
    return model.condition(jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1).ravel() if guided else labels)


def _twice(inputs: ScaleInputs) -> ScaleInputs:
    """For both labels of guided samples."""
    return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), inputs)


def _apart(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of the labels, and of the null label, of guided samples."""
    return logits[::2], logits[1::2]
