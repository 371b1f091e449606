"""q, k, v of a token pyramid → attended values on TPUs, by Pallas, with gradients.

Axis letters: B batch, L tokens, H heads, D head size, C = H·D channels.

`tiles` says which pairs of tiles are visited, `kernels` what is computed of each.

Layout. The kernels read (B,L,H,D) as (B,L,C), which is how a projection wrote it: no transpose (`tpu_attention_packed`
says when XLA adds one), and no array in memory with half of its 128 lanes empty. A *group* of 128/D heads fills the
lanes; tiles in VMEM, memory and transfers are half of what they are with each head of 64 padded to 128. Products of a
head contract over all 128 lanes with the other heads' lanes zero, no loss, as the matrix unit contracts 128 anyway;
only weighted sums of values, and dq, take rows of D. That makes, of a pair at D = 64, 384 FLOPs forward and 1152
backward; padding heads takes 512 and 1280, the definition 256 and 640.

Logits lie transposed, queries along lanes. Maxima and sums over keys then add whole registers rather than reduce
across lanes; what there is one of for each query is a row, and in memory fills 8 rows for a group, not 128 lanes for
a head.

Edges. Nothing is padded in memory: no copy. The last tiles reach beyond L; what they read there is replaced by zeros
where it would enter a sum, what they write there is dropped. Queries beyond L get the key range of the last one, so
that no row is without keys, and add nothing to gradients, as their cotangents are zeros.

Backward is one kernel. All queries of a key tile come in a row, so that dk and dv grow in place, while dq of all
queries grows in VMEM: 5 products a pair, where a kernel for dq and one for dk and dv take 7, and the exponentials
twice. The order is fixed, so results are bit-equal from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import vary_as
from pallas_kernels.scale_attention.operands import check_operands, ranges_for, say
from pallas_kernels.scale_attention.tpu.kernels import backward_kernel, forward_kernel
from pallas_kernels.scale_attention.tpu.problem import Problem
from pallas_kernels.scale_attention.tpu.tiles import (
    KEY,
    QUERY,
    TpuBlocks,
    candidates,
    pad_ranges,
    table_entry,
    tuned_blocks,
)

__all__ = ["TpuBlocks", "candidates", "table_entry", "tpu_attention", "tpu_attention_packed"]


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_ranges: np.ndarray,
    q_scale: jax.Array | None,
    *,
    blocks: TpuBlocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As `reference_attention`, with products in the dtype of q and the rest in float32; differentiable.

    Args:
      q, k, v: (B,L,H,D), bfloat16, float32, or float16, computed as float32 since TPUs have none. D divides 128 or is a
        multiple of it. Heads that leave a group of 128 lanes unfilled (H odd at D = 64) cost a padded copy.
      key_ranges: (L,2) int, static: query i attends to keys in [start, end). Neither bound ever decreases, no range is
        empty, and together they leave no gap.
      q_scale: optional (H,): QK-norm, as in `reference_attention`; normalised q and k are never in memory.
      blocks: sizes of the tiles; None takes the best known, `tuned_blocks`.
      interpret: for `pl.pallas_call`; `pltpu.InterpretParams()` runs on a CPU.

    Returns:
      (B,L,H,D) in the dtype of q.

    Raises:
      ValueError: shapes, dtypes or ranges are not supported.
    """
    return _attend((q, k, v), key_ranges, q_scale, blocks, interpret)


