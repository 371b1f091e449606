"""tokens → transformer inputs: what each scale may know of the coarser ones, from the true tokens (HMAR §4.1, §4.3).

Axis letters: B batch, L tokens, Z latent channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.tokenizer.quantizer import Quantizer
from hmar_jax.transformer.fused import Output
from hmar_jax.transformer.hmar import HMAR


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


def predict[T](
    model: HMAR,
    quantizer: Quantizer,
    labels: jax.Array,
    tokens: jax.Array,
    output: Output[T],
    masked: jax.Array | None = None,
    key: jax.Array | None = None,
    *,
    leak_free: bool = False,
) -> T:
    """What the model predicts of all tokens, each from the true ones: by its next-scale branch, or under a mask.

    Args:
      labels: (B,) int32. tokens: (B,L) int32, the true ones.
      output: what to make of the logits: `fused.logits`, which are (B,L,V) float32, or `fused.scores_of(tokens)`.
      masked: (B,L) bool, the tokens that the mask branch is not shown; None for the next-scale branch.
      key: given in training, for drop-path.
      leak_free: keep masked tokens out of their scale's own part of the input; the model's config says which.
    """
    cond, scales = model.condition(labels), range(model.ladder.num_scales)
    if masked is None:
        x = model.inputs(cond, scales, teacher_inputs(quantizer, tokens).pooled)
        return model.predict("next_scale", x, cond, model.ladder, output, key)
    pooled, current = teacher_inputs(quantizer, tokens, masked if leak_free else None)
    x = model.inputs(cond, scales, pooled, current, masked[:, model.ladder.lengths[0] :])
    return model.predict("masked", x, cond, model.ladder, output, key)
