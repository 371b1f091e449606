"""What stands between a block's products, and gradients of it, each in one pass over the tokens, on GPUs by Triton.

XLA makes several passes of each: it cannot write a sum and its norm from one kernel, nor sum over channels, use that
sum, and sum over tokens. Gradients on an H200, bfloat16, B=16, L=2240: the norm of 1536 channels with a branch takes
0.29 rather than 0.50 ms, without one 0.21 rather than 0.27; GELU of 6144 features 0.50 rather than 0.57.

Axis letters: B batch, L tokens, C width, F features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import devices

FEWEST_TO_ADD = 8192  # tokens of a device
EPS = 1e-6  # of norms
GELU_SCALE, GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # z·sigmoid(SCALE·(z + CUBE·z³)) is its tanh approximation


class Residual(NamedTuple):
    """What is added to tokens x (B,L,C), as x + gate·(y + bias): y (B,L,C), bias (C,) and gate (B,1,C) float32."""

    y: jax.Array
    bias: jax.Array
    gate: jax.Array


def serves(x: jax.Array) -> bool:
    """Whether the kernels run on the devices that are compiled for, and take tokens (B,L,…) of this dtype and B."""
    suits = x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) and x.shape[0] % devices.ways(devices.BATCH_AXES) == 0
    return suits and devices.device()[0] == "gpu" and devices.has_triton()


def add_norm(x: jax.Array, branch: Residual, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum x + gate·(y + bias), rounded, and its norm LN(sum)(1 + scale) + shift, eps 1e-6.

    Args:
      x: (B,L,C). branch: what is added to it, its y in the dtype of x. scale, shift: (B,1,C) float32.

    Returns:
      Both as x; arithmetic is float32.
    """

    def run(x: jax.Array, branch: Residual, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, ...]:
        batch, length, width = x.shape
        spec = AddSpec.of(batch, length, width)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        total, operand = devices.triton_call(
            *(x, *branch, scale, shift),
            kernel=_kernels().add_norm_kernel,
            out_shape=[like, like],
            grid=(length // spec.run, batch),
            name="add_norm",
            num_warps=spec.warps,
            spec=spec,
        )
        return total, operand

    total, operand = _on_own_samples(run, x, branch, scale, shift)
    return total, operand


def adds(x: jax.Array) -> bool:
    """Whether `add_norm` is worth while for tokens (B,L,C) of all devices.

    XLA's CUDA graphs end at a Triton kernel, and where a device has few tokens it is graphs that save time.
    """
    return x.shape[0] // devices.ways(devices.BATCH_AXES) * x.shape[1] >= FEWEST_TO_ADD and serves(x)


def norm_gradients(
    x: jax.Array, branch: Residual | None, scale: jax.Array, doperand: jax.Array, dtotal: jax.Array
) -> tuple[jax.Array, Residual | None, jax.Array, jax.Array]:
    """Gradients of total = x + gate·(y + bias), or x, and of operand = LN(total)(1 + scale) + shift, eps 1e-6.

    Args:
      x: (B,L,C). branch: what is added to it, if anything. scale: (B,1,C) float32.
      doperand, dtotal: gradients by both results, (B,L,C) in the dtype of x.

    Returns:
      By x, branch, scale and shift.
    """

    def run(x: jax.Array, branch: Residual | None, scale: jax.Array, *gradients: jax.Array) -> tuple[jax.Array, ...]:
        batch, length, width = x.shape
        spec = NormSpec(length, width, branch is not None)
        # What there is none of is neither read nor written.
        y, bias, gate = (x, scale, scale) if branch is None else branch
        like_y = jax.ShapeDtypeStruct(y.shape if branch else (1,), x.dtype)
        runs = -(-length // spec.run)
        sums = jax.ShapeDtypeStruct((batch, runs, 4, width), jnp.float32)
        dx, dy, sums = devices.triton_call(
            *(x, scale, *gradients, y, bias, gate),
            kernel=_kernels().norm_kernel,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), like_y, sums],
            grid=(runs, batch),
            name="norm_gradients",
            num_warps=spec.warps,
            spec=spec,
        )
        return dx, dy, *(jnp.sum(sums[:, :, i], axis=1)[:, None] for i in range(4 if branch else 2))

    dx, dy, dscale, dshift, *rest = _on_own_samples(run, x, branch, scale, doperand, dtotal)
    if branch is None:
        return dx, None, dscale, dshift
    dgate, total = rest
    return dx, Residual(dy, jnp.sum(branch.gate * total, axis=(0, 1)), dgate), dscale, dshift


