"""tokens → transformer inputs: what each scale may know of the coarser ones, from the true tokens (HMAR §4.1, §4.3).

Axis letters: B batch, L tokens, Z latent channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.tokenizer.quantizer import Quantizer
from hmar_jax.transformer.fused import Scores
from hmar_jax.transformer.hmar import HMAR, Condition


class TeacherInputs(NamedTuple):
    """Both (B, L - p_1², Z) float32, all scales but the first joined.

    Attributes:
      pooled: area(f_{k-1}, p_k), the reconstruction so far as scale k sees it.
      current: area(u_k, p_k), scale k's own part, for masked inputs.
    """

    pooled: jax.Array
    current: jax.Array


def teacher_inputs(quantizer: Quantizer, tokens: jax.Array, masked: jax.Array | None = None) -> TeacherInputs:
    """Latents that the inputs of all scales are made from.

    Args:
      tokens: (B,L) int32, the true ones.
      masked: optional (B,L) bool; tokens to keep out of `current` (leak-free inputs). `pooled` has all tokens.
    """
    split = quantizer.split(tokens)
    hidden = None if masked is None else quantizer.split(masked)
    lifts = [quantizer.lift(of_scale, scale) for scale, of_scale in enumerate(split)]
    pooled, current, latents = [], [], jnp.zeros_like(lifts[0])
    for scale in range(1, len(split)):
        latents = latents + lifts[scale - 1]
        pooled.append(quantizer.pool(latents, scale))
        lift = lifts[scale] if hidden is None else quantizer.lift(split[scale], scale, ~hidden[scale])
        current.append(quantizer.pool(lift, scale))
    empty = jnp.zeros((tokens.shape[0], 0, lifts[0].shape[-1]))
    return TeacherInputs(*(jnp.concatenate([empty, *parts], axis=1) for parts in (pooled, current)))


def next_scale_logits(
    model: HMAR, quantizer: Quantizer, labels: jax.Array, tokens: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Teacher-forced logits of all scales: labels (B,), tokens (B,L) → (B,L,V) float32. With `key` it is training."""
    x, cond = _next_scale_inputs(model, quantizer, labels, tokens)
    return model.next_scale_logits(x, cond, model.ladder, key)


def next_scale_scores(
    model: HMAR, quantizer: Quantizer, labels: jax.Array, tokens: jax.Array, key: jax.Array | None = None
) -> Scores:
    """How `next_scale_logits` meet the tokens."""
    x, cond = _next_scale_inputs(model, quantizer, labels, tokens)
    return model.next_scale_scores(x, cond, model.ladder, tokens, key)


def masked_logits(
    model: HMAR,
    quantizer: Quantizer,
    labels: jax.Array,
    tokens: jax.Array,
    masked: jax.Array,
    key: jax.Array | None = None,
    *,
    leak_free: bool,
) -> jax.Array:
    """Logits of the mask branch under a mask (B,L) bool: → (B,L,V) float32. With `key` it is training.

    Args:
      leak_free: keep masked tokens out of their scale's own part of the input; the model's config says which.
    """
    x, cond = _masked_inputs(model, quantizer, labels, tokens, masked, leak_free)
    return model.masked_logits(x, cond, model.ladder, key)


def masked_scores(
    model: HMAR,
    quantizer: Quantizer,
    labels: jax.Array,
    tokens: jax.Array,
    masked: jax.Array,
    key: jax.Array | None = None,
    *,
    leak_free: bool,
) -> Scores:
    """How `masked_logits` meet the tokens, masked or not."""
    x, cond = _masked_inputs(model, quantizer, labels, tokens, masked, leak_free)
    return model.masked_scores(x, cond, model.ladder, tokens, key)


def _next_scale_inputs(
    model: HMAR, quantizer: Quantizer, labels: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, Condition]:
    """(B,L,C), and the condition."""
    cond = model.condition(labels)
    return model.inputs(cond, range(model.ladder.num_scales), teacher_inputs(quantizer, tokens).pooled), cond


def _masked_inputs(
    model: HMAR, quantizer: Quantizer, labels: jax.Array, tokens: jax.Array, masked: jax.Array, leak_free: bool
) -> tuple[jax.Array, Condition]:
    """(B,L,C), and the condition."""
    cond = model.condition(labels)
    pooled, current = teacher_inputs(quantizer, tokens, masked if leak_free else None)
    hidden = masked[:, model.ladder.lengths[0] :]
    return model.inputs(cond, range(model.ladder.num_scales), pooled, current, hidden), cond
