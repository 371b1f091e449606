"""ladder → what the two transformer stages weigh, mask and measure, scale by scale.

Axis letters: B batch, K scales, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

_LEAST = 1e-9  # that is divided by


def scale_weights(ladder: ScaleLadder, kind: str) -> np.ndarray:
    """(L,) float32: what a token's cross-entropy weighs; sums to 1.

    `log_normal` (HMAR §4.2): with m, s the mean and sample deviation of p_k/p_K and z_k = (p_{K+1-k}/p_K - m)/s,
    scale k weighs the normal density at z_k. `uniform` weighs all tokens alike (VAR), `equal` all scales.
    """
    sides = np.asarray(ladder.sides, np.float64)
    match kind:
        case "log_normal" if ladder.num_scales > 1:
            ratios = sides / sides[-1]
            z = (ratios[::-1] - ratios.mean()) / ratios.std(ddof=1)
            of_scale = np.exp(-(z**2) / 2)
        case "log_normal" | "equal":
            of_scale = np.ones_like(sides)
        case "uniform":
            of_scale = sides**2
        case _:
            raise InputError(f"objective.scale_weights is {kind!r}; use 'log_normal', 'uniform' or 'equal'.")
    of_scale = of_scale / of_scale.sum()
    return np.repeat(of_scale / sides**2, ladder.lengths).astype(np.float32)


def random_masks(key: jax.Array, ladder: ScaleLadder) -> jax.Array:
    """(L,) bool: ceil(γ p_k²) positions of every scale but the first, γ ~ U(0,1) the same for all (HMAR §4.3)."""
    ratio_key, key = jax.random.split(key)
    ratio = jax.random.uniform(ratio_key)
    masks = [jnp.zeros((ladder.lengths[0],), bool)]
    for scale, length in enumerate(ladder.lengths[1:], 1):
        order = jax.random.permutation(jax.random.fold_in(key, scale), length)
        masks.append(order < jnp.ceil(ratio * length))
    return jnp.concatenate(masks)


class Mean(NamedTuple):
    """A weighted mean over some of a batch's tokens, which may be fewer in one part of a batch than in another.

    Attributes:
      value: scalar or (K,) float32, 0 where all weights are 0. weight: their sum, of the same shape.
    """

    value: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> Mean:
        """Of all values with weights of the same shape."""
        total = jnp.sum(weights)
        return cls(jnp.sum(values * weights) / jnp.maximum(total, _LEAST), total)


def joined(metrics: Mapping[str, jax.Array | Mean]) -> dict[str, jax.Array]:
    """Metrics of parts of a batch, along a leading axis, → of the whole: `Mean`s by their weights, others alike."""

    def join(part: jax.Array | Mean) -> jax.Array:
        if not isinstance(part, Mean):
            return jnp.mean(part, axis=0)
        return jnp.sum(part.value * part.weight, axis=0) / jnp.maximum(jnp.sum(part.weight, axis=0), _LEAST)

    return {name: join(part) for name, part in metrics.items()}


def per_scale(values: jax.Array, weights: jax.Array, ladder: ScaleLadder) -> Mean:
    """Weighted means of (B,L) values in each scale, (K,)."""
    means = [Mean.of(values[:, where], weights[:, where]) for where in ladder.slices]
    return Mean(*map(jnp.stack, zip(*means, strict=True)))
