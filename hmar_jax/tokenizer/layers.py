"""What the CNN is made of, each as few trips to memory as it takes: norms, 1x1 convolutions, upsampling.

They hold the parameters of the layers of Flax that they replace. Axis letters: B batch, H, W map, C channels, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Activation = Callable[[jax.Array], jax.Array]
# Positions that the first of two reductions sums over: long enough for a GPU's blocks, and many of them.
_CHUNK = 1024


class GroupNorm(nnx.GroupNorm):
    """Group normalisation (Wu & He 2018) with statistics and arithmetic in float32.

    The map is read once for its statistics and once to be normalised, by a factor and a summand for each channel.
    Squares are summed about the group's mean in the middle row, so that a mean far from zero costs the variance no
    digits.
    """

    def __call__(self, x: jax.Array, activation: Activation = lambda y: y) -> jax.Array:  # type: ignore[override]
        """activation(norm(x)): (B,H,W,C) → the same, rounded once."""
        assert self.scale is not None and self.bias is not None
        mean, inverse = (self._of_channels(statistic) for statistic in self._statistics(x))
        factor = inverse * self.scale[...]
        # XLA would derive them from groups again for every pixel.
        factor, summand = jax.lax.optimization_barrier((factor, self.bias[...] - mean * factor))
        return _scale_shift(activation, x, factor, summand)

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and inverse standard deviation of each group, (B,G) float32."""
        batch, height, width, channels = x.shape
        fitting = (rows for rows in range(1, height + 1) if height % rows == 0 and rows * width <= _CHUNK)
        rows = max(fitting, default=1)
        middle = jax.lax.stop_gradient(self._mean(x[:, height // 2]))
        chunks = x.reshape(batch, -1, rows * width, channels).astype(jnp.float32)
        distance = chunks - jax.lax.optimization_barrier(self._of_channels(middle))
        shift, square = (self._mean(jnp.mean(d, axis=2)) for d in (distance, jnp.square(distance)))
        variance = jnp.maximum(square - jnp.square(shift), 0)
        return middle + shift, jax.lax.rsqrt(variance + self.epsilon)

    def _mean(self, values: jax.Array) -> jax.Array:
        """(B,…,C) → (B,G) float32."""
        grouped = values.astype(jnp.float32).reshape(values.shape[0], -1, self.num_groups, self.group_size)
        return jnp.mean(grouped, axis=(1, 3))

    def _of_channels(self, values: jax.Array) -> jax.Array:
        """(B,G) → (B,1,1,C)."""
        return jnp.repeat(values, self.group_size, axis=1)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scale_shift(activation: Activation, x: jax.Array, factor: jax.Array, summand: jax.Array) -> jax.Array:
    """activation(factor·x + summand) in float32, for x (B,H,W,C) of any dtype, factor and summand (B,1,1,C) float32.

    The gradient keeps x alone, and is rounded to its dtype before the activation, as between layers.
    """
    return activation(x.astype(jnp.float32) * factor + summand).astype(x.dtype)


def _scale_shift_forward(activation: Activation, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _scale_shift(activation, *inputs), inputs


def _scale_shift_backward(
    activation: Activation, inputs: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    x, factor, summand = inputs
    _, pull = jax.vjp(activation, x.astype(jnp.float32) * factor + summand)
    # Else XLA would skip the rounding, and write it to memory in float32.
    inner = jax.lax.optimization_barrier(pull(gradient.astype(jnp.float32))[0].astype(x.dtype)).astype(jnp.float32)
    products = (jnp.sum(product, axis=(1, 2), keepdims=True) for product in (inner * x.astype(jnp.float32), inner))
    return (inner * factor).astype(x.dtype), *products


_scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)


class PointwiseConv(nnx.Conv):
    """A 1x1 convolution as the matrix product that it is."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        assert self.bias is not None
        return x @ self.kernel[0, 0].astype(x.dtype) + self.bias[...].astype(x.dtype)


class UpsampleConv(nnx.Conv):
    """Nearest neighbours ×2, then a 3x3 convolution: (B,H,W,C) → (B,2H,2W,C').

    Of the nine pixels under a kernel at most four differ, so that the kernel folds into one of 2x2 for each of the four
    pixels that an input pixel becomes: 4/9 of the products, at the input's resolution.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        assert self.bias is not None
        batch, height, width, _ = x.shape
        kernel = _fold(_fold(self.kernel[...].astype(jnp.float32), 0), 1)  # (2,2,C,C',2,2), the last which of four
        kernel = jnp.moveaxis(kernel, 3, 5).reshape(2, 2, kernel.shape[2], -1).astype(x.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=layout)
        y = (y + jnp.tile(self.bias[...], 4).astype(x.dtype)).reshape(batch, height + 1, width + 1, 2, 2, -1)
        # The upper of two pixels looks one pixel up, the lower one down; likewise left and right.
        rows = [jnp.stack([y[:, a : a + height, b : b + width, a, b] for b in (0, 1)], axis=3) for a in (0, 1)]
        return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _fold(kernel: jax.Array, axis: int) -> jax.Array:
    """Three taps along an axis → two, for the first and the second pixel of a pair, which the new last axis tells."""
    first, middle, last = (jax.lax.index_in_dim(kernel, tap, axis, keepdims=False) for tap in range(3))
    pairs = ((first, middle + last), (first + middle, last))
    return jnp.stack([jnp.stack(taps, axis) for taps in pairs], axis=-1)
