"""ladder → what the two transformer stages weigh, mask and measure, scale by scale.

Axis letters: B batch, K scales, L tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder


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


def per_scale(values: jax.Array, weights: jax.Array, ladder: ScaleLadder) -> jax.Array:
    """Weighted mean of (B,L) values in each scale: (K,) float32, 0 where all weights are 0."""
    sums = [(jnp.sum((values * weights)[:, s]), jnp.sum(weights[:, s])) for s in ladder.slices]
    return jnp.stack([total / jnp.maximum(weight, 1e-9) for total, weight in sums])
