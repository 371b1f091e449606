"""q, k, v of a token pyramid → attended values. The one door to every implementation.

Axis letters: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, Protocol

import jax
import numpy as np

from pallas_kernels.scale_attention.reference import reference_attention
from pallas_kernels.scale_attention.xla import xla_attention

logger = logging.getLogger(__name__)

Implementation = Literal["reference", "xla"]


class Ladder(Protocol):
    """What attention must know of the geometry; `hmar_jax.ScaleLadder` is one."""

    @property
    def length(self) -> int:
        """L."""

    def key_ranges(self, pattern: Any) -> np.ndarray:
        """(L,2) int32: query i attends to keys in [start, end)."""


def scale_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ladder: Ladder,
    *,
    pattern: Literal["block_diagonal", "block_causal"],
    q_scale: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attention among the tokens of one scale (`block_diagonal`) or of all scales so far (`block_causal`).

    Args:
      q, k, v: (B,L,H,D), bfloat16, float16 or float32. q may hold the last tokens alone, as when sampling with the keys
        and values of coarser scales kept.
      ladder: the scales that the L tokens are joined from; static.
      pattern: which keys a query sees.
      q_scale: optional (H,) float32. With it q and k are L2-normalised along D, q is multiplied by it, and the softmax
        scale is 1 (QK-norm, Henry et al. 2020); without it the softmax scale is D^-0.5.
      implementation: `reference` (dense, float32) or `xla` (scale by scale); None takes `xla`.

    Returns:
      As q, in shape and dtype.

    Raises:
      ValueError: L is not the ladder's, or the forced implementation is unknown.
    """
    length = ladder.length
    whole = q.ndim == 4 and (q.shape[0], length, *q.shape[2:]) == k.shape == v.shape
    if not whole or not 0 < q.shape[1] <= length:
        raise ValueError(
            f"q, k, v are {q.shape}, {k.shape}, {v.shape}; expected thrice (B, {length}, H, D) for {ladder}, q perhaps "
            "with the last tokens alone."
        )
    ranges = ladder.key_ranges(pattern)[length - q.shape[1] :]
    chosen = implementation or "xla"
    _announce(chosen)
    match chosen:
        case "xla":
            return xla_attention(q, k, v, ranges, q_scale)
        case "reference":
            return reference_attention(q, k, v, ranges, q_scale)
        case _:
            raise ValueError(f"scale_attention has no implementation {implementation!r}; use 'xla' or 'reference'.")


@functools.cache
def _announce(implementation: str) -> None:
    """Says once which implementation runs."""
    logger.info("scale_attention runs as %s.", implementation)