def tpu_attention_packed(
    qkv: jax.Array,
    key_ranges: np.ndarray,
    q_scale: jax.Array | None,
    *,
    blocks: TpuBlocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As `tpu_attention`, of q, k and v as one projection gives them, (B,L,3,H,D): read in place.

    XLA turns slices of such an array with D = 64 around, tokens along lanes, and back again for the kernel.
    """
    return _attend((qkv,), key_ranges, q_scale, blocks, interpret)


def _attend(
    arrays: tuple[jax.Array, ...],
    key_ranges: np.ndarray,
    q_scale: jax.Array | None,
    blocks: TpuBlocks | None,
    interpret: Any,
) -> jax.Array:
    """Of q, k, v, each (B,L,H,D), or one (B,L,3,H,D), checked."""
    check_operands(arrays)
    first = arrays[0]
    (batch, length), (heads, size) = first.shape[:2], first.shape[-2:]
    if first.dtype not in (jnp.bfloat16, jnp.float32, jnp.float16) or (128 % size and size % 128):
        raise ValueError(
            "The TPU kernels take bfloat16, float32 or float16 and a head size that divides 128 or is a multiple, not "
            f"{say(first)}."
        )
    ranges = ranges_for(first, key_ranges)
    dtype = jnp.dtype(jnp.bfloat16 if first.dtype == jnp.bfloat16 else jnp.float32)
    missing = -heads % max(128 // size, 1)  # heads to the next whole group

    def flatten(x: jax.Array) -> jax.Array:
        widths = [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]
        return (jnp.pad(x, widths) if missing else x).astype(dtype).reshape(batch, length, -1)

    factors = jnp.full(heads, size**-0.5, jnp.float32) if q_scale is None else q_scale.astype(jnp.float32)
    factors = jnp.repeat(jnp.pad(factors, (0, missing)), size)[None]
    problem = Problem(
        ranges.tobytes(), heads + missing, size, dtype, q_scale is not None, blocks or tuned_blocks(length), interpret
    )
    out = _attention(tuple(map(flatten, arrays)), vary_as(first, factors), problem)
    return out.reshape(batch, length, -1, size)[:, :, :heads].astype(first.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(arrays: tuple[jax.Array, ...], factors: jax.Array, problem: Problem) -> jax.Array:
    """(B,L,C) of q, k, v: (B,L,C), or one (B,L,3C), and what channels of q are multiplied by, (1,C) float32."""
    return _forward(arrays, factors, problem)[0]


def _attention_forward(
    arrays: tuple[jax.Array, ...], factors: jax.Array, problem: Problem
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = _forward(arrays, factors, problem)
    return out, (arrays, factors, out, lse)


def _attention_backward(
    problem: Problem, residuals: tuple[Any, ...], dout: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    arrays, factors, out, lse = residuals
    shape = *out.shape[:2], problem.heads, problem.size
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).reshape(shape).sum(axis=3).swapaxes(1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, problem.padded - problem.length))).reshape(lse.shape)
    *gradients, dfactors = _backward(arrays, factors, dout, lse, delta, problem)
    return tuple(gradients) if len(arrays) == 3 else (jnp.concatenate(gradients, axis=2),), dfactors


_attention.defvjp(_attention_forward, _attention_backward)


class _Specs(NamedTuple):
    """What a step of the grid (B, groups / groups of a step, pairs of tiles) sees of each kind of array."""

    factors: pl.BlockSpec  # (1,C)
    ranges: pl.BlockSpec  # (2, L up to whole tiles)
    q: pl.BlockSpec  # (B,L,C), or the first third of (B,L,3C)
    k: pl.BlockSpec  # or the second
    v: pl.BlockSpec  # or the last
    queries: pl.BlockSpec  # (B,L,C), as q
    keys: pl.BlockSpec  # (B,L,C), as k
    statistics: pl.BlockSpec  # (B, groups, heads of a group, L up to whole tiles)


def _specs(problem: Problem, packed: bool) -> _Specs:
    blocks, channels = problem.blocks, problem.groups * problem.width
    third = problem.all_groups // problem.groups if packed else 0

    def tile(row: int, size: int, skip: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((None, size, channels), lambda b, c, t, pairs: (b, pairs[row, t], skip + c))

    return _Specs(
        factors=pl.BlockSpec((1, channels), lambda b, c, t, pairs: (0, c)),
        ranges=pl.BlockSpec((2, blocks.queries), lambda b, c, t, pairs: (0, pairs[QUERY, t])),
        q=tile(QUERY, blocks.queries),
        k=tile(KEY, blocks.keys, third),
        v=tile(KEY, blocks.keys, 2 * third),
        queries=tile(QUERY, blocks.queries),
        keys=tile(KEY, blocks.keys),
        statistics=pl.BlockSpec(
            (None, problem.groups, problem.per_group, blocks.queries),
            lambda b, c, t, pairs: (b, c, 0, pairs[QUERY, t]),
        ),
    )


def _forward(arrays: tuple[jax.Array, ...], factors: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attended values (B,L,C), and the base-2 logsumexp (B, groups, heads of a group, L up to whole tiles) float32."""
    specs, pairs, rows = _specs(problem, len(arrays) == 1), problem.tile_list("queries"), problem.blocks.queries
    groups, per_group, width = problem.groups, problem.per_group, problem.width
    q, k, v = arrays if len(arrays) == 3 else arrays * 3
    lse = len(q), problem.all_groups, per_group, problem.padded
    return pl.pallas_call(
        functools.partial(forward_kernel, problem),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(q), problem.all_groups // groups, pairs.shape[1]),
            in_specs=[specs.factors, specs.ranges, specs.q, specs.k, specs.v],
            out_specs=[specs.queries, specs.statistics],
            scratch_shapes=[
                pltpu.VMEM((groups, per_group, rows, width), problem.dtype),
                pltpu.VMEM((groups, per_group, rows), jnp.float32),
                pltpu.VMEM((groups, per_group, rows), jnp.float32),
                pltpu.VMEM((groups, width, rows), jnp.float32),
            ],
        ),
        out_shape=[_array_like(q, (*q.shape[:2], factors.size), q.dtype), _array_like(q, lse, jnp.float32)],
        # Logits contract over the lanes of a group; values are sums of weighted rows of D. Moved are q and out, and
        # logsumexp; k and v.
        cost_estimate=_cost(
            problem, pairs, len(q), products=width + problem.size, by_query=2, statistics=1, by_key=2, whole=0
        ),
        compiler_params=_compiler_params(problem, backward=False),
        interpret=problem.interpret,
        name="scale_attention_forward",
    )(*_constants(q, pairs, factors, problem), q, k, v)


