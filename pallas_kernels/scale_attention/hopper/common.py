"""Operands, vectors, masks and QK-norm of the Hopper kernels.

Axis letters: B batch, L tokens, H heads, D head size, R rows of a band, C columns of a tile.

Mosaic GPU's own tiled copies cut global memory into (8, 64) tiles, so they can only start at multiples of 8 rows, of
arrays that are multiples of 8 long. Scales start anywhere. Here tiles are copied flat instead: with rows as long as the
swizzle both views have the same bytes. TMA fills what lies past the end with zeros, and does not write there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.scale_attention.hopper import tiles
from pallas_kernels.scale_attention.hopper.pipeline import Band, Ref, Scalar
from pallas_kernels.scale_attention.operands import sign_of

LOG2E = math.log2(math.e)
SMALLEST_SQUARE = 1e-24  # of a vector's norm, as in the reference
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)
FLAT, TILED = 0, 1  # the views that `tile_memory` gives of the same bytes
View = Callable[[Scalar, Any, Scalar], Ref]  # batch, slice of tokens, head → (tokens, D)


# --- Operands.


def shape_of(qkv: Sequence[jax.Array]) -> tuple[int, int, int, int]:
    """B, L, H and D, of three arrays (B,L,H,D) or a packed one (B,L,3,H,D)."""
    batch, length, *_, heads, size = qkv[0].shape
    return batch, length, heads, size


def views(refs: Sequence[Ref], *, packed: bool = False) -> list[View]:
    """A view of each of several (B,L,H,D), or of each part of one (B,L,n,H,D)."""
    if packed:
        (ref,) = refs
        return [lambda batch, at, head, i=i: ref.at[batch, at, i, head] for i in range(ref.shape[2])]  # type: ignore
    return [lambda batch, at, head, ref=ref: ref.at[batch, at, head] for ref in refs]  # type: ignore


def tile_memory(dtype: Any, *shape: int) -> plgpu.RefUnion:
    """Shared memory (…, R, D) twice: `FLAT`, for TMA, and `TILED`, for the tensor cores."""
    flat = (plgpu.SwizzleTransform(shape[-1] * jnp.dtype(dtype).itemsize),)  # type: ignore[abstract]
    tiled = (plgpu.TilingTransform((8, shape[-1])), *flat)  # type: ignore[abstract]
    return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=flat), plgpu.SMEM(shape, dtype, transforms=tiled))


def copy_rows(source: View, memory: Ref) -> Callable[..., None]:
    """Fills the slot of a warpgroup in `tile_memory`."""
    flat = memory[FLAT]

    def copy(batch: Scalar, head: Scalar, row: Scalar, slot: Scalar, reader: int, barrier: Ref) -> None:
        at = pl.ds(row, flat.shape[2])
        plgpu.copy_gmem_to_smem(source(batch, at, head), flat.at[slot, reader], barrier)

    return copy


def copy_columns(source: View, memory: Ref) -> Callable[..., None]:
    """Fills a stage of a ring in `tile_memory`."""
    flat = memory[FLAT]

    def copy(batch: Scalar, head: Scalar, column: Scalar, tile: Scalar, stage: Scalar, barrier: Ref) -> None:
        at = pl.ds(column, flat.shape[1])
        plgpu.copy_gmem_to_smem(source(batch, at, head), flat.at[stage], barrier)

    return copy


def copy_vectors(source: Ref, memory: Ref) -> Callable[..., None]:
    """Fills a stage of a ring from (B,H,tiles,numbers,C)."""

    def copy(batch: Scalar, head: Scalar, column: Scalar, tile: Scalar, stage: Scalar, barrier: Ref) -> None:
        plgpu.copy_gmem_to_smem(source.at[batch, head, tile], memory.at[stage], barrier)

    return copy


def by_tile(vectors: Sequence[jax.Array], plan: tiles.Plan) -> jax.Array:
    """Some (B,H,≥L) → (B,H,tiles,numbers,C): a copy of a plain vector must start at a multiple of 16 bytes."""
    return jnp.stack([vector[:, :, plan.columns] for vector in vectors], axis=3)


def store_rows(band: Band, outputs: Sequence[tuple[jax.Array, Ref, View]]) -> None:
    """Each (R,D) → its staging buffer in `tile_memory` → global memory."""
    me = lax.axis_index("wg")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before has left
    for value, memory, _ in outputs:
        memory[TILED][me] = value.astype(memory[TILED].dtype)
    plgpu.commit_smem()
    for value, memory, view in outputs:
        plgpu.copy_smem_to_gmem(memory[FLAT].at[me], view(band.batch, pl.ds(band.row, value.shape[0]), band.head))


# --- Registers.


def load(tile: Ref) -> jax.Array:
    """(R,D) float32, from the tiled view of shared memory."""
    return plgpu.load(tile).astype(jnp.float32)


def load_rows(ref: Ref) -> jax.Array:
    """A number for each row of a band, straight from global memory."""
    return plgpu.load(ref, layout=ROW_LAYOUT, optimized=False)


def load_columns(ref: Ref) -> jax.Array:
    """A number for each column of a tile, from shared memory."""
    return plgpu.load(ref, layout=COLUMN_LAYOUT)


def filled(value: float | jax.Array, *shape: int) -> jax.Array:
    """(R,) or (R, columns) float32."""
    layout = ROW_LAYOUT if len(shape) == 1 else plgpu.Layout.WGMMA
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(R,) → (R, columns)."""
    return lax.broadcast_in_dim(vector, shape, [0])


