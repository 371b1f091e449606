"""The operands of kernels, checked, and the static (hashable) arguments of a kernel call.

Axis letters: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.ranges import check_ranges


@dataclasses.dataclass(frozen=True)
class Static[Blocks]:
    """The static (hashable) arguments of a kernel call: the bytes of key_ranges, (L,2) int32, and sizes of tiles."""

    ranges: bytes
    blocks: Blocks

    @property
    def key_ranges(self) -> np.ndarray:
        return np.frombuffer(self.ranges, np.int32).reshape(-1, 2)


def check_operands(operands: Sequence[jax.Array]) -> None:
    """Raises ValueError unless they are q, k, v, each (B,L,H,D), or one (B,L,3,H,D)."""
    first = operands[0]
    if len(operands) == 1:
        if first.ndim != 5 or first.shape[2] != 3:
            raise ValueError(f"qkv is {say(first)}; expected (B, L, 3, H, D).")
    elif first.ndim != 4 or any((x.shape, x.dtype) != (first.shape, first.dtype) for x in operands):
        raise ValueError(f"q, k, v are {', '.join(map(say, operands))}; expected thrice the same (B, L, H, D).")


def ranges_for(operand: jax.Array, key_ranges: np.ndarray) -> np.ndarray:
    """The key ranges of an operand's tokens as (L,2) int32, one after the other in memory.

    Raises:
      ValueError: they are of other tokens, or not as `check_ranges` has them.
    """
    ranges = np.ascontiguousarray(key_ranges, np.int32)
    check_ranges(ranges)
    if len(ranges) != operand.shape[1]:
        raise ValueError(f"key_ranges are of {len(ranges)} tokens, {say(operand)} has {operand.shape[1]}.")
    return ranges


def say(array: jax.Array) -> str:
    """Dtype and shape."""
    return f"{array.dtype}{list(array.shape)}"


def sign_of(q_scale: jax.Array) -> jax.Array:
    """1 of 0."""
    return jnp.where(q_scale < 0, -1.0, 1.0)