def _backward(
    arrays: tuple[jax.Array, ...],
    factors: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    problem: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k, v, (B,L,C) each, and factors; delta is as lse."""
    specs, pairs, blocks = _specs(problem, len(arrays) == 1), problem.tile_list("keys"), problem.blocks
    groups, width = problem.groups, problem.width
    channels = groups * width
    q, k, v = arrays if len(arrays) == 3 else arrays * 3
    dq, dk, dv, dfactors = pl.pallas_call(
        functools.partial(backward_kernel, problem),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(q), problem.all_groups // groups, pairs.shape[1]),
            in_specs=[
                *(specs.factors, specs.ranges, specs.q, specs.k, specs.v),
                *(specs.queries, specs.statistics, specs.statistics),
            ],
            out_specs=[
                pl.BlockSpec((None, problem.length, channels), lambda b, c, t, pairs: (b, 0, c)),
                specs.keys,
                specs.keys,
                pl.BlockSpec((None, 1, channels), lambda b, c, t, pairs: (b, 0, c)),
            ],
            scratch_shapes=[
                pltpu.VMEM((blocks.keys, channels), problem.dtype),
                pltpu.VMEM((blocks.keys, channels), problem.dtype),
                pltpu.VMEM((problem.padded // blocks.queries, groups, width, blocks.queries), jnp.float32),
                pltpu.VMEM((blocks.keys, channels), jnp.float32),
                pltpu.VMEM((blocks.keys, channels), jnp.float32),
            ],
        ),
        out_shape=[_array_like(q, dout.shape, q.dtype)] * 3 + [_array_like(q, (len(q), 1, factors.size), jnp.float32)],
        # Two products contract over the lanes of a group, two give them, dq is D rows. Moved are q and dout, logsumexp
        # and delta; k, v, dk and dv; dq, once.
        cost_estimate=_cost(
            problem, pairs, len(q), products=4 * width + problem.size, by_query=2, statistics=2, by_key=4, whole=1
        ),
        compiler_params=_compiler_params(problem, backward=True),
        interpret=problem.interpret,
        name="scale_attention_backward",
    )(*_constants(q, pairs, factors, problem), q, k, v, dout, lse, delta)
    return dq, dk, dv, dfactors.sum(axis=0)


def _cost(
    problem: Problem,
    pairs: np.ndarray,
    batch: int,
    *,
    products: int,
    by_query: int,
    statistics: int,
    by_key: int,
    whole: int,
) -> pl.CostEstimate:
    """FLOPs and exponentials of every visited pair of a query and a key, hidden or not, and bytes moved.

    A tile moves whenever the list goes on to another one; so of k and v, forward, as often as it is visited.

    Args:
      problem, pairs, batch: what is computed, of B images.
      products: multiplications of a pair.
      by_query, by_key: arrays with rows of D, moved in tiles of queries and of keys.
      statistics: float32 numbers of a query, moved with its tile.
      whole: arrays with rows of D that move once.
    """
    blocks, heads = problem.blocks, batch * problem.heads
    visited = heads * pairs.shape[1] * blocks.queries * blocks.keys
    queries, keys = (size * _runs(pairs[row]) for size, row in ((blocks.queries, QUERY), (blocks.keys, KEY)))
    rows = by_query * queries + by_key * keys + whole * problem.length
    moved = heads * (rows * problem.size * problem.dtype.itemsize + statistics * queries * 4)
    return pl.CostEstimate(flops=2 * products * visited, transcendentals=visited, bytes_accessed=moved)


def _runs(index: np.ndarray) -> int:
    """How many runs of equal numbers."""
    return 1 + int(np.count_nonzero(np.diff(index)))


def _compiler_params(problem: Problem, *, backward: bool) -> pltpu.CompilerParams:
    """The counted VMEM is the limit, with a margin: the default is too little at 1024 px, and XLA can use the rest."""
    blocks = dataclasses.replace(problem.blocks, groups=problem.groups)
    terms = blocks.vmem_terms(problem.length, problem.size, problem.dtype.itemsize, backward=backward)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=sum(terms.values()) * 9 // 8 + 2**20
    )


def _constants(q: jax.Array, pairs: np.ndarray, factors: jax.Array, problem: Problem) -> list[jax.Array]:
    ranges = pad_ranges(problem.key_ranges, problem.blocks.queries).T
    return [vary_as(q, jnp.asarray(pairs)), factors, vary_as(q, jnp.asarray(ranges))]


def _array_like(q: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh as q does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)