def along_columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(C,) → (rows, C)."""
    return lax.broadcast_in_dim(vector, shape, [1])


# --- Masks.


def limits_of(ranges: np.ndarray, rows: int) -> np.ndarray:
    """(2, max(L, rows)) int32: starts and ends, with rows past the last that see column 0."""
    padded = np.full((2, max(len(ranges), rows)), ((0,), (1,)), np.int32)
    padded[:, : len(ranges)] = ranges.T
    return padded


def load_limits(ref: Ref, band: Band, rows: int) -> list[jax.Array]:
    """The start and the end of what each row of a band sees, from global memory."""
    return [load_rows(ref.at[i, pl.ds(band.row, rows)]) for i in range(2)]


def mask(logits: jax.Array, band: Band, tile: Scalar, limits: Sequence[jax.Array]) -> jax.Array:
    """-inf outside of each row's [start, end), at no cost for a tile that all rows see."""
    shape = logits.shape

    def hide(logits: jax.Array) -> jax.Array:
        columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        columns += band.origin + tile * shape[1]
        starts, ends = (along_rows(limit, shape) for limit in limits)
        return jnp.where((columns >= starts) & (columns < ends), logits, -jnp.inf)

    return lax.cond(band.needs_mask(tile), hide, lambda logits: logits, logits)


# --- Scales of logits, and QK-norm.


def sign_and_size(q_scale: jax.Array | None) -> list[jax.Array]:
    """What kernels whose rows are queries need of q_scale: its sign, for keys, and its size, never 0, for queries.

    Rows are scaled once some of their logits are -inf, which has to stay so.
    """
    if q_scale is None:
        return []
    return [sign_of(q_scale), jnp.maximum(jnp.abs(q_scale.astype(jnp.float32)), 1e-30)]


def gain_of(rows: Ref, factor: Any) -> Any:
    """What logits, in units of log 2, have to be multiplied by: (R,) if rows are to be normalised, else a number.

    Args:
      rows: (R,D) in shared memory.
      factor: with QK-norm, another one, of their head; None without.
    """
    if factor is None:
        return rows.shape[1] ** -0.5 * LOG2E
    return inverse_norm(load(rows)) * (factor * LOG2E)


def times(logits: jax.Array, gain: Any) -> jax.Array:
    """Logits with `gain_of` their rows."""
    return logits * (gain if isinstance(gain, float) else along_rows(gain, logits.shape))


def inverse_norm(x: jax.Array) -> jax.Array:
    """(R,D) → (R,)."""
    return lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=1), SMALLEST_SQUARE))


def normalize(memory: Ref, factor: Ref) -> Callable[[Scalar, Scalar], None]:
    """What divides the vectors of a column tile by their norms and multiplies by the head's factor, in place."""
    part = 64  # vectors at a time: the loading warpgroup has few registers
    tiled = memory[TILED]

    def prepare(head: Scalar, stage: Scalar) -> None:
        for first in range(0, tiled.shape[1], part):
            where = tiled.at[stage, pl.ds(first, part)]
            x = load(where)
            where[...] = (x * along_rows(inverse_norm(x) * factor[head], x.shape)).astype(tiled.dtype)

    return prepare


def unit_keys(qkv: Sequence[jax.Array], sign: jax.Array) -> jax.Array:
    """(B,L,H,D): keys as `normalize` makes them, with a (H,) sign; outside of the kernel."""
    keys = qkv[0][:, :, 1] if len(qkv) == 1 else qkv[1]
    x = keys.astype(jnp.float32) * sign[:, None]
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return (x * lax.rsqrt(jnp.maximum(squares, SMALLEST_SQUARE))).astype(keys.dtype)


def through_norm(gradient: jax.Array, rows: Ref, gain: Any) -> tuple[jax.Array, jax.Array]:
    """Gradient by rows that were normalised → by the rows, and (R,) its inner products with the normalised rows.

    The gain was theirs in the logits; the gradient does not contain it yet.
    """
    x = load(rows)
    inverse = inverse_norm(x)
    dots = jnp.sum(gradient * x, axis=1) * inverse
    across = gradient - along_rows(dots * inverse, x.shape) * x
    return across * along_rows(gain * (1 / LOG2E), x.shape), dots
