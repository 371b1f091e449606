"""A residual branch added, and the norm of the sum, in one kernel, on Hopper (H100, H200), by Mosaic GPU.

XLA cannot write both from one, and adds a second time for the second. For few tokens the number of kernels is what
counts, each of which takes microseconds whatever it does; for many, what is read and written.

A row stays in the registers of one warpgroup, which takes a run of a sample's rows in turn and keeps what they share,
gate, bias, scale and shift, there too. The next row is on its way while one is summed.

Axis letters: B batch, L tokens, C width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.devices import BATCH_AXES, automatic_axes
from pallas_kernels.token_gradients import Branch

THREADS = 128  # of a warpgroup
WIDEST = 2560  # that leaves registers for several warpgroups side by side
ENOUGH = 1024  # warpgroups to fill any of these GPUs; with more rows each takes several
LONGEST_RUN = 16
EPS = 1e-6

Array = Any  # of the kernel


def fits(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `add_norm` takes tokens of this shape and dtype."""
    width = x.shape[-1] if len(x.shape) == 3 else 0
    return x.dtype in (jnp.bfloat16, jnp.float16) and x.size > 0 and width <= WIDEST and width % THREADS == 0


def add_norm(x: jax.Array, branch: Branch, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum x + gate·(y + bias), rounded, and its norm LN(sum)(1 + scale) + shift, eps 1e-6.

    Args:
      x: (B,L,C), bfloat16 or float16, C a multiple of 128 up to 2560. branch: what is added, its y in the dtype of x.
      scale, shift: (B,1,C) float32.

    Returns:
      Both as x; arithmetic is float32.

    Raises:
      ValueError: shape or dtype are not supported.
    """
    if not fits(x) or x.dtype != branch.y.dtype:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)} and y {branch.y.dtype}{list(branch.y.shape)}; expected (B, L, C), bfloat16 "
            f"or float16 both, at least one row, C a multiple of {THREADS} up to {WIDEST}."
        )
    arguments, automatic = (x, branch, scale, shift), automatic_axes()
    if not automatic:
        return _add_norm(*arguments)
    batch = P(tuple(name for name in BATCH_AXES if name in automatic))
    specs = jax.tree.map(lambda x: P() if x.ndim == 1 else batch, arguments)
    return jax.shard_map(_add_norm, in_specs=specs, out_specs=batch, check_vma=False)(*arguments)


@jax.jit  # lowered once for all blocks and passes of a shape
def _add_norm(x: jax.Array, branch: Branch, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `add_norm`, of what one device has."""
    batch, length, _ = x.shape
    run = min(max(batch * length // ENOUGH, 1), LONGEST_RUN, length)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kernel = plgpu.kernel(
        functools.partial(_of_a_run, run=run),
        out_type=(like, like),
        grid=(batch, -(-length // run)),
        grid_names=("sample", "run"),
        kernel_name="add_norm",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(x, *branch, scale, shift)


def _of_a_run(
    x: Any, y: Any, bias: Any, gate: Any, scale: Any, shift: Any, total: Any, operand: Any, *, run: int
) -> None:
    """The kernel: references to what `add_norm` takes and returns."""
    _, length, width = x.shape
    sample, first = lax.axis_index("sample"), lax.axis_index("run") * run
    end = jnp.minimum(first + run, length)
    load = functools.partial(plgpu.load, layout=_layout(width), optimized=False)
    offset, opening = load(bias), load(gate.at[sample, 0])
    factor, shifted = 1 + load(scale.at[sample, 0]), load(shift.at[sample, 0])

    def row(token: Array) -> tuple[Array, Array]:
        return load(x.at[sample, token]), load(y.at[sample, token])

    def add_and_normalise(token: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        of_x, of_y = (part.astype(jnp.float32) for part in given)
        following = row(jnp.minimum(token + 1, end - 1))
        rounded = (of_x + opening * (of_y + offset)).astype(x.dtype)
        total[sample, token] = rounded
        n = rounded.astype(jnp.float32)
        n = n - jnp.sum(n) * (1 / width)
        n = n * lax.rsqrt(jnp.sum(n * n) * (1 / width) + EPS)
        operand[sample, token] = (n * factor + shifted).astype(x.dtype)
        return following

    lax.fori_loop(first, end, add_and_normalise, row(first))


def _layout(width: int) -> Any:
    """How (C,) is spread over a warpgroup: as many side by side to a thread as it can load at once of 16 bits."""
    side = next(side for side in (8, 4, 2, 1) if width % (THREADS * side) == 0)
    tiling = plgpu.Tiling(((THREADS * side,), (THREADS // 4 * side,), (side,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