def gelu_gradients(z: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """GELU of z by its tanh approximation, the gradient by z, and its sum over the tokens.

    Args:
      z, dy: (B,L,F), of one dtype; dy is the gradient by the result.

    Returns:
      (B,L,F) twice, and (F,) float32.
    """

    def run(z: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        batch, length, width = z.shape
        spec = GeluSpec(batch * length, width)
        runs = -(-spec.length // spec.run)
        like = jax.ShapeDtypeStruct(z.shape, z.dtype)
        value, dz, sums = devices.triton_call(
            *(z, dy),
            kernel=_kernels().gelu_kernel,
            out_shape=[like, like, jax.ShapeDtypeStruct((runs, width), jnp.float32)],
            grid=(runs, -(-width // spec.columns)),
            name="gelu_gradients",
            num_warps=spec.warps,
            spec=spec,
        )
        return value, dz, jnp.sum(sums, axis=0)[None]

    batch, features = devices.automatic_axes(devices.BATCH_AXES), devices.automatic_axes(devices.HEAD_AXES)
    if z.shape[-1] % devices.ways(devices.HEAD_AXES):
        features = ()
    tokens = P(batch, None, features)
    split = devices.on_each_device(run, (tokens, tokens), (tokens, tokens, P(batch, features)))
    value, dz, sums = split(z, dy)
    return value, dz, jnp.sum(sums, axis=0)


class _Rows:
    """A spec of whole rows."""

    width: int

    @property
    def lanes(self) -> int:
        """C, up to the next power of 2."""
        return 1 << (self.width - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class AddSpec(_Rows):
    """What `add_norm_kernel` is compiled for: C, tokens of a program, which divide L, and its warps."""

    width: int
    run: int
    warps: int = 4

    @classmethod
    def of(cls, batch: int, length: int, width: int) -> AddSpec:
        """With runs as long as leaves enough programs to fill a GPU; they share what all tokens of a sample do."""
        longest = max(1, min(16, batch * length // 1024))
        return cls(width, max(run for run in range(1, longest + 1) if length % run == 0))


@dataclasses.dataclass(frozen=True)
class NormSpec(_Rows):
    """What `norm_kernel` is compiled for: L, C, whether there is a branch, tokens of a program, its warps."""

    length: int
    width: int
    branch: bool
    run: int = 16
    warps: int = 2


@dataclasses.dataclass(frozen=True)
class GeluSpec:
    """What `gelu_kernel` is compiled for: tokens, F, tokens of a program, its tile, its warps."""

    length: int
    width: int
    run: int = 128
    rows: int = 16
    columns: int = 128
    warps: int = 4


def _on_own_samples(run: Callable[..., tuple[jax.Array, ...]], *arguments: Any) -> tuple[jax.Array, ...]:
    """Runs a kernel on every device's own samples: all but biases, (C,), have them in their first axis."""
    batch = P(devices.automatic_axes(devices.BATCH_AXES))
    specs = jax.tree.map(lambda x: P() if x.ndim == 1 else batch, arguments)
    return devices.on_each_device(run, specs, batch)(*arguments)


def _kernels() -> Any:
    """Imported when first used: without Triton that fails."""
    from pallas_kernels import token_passes_triton

    return token_passes_triton
