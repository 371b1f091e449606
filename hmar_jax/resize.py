"""side, side → the small matrix of a resize. Area and bicubic are linear along each axis: two contractions apply them.

Axis letters: B batch, Z channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# A resize whose Kronecker product has at most so many weights is one product. Larger ones are two: far fewer
# multiplications, but transposes between.
_AT_ONCE = 2**17


@functools.cache
def area_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32: adaptive average pooling, whose bins overlap where `target` doesn't divide `source`."""
    matrix = np.zeros((target, source), np.float32)
    for i in range(target):
        start, end = i * source // target, -((i + 1) * source // -target)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


@functools.cache
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float32: cubic convolution (a = -0.75), half-pixel centres, no antialiasing, edges repeated."""
    a = -0.75
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(centre - tap)
            if t <= 1:
                weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
            else:
                weight = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(tap, 0), source - 1)] += weight
    return matrix.astype(np.float32)


def apply(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Resizes both axes of a square map, in float32 at highest precision: (B,s,s,Z) → (B,t,t,Z)."""
    target, source = matrix.shape
    if target == source:
        return x  # both kinds of matrix are the identity there
    contract = functools.partial(jnp.einsum, precision="highest")
    if matrix.size**2 <= _AT_ONCE:
        # With the pixels last, as `thin_conv` has them, a GPU transposes nothing before or after.
        pixels = jnp.moveaxis(x, -1, 0).reshape(x.shape[-1], x.shape[0], source**2)
        resized = contract("zbm,nm->zbn", pixels, np.kron(matrix, matrix))
        return jnp.moveaxis(resized.reshape(*resized.shape[:2], target, target), 0, -1)
    m = jnp.asarray(matrix)
    return contract("uw,btwz->btuz", m, contract("th,bhwz->btwz", m, x))
