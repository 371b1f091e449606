"""What the CNN is made of, each as few trips to memory as it takes: norms, upsampling, narrow convolutions.

Layers hold the parameters of those of Flax that they replace. Axis letters: B batch, H, W map, C channels, G groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

Activation = Callable[[jax.Array], jax.Array]
# The pixels of a map are summed in stretches of this many or more, and of more where a batch has so many stretches: a
# GPU's blocks are then long, and enough to fill it.
_STRETCH, _STRETCHES = 1024, 256
# Numbers that the threads of a warp read side by side.
_LANES = 128


class GroupNorm(nnx.GroupNorm):
    """Group normalisation (Wu & He 2018) with statistics and arithmetic in float32.

    The map is read once for its statistics and once to be normalised, by a factor and a summand for each channel.
    One reading must give mean and variance, and E[x²] - E[x]² would cancel where the mean is far from zero. So moments
    are taken about p, the pixel in the middle of a channel's map, and put together to those of the group. With E the
    mean over the pixels of a channel, G that over the channels of its group, and m the mean of the group:

        shift = E[x-p], square = E[(x-p)²]            `_moments`
        m = G[p + shift]
        variance = G[E[(x-m)²]] = G[square - shift² + (p + shift - m)²]

    Here square - shift² cancels only where p is an outlier. The N pixels of a channel have |p - E[x]| ≤ σ·sqrt(N-1)
    (Samuelson's inequality), so the relative error is at most N times that of float32: 0.4% for one bright pixel in a
    flat map of 256x256.
    """

    def __call__(self, x: jax.Array, activation: Activation = lambda y: y) -> jax.Array:  # type: ignore[override]
        """activation(norm(x)): (B,H,W,C) → the same, rounded once."""
        assert self.scale is not None and self.bias is not None
        mean, inverse = self._statistics(x)
        factor = inverse * self.scale[...]
        # XLA would derive them from groups again for every pixel.
        factor, summand = jax.lax.optimization_barrier((factor, self.bias[...] - mean * factor))
        return _scale_shift(activation, x, factor[:, None, None], summand[:, None, None])

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and inverse standard deviation of each channel's group, (B,C) float32."""
        middle = jax.lax.stop_gradient(x[:, x.shape[1] // 2, x.shape[2] // 2]).astype(jnp.float32)
        narrow, wide = (functools.partial(_moments, lanes) for lanes in (1, _LANES))
        # A TPU would have to lay the map out anew to take pixels apart that lie side by side.
        shift, square = jax.lax.platform_dependent(x, middle, tpu=narrow, default=wide)
        mean = self._of_group(middle + shift)
        variance = self._of_group(square - jnp.square(shift) + jnp.square(middle + shift - mean))
        return mean, jax.lax.rsqrt(jnp.maximum(variance, 0) + self.epsilon)

    def _of_group(self, values: jax.Array) -> jax.Array:
        """The mean over each channel's group: (B,C) → (B,C)."""
        groups = values.reshape(values.shape[0], self.num_groups, self.group_size)
        return jnp.repeat(jnp.mean(groups, axis=2), self.group_size, axis=1)


def _moments(lanes: int, x: jax.Array, middle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E[x-p] and E[(x-p)²] over the pixels of each channel: x (B,H,W,C), p = `middle` (B,C) → twice (B,C) float32.

    The pixels of a map are numbered row by row and summed in two steps, which decides only the order of the sum:

        (B,H,W,C) = (B, stretches, pixels of a stretch / apart, apart, C)
                                   └ summed first ┘      └ summed second, with the stretches

    A stretch is some rows of the map. `apart` neighbouring pixels have sums of their own, so that a row of the array,
    apart·C numbers, is a multiple of `lanes` where it can be: with lanes=128, apart is 4 for C=160 (640 = 5·128).
    """
    batch, height, width, channels = x.shape
    stretch = max(_STRETCH, batch * height * width // _STRETCHES)
    fitting = (rows for rows in range(1, height + 1) if height % rows == 0 and rows * width <= stretch)
    stretch = width * max(fitting, default=1)
    apart = math.gcd(lanes // math.gcd(lanes, channels), stretch)
    stretches = x.reshape(batch, -1, stretch // apart, apart, channels).astype(jnp.float32)
    distance = stretches - middle[:, None, None, None]
    shift, square = (jnp.mean(jnp.mean(d, axis=2), axis=(1, 2)) for d in (distance, jnp.square(distance)))
    return shift, square


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scale_shift(activation: Activation, x: jax.Array, factor: jax.Array, summand: jax.Array) -> jax.Array:
    """activation(factor·x + summand) in float32, for x (B,H,W,C) of any dtype, factor and summand (B,1,1,C) float32.

    The gradient keeps x alone, and is rounded to its dtype before the activation, as between layers.
    """

    def plainly(x: jax.Array, factor: jax.Array, summand: jax.Array) -> jax.Array:
        return activation(x.astype(jnp.float32) * factor + summand).astype(x.dtype)

    if x.dtype != jnp.bfloat16 or x.shape[-1] % 2:
        return plainly(x, factor, summand)
    pairwise = functools.partial(_pairwise, plainly)
    return jax.lax.platform_dependent(x, factor, summand, cuda=pairwise, default=plainly)


def _pairwise(function: Callable[..., jax.Array], x: jax.Array, *of_channels: jax.Array) -> jax.Array:
    """function(x, *of_channels) for one that works element by element: (…,C) bfloat16, C even, and float32 (…,C).

    XLA has a thread of a GPU compute four elements, whatever their size. Of pairs, as integers of 32 bits, these are 16
    bytes: memory that would be read at 3.0 TB/s is read at 3.8 (H200).
    """
    pairs = jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)
    halves = []
    for i, bits in enumerate((pairs << 16, pairs >> 16 << 16)):  # bfloat16 is the upper half of float32
        wide = jax.lax.bitcast_convert_type(bits, jnp.float32)
        made = function(wide, *(values[..., i::2] for values in of_channels)).astype(jnp.bfloat16)
        halves.append(jax.lax.bitcast_convert_type(made, jnp.uint16).astype(jnp.uint32))
    return jax.lax.bitcast_convert_type(halves[0] | halves[1] << 16, jnp.bfloat16).reshape(x.shape)


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

    An output pixel sees 2x2 different input pixels at most, each up to twice along an axis. So the 3x3 kernel folds
    into a 2x2 kernel for each of the four output pixels around a corner between input pixels (`_fold`), and one
    convolution at the input's resolution makes all four, with 4/9 of the products.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        assert self.bias is not None
        batch, height, width, _ = x.shape
        kernel = _fold(_fold(self.kernel[...].astype(jnp.float32), 0), 1)  # (2,2,C,C',2,2), the last which of four
        kernel = jnp.moveaxis(kernel, 3, 5).reshape(2, 2, kernel.shape[2], -1).astype(x.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=layout)
        y = (y + jnp.tile(self.bias[...], 4).astype(x.dtype)).reshape(batch, height + 1, width + 1, 2, 2, -1)
        # y[:, i, j] has the 2x2 output pixels around the corner (i,j) of the input's pixels: those outside are cut off.
        y = jnp.swapaxes(y, 2, 3).reshape(batch, 2 * height + 2, 2 * width + 2, -1)[:, 1:-1, 1:-1]
        return jax.lax.optimization_barrier(y)  # else XLA orders them again for each of its readers


def _fold(kernel: jax.Array, axis: int) -> jax.Array:
    """The kernel along one axis, for the output pixels before and after a corner: (…,3,…) → (…,2,…,2).

    Upsampled, inputs x₀ and x₁ beside a corner are x₀ x₀ | x₁ x₁. The two pixels at the corner are, by taps (a,b,c):

        before   a·x₀ + b·x₀ + c·x₁ = (a+b)·x₀ + c·x₁      [..., 0] = (a+b, c)
        after    a·x₀ + b·x₁ + c·x₁ = a·x₀ + (b+c)·x₁      [..., 1] = (a, b+c)
    """
    ends, middle = (jax.lax.slice_in_dim(kernel, start, 3 - start, 2, axis)[..., None] for start in range(2))
    gets_middle = jnp.expand_dims(jnp.eye(2), range(1, kernel.ndim))  # before: the first tap; after: the second
    return ends + jnp.moveaxis(gets_middle, 0, axis) * middle


class ThinConv(nnx.Conv):
    """A 3x3 convolution to few channels by `thin_conv`, its bias added in float32."""

    def __call__(self, x: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """(B,H,W,C) → (B,H,W,F) float32, perhaps with another kernel."""
        assert self.bias is not None
        return thin_conv(x, self.kernel[...] if kernel is None else kernel) + self.bias[...]


def thin_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution to few channels, without bias: (B,H,W,C), (3,3,C,F) → (B,H,W,F) float32.

    One product makes what each pixel adds to its nine neighbours, F planes for each, in the dtype of x; then they are
    added where they belong. Convolutions would compute, or leave idle, the many channels that their tiles have.
    """
    height, width = x.shape[1:3]
    planes = jnp.einsum("ijcf,bhwc->ijfbhw", kernel.astype(x.dtype), x)
    planes = with_layout_constraint(planes, Layout(tuple(range(planes.ndim))))
    padded = jnp.pad(planes, [(0, 0)] * 4 + [(1, 1), (1, 1)]).astype(jnp.float32)
    total = sum(padded[i, j, :, :, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return jnp.moveaxis(total, 0, -1)
