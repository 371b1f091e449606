"""The Hopper kernels for attention over token pyramids, backward: one for dq, and one for dk and dv.

Both compute the weights again, from the logits and what `forward` kept of them, so that neither has to add to what
another thread block wrote. In the second one rows are keys and columns queries. Of each, `flow` is what is loaded,
`attend` what becomes of a band, and `add_tile` what a tile adds to that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.scale_attention.hopper import common
from pallas_kernels.scale_attention.hopper.blocks import Blocks
from pallas_kernels.scale_attention.hopper.common import TILED, along_columns, along_rows, filled, tile_memory
from pallas_kernels.scale_attention.hopper.pipeline import Band, Flow, Pipeline, Ref, Ring, Rows, Scalar
from pallas_kernels.scale_attention.ranges import transpose_ranges


def grad_queries(
    qkv: Sequence[jax.Array],
    out: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    q_scale: jax.Array | None,
    ranges: np.ndarray,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, Sequence[jax.Array]]:
    """Gradient by q, and what else of queries is found on the way.

    Args:
      qkv, q_scale, ranges: as `forward`.
      out, lse: from `forward`.
      dout: (B,L,H,D), the gradient by out.
      blocks: how to cut.

    Returns:
      dq, (B,L,H,D), or, if qkv is packed, (B,L,3,H,D) of which only the first third is written;
      delta, (B,H,≥L) float32, the inner products of out and dout;
      with norm one (B,H,≥L) float32, what each query adds to the gradient by |q_scale|.
    """
    norm = q_scale is not None
    dtype, (batch, _, heads, size) = dout.dtype, dout.shape
    pipeline = Pipeline.create(ranges, blocks, batch, heads)
    width, rows, columns, stages = blocks.warpgroups, blocks.rows, blocks.columns, blocks.stages
    factors = common.sign_and_size(q_scale)
    vectors = jax.ShapeDtypeStruct(lse.shape, jnp.float32)
    dq, delta, dots = pipeline.call(
        "scale_attention_grad_queries",
        _GradQueries,
        [jax.ShapeDtypeStruct(qkv[0].shape, dtype), vectors, [vectors] if norm else []],
        {
            "q": tile_memory(dtype, 2, width, rows, size),
            "do": tile_memory(dtype, 2, width, rows, size),
            "o": tile_memory(dtype, 1, width, rows, size),
            "k": tile_memory(dtype, stages, columns, size),
            "v": tile_memory(dtype, stages, columns, size),
            "dq": tile_memory(dtype, width, rows, size),
            "bars": [
                pipeline.row_barriers(2),
                pipeline.row_barriers(1, slots=1),
                pipeline.ring_barriers(1),
                pipeline.ring_barriers(1),
            ],
            "landed": plgpu.Barrier(num_barriers=stages) if norm else None,
            "baton": pipeline.baton_barriers(),
        },
        [qkv, factors, out, dout, lse, common.limits_of(ranges, rows)],
    )
    return dq, delta, dots


@dataclasses.dataclass(frozen=True)
class _GradQueries:
    """The kernel for dq in a thread block: one warpgroup loads what `flow` says, the others `attend` to bands.

    Names in `_ref` or `_refs` lie in global memory, others in shared memory.
    """

    pipeline: Pipeline
    me: Scalar  # this warpgroup
    qkv_refs: Sequence[Ref]
    factor_refs: Sequence[Ref]  # signs and sizes of q_scale, with QK-norm
    out_ref: Ref
    dout_ref: Ref
    lse_ref: Ref
    limits_ref: Ref
    table_ref: Ref
    dq_ref: Ref
    delta_ref: Ref
    dots_refs: Sequence[Ref]
    q: Ref
    do: Ref
    o: Ref
    k: Ref
    v: Ref
    dq: Ref
    bars: Sequence[tuple[Ref, Ref]]  # ready and free: of q and do, of o, of k, of v
    landed: Ref
    baton: Ref

    @functools.cached_property
    def flow(self) -> Flow:
        """Queries, dout and out, a band to each warpgroup; keys, and values, tile by tile, to all."""
        row_bars, o_bars, k_bars, v_bars = self.bars
        q_at, k_at, v_at = common.views(self.qkv_refs, packed=len(self.qkv_refs) == 1)
        out_at, dout_at = common.views([self.out_ref, self.dout_ref])
        queries = Rows([common.copy_rows(q_at, self.q), common.copy_rows(dout_at, self.do)], *row_bars)
        outs = Rows([common.copy_rows(out_at, self.o)], *o_bars, slots=1)
        normalize = common.normalize(self.k, self.factor_refs[0]) if self.factor_refs else None
        keys = Ring([common.copy_columns(k_at, self.k)], *k_bars, normalize, self.landed)
        values = Ring([common.copy_columns(v_at, self.v)], *v_bars)
        return Flow(self.pipeline, self.table_ref, [queries, outs], [keys, values], self.baton)

    def attend(self, band: Band) -> None:
        """Queries → delta, then the gradient by them, a sum over all tiles."""
        (queries, outs), blocks = self.flow.rows, self.pipeline.blocks
        vector_at = (band.batch, band.head, pl.ds(band.row, blocks.rows))
        limits = common.load_limits(self.limits_ref, band, blocks.rows)
        lse = common.load_rows(self.lse_ref.at[vector_at])
        slot, mine = queries.place(band.item, self.me, blocks.warpgroups)
        q, do = self.q[TILED].at[slot, self.me], self.do[TILED].at[slot, self.me]
        plgpu.barrier_wait(queries.ready.at[mine])
        plgpu.barrier_wait(outs.ready.at[self.me])
        delta = jnp.sum(common.load(self.o[TILED].at[0, self.me]) * common.load(do), axis=1)
        plgpu.barrier_arrive(outs.free.at[self.me])
        self.delta_ref[vector_at] = delta
        gain = common.gain_of(q, self.factor_refs[1][band.head] if self.factor_refs else None)
        step = _QueryVisits(self, band, limits, q, do, lse, delta, gain).add_tile
        total = lax.fori_loop(band.first, band.last, step, filled(0, *q.shape))
        if self.factor_refs:
            total, self.dots_refs[0][vector_at] = common.through_norm(total, q, gain)
        else:
            total *= q.shape[1] ** -0.5
        plgpu.barrier_arrive(queries.free.at[mine])
        dq_at, *_ = common.views([self.dq_ref], packed=len(self.qkv_refs) == 1)
        common.store_rows(band, [(total, self.dq, dq_at)])


@dataclasses.dataclass(frozen=True, eq=False)  # JAX looks up bodies of loops by their hash
class _QueryVisits:
    """What a band of queries does with its tiles of keys and values.

    Attributes:
      kernel: that attends to them.
      band: of the queries.
      limits: the keys [start, end) that each query sees, (R,) both.
      q, do: (R,D), in shared memory.
      lse, delta: (R,) float32.
      gain: of logits, `common.gain_of`.
    """

    kernel: _GradQueries
    band: Band
    limits: Sequence[jax.Array]
    q: Ref
    do: Ref
    lse: jax.Array
    delta: jax.Array
    gain: Any

    def add_tile(self, tile: Scalar, total: jax.Array) -> jax.Array:
        """The sum, (R,D), with what a tile of keys adds: logits → weights → their gradients, times k."""
        flow, k, v = self.kernel.flow, self.kernel.k[TILED], self.kernel.v[TILED]
        stage, shape = flow.stage_of(self.band, tile), (self.q.shape[0], k.shape[1])
        flow.await_tile(stage)

        def products(accumulators: tuple[Ref, ...]) -> None:
            s_ref, dp_ref, total_ref = accumulators
            plgpu.wgmma(s_ref, self.q, k.at[stage].transpose((1, 0)))
            plgpu.wgmma(dp_ref, self.do, v.at[stage].transpose((1, 0)))
            flow.pass_baton()
            s = common.mask(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), self.band, tile, self.limits)
            p = jnp.exp2(common.times(s, self.gain) - along_rows(self.lse, shape))
            ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - along_rows(self.delta, shape))
            plgpu.wgmma(total_ref, ds.astype(k.dtype), k.at[stage])

        start = filled(0, *shape), filled(0, *shape), total
        *_, total = pl.run_state(products)(tuple(map(plgpu.ACC.init, start)))
        flow.release(stage)
        return total


def grad_keys(
    qkv: Sequence[jax.Array],
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    q_scale: jax.Array | None,
    ranges: np.ndarray,
    blocks: Blocks,
    into: Any = None,
) -> Sequence[jax.Array]:
    """Gradients by k and v, (B,L,H,D) each; none if qkv is packed: then they are written into its other two thirds.

    Args:
      qkv, dout, lse, delta, q_scale, ranges: as `grad_queries`, which finds delta.
      blocks: how to cut.
      into: if qkv is packed, a `jax.Ref` (B,L,3,H,D).
    """
    norm = q_scale is not None
    dtype, (batch, _, heads, size) = dout.dtype, dout.shape
    ranges = transpose_ranges(ranges)
    pipeline = Pipeline.create(ranges, blocks, batch, heads)
    width, rows, columns, stages = blocks.warpgroups, blocks.rows, blocks.columns, blocks.stages
    packed, factors = len(qkv) == 1, [] if q_scale is None else [q_scale.astype(jnp.float32)]
    vectors = common.by_tile([lse, delta], pipeline.plan)
    (gradients,) = pipeline.call(
        "scale_attention_grad_keys",
        _GradKeys,
        [[] if packed else [jax.ShapeDtypeStruct(dout.shape, dtype)] * 2],
        {
            "k": tile_memory(dtype, 2, width, rows, size),
            "v": tile_memory(dtype, 2, width, rows, size),
            "q": tile_memory(dtype, stages, columns, size),
            "do": tile_memory(dtype, stages, columns, size),
            "vectors": plgpu.SMEM((stages, 2, columns), jnp.float32),
            "dk": tile_memory(dtype, width, rows, size),
            "dv": tile_memory(dtype, width, rows, size),
            "bars": [pipeline.row_barriers(2), pipeline.ring_barriers(1), pipeline.ring_barriers(2)],
            "landed": plgpu.Barrier(num_barriers=stages) if norm else None,
            "baton": pipeline.baton_barriers(),
        },
        [qkv, factors, dout, vectors, common.limits_of(ranges, rows), [into] if packed else []],
    )
    return gradients


@dataclasses.dataclass(frozen=True)
class _GradKeys:
    """The kernel for dk and dv in a thread block, as `_GradQueries`, with bands of keys."""

    pipeline: Pipeline
    me: Scalar
    qkv_refs: Sequence[Ref]
    factor_refs: Sequence[Ref]  # q_scale, with QK-norm
    dout_ref: Ref
    vectors_ref: Ref
    limits_ref: Ref
    into_refs: Sequence[Ref]  # for the gradients if qkv is packed
    table_ref: Ref
    gradient_refs: Sequence[Ref]  # else
    k: Ref
    v: Ref
    q: Ref
    do: Ref
    vectors: Ref
    dk: Ref
    dv: Ref
    bars: Sequence[tuple[Ref, Ref]]  # ready and free: of k and v, of q, of do and vectors
    landed: Ref
    baton: Ref

    @functools.cached_property
    def flow(self) -> Flow:
        """Keys and values, a band to each warpgroup; queries, and dout, lse and delta, tile by tile, to all."""
        row_bars, q_bars, do_bars = self.bars
        q_at, k_at, v_at = common.views(self.qkv_refs, packed=len(self.qkv_refs) == 1)
        (dout_at,) = common.views([self.dout_ref])
        keys = Rows([common.copy_rows(k_at, self.k), common.copy_rows(v_at, self.v)], *row_bars)
        normalize = common.normalize(self.q, self.factor_refs[0]) if self.factor_refs else None
        queries = Ring([common.copy_columns(q_at, self.q)], *q_bars, normalize, self.landed)
        copies = [common.copy_columns(dout_at, self.do), common.copy_vectors(self.vectors_ref, self.vectors)]
        return Flow(self.pipeline, self.table_ref, [keys], [queries, Ring(copies, *do_bars)], self.baton)

    def attend(self, band: Band) -> None:
        """Keys and values → gradients by them, sums over all tiles."""
        (keys,), blocks = self.flow.rows, self.pipeline.blocks
        limits = common.load_limits(self.limits_ref, band, blocks.rows)
        slot, mine = keys.place(band.item, self.me, blocks.warpgroups)
        k, v = self.k[TILED].at[slot, self.me], self.v[TILED].at[slot, self.me]
        plgpu.barrier_wait(keys.ready.at[mine])
        gain = common.gain_of(k, 1.0 if self.factor_refs else None)
        step = _KeyVisits(self, band, limits, k, v, gain).add_tile
        dk, dv = lax.fori_loop(band.first, band.last, step, (filled(0, *k.shape), filled(0, *v.shape)))
        dk = common.through_norm(dk, k, gain)[0] if self.factor_refs else dk * k.shape[1] ** -0.5
        plgpu.barrier_arrive(keys.free.at[mine])
        *_, dk_at, dv_at = common.views(self.into_refs or self.gradient_refs, packed=bool(self.into_refs))
        common.store_rows(band, [(dk, self.dk, dk_at), (dv, self.dv, dv_at)])


@dataclasses.dataclass(frozen=True, eq=False)  # JAX looks up bodies of loops by their hash
class _KeyVisits:
    """What a band of keys and values does with its tiles of queries.

    Attributes:
      kernel: that attends to them.
      band: of the keys.
      limits: the queries [start, end) that see each key, (R,) both.
      k, v: (R,D), in shared memory.
      gain: of logits, `common.gain_of`.
    """

    kernel: _GradKeys
    band: Band
    limits: Sequence[jax.Array]
    k: Ref
    v: Ref
    gain: Any

    def add_tile(self, tile: Scalar, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The sums, (R,D), with what a tile of queries adds: logits → weights, times dout; their gradients, times q."""
        flow, q, do = self.kernel.flow, self.kernel.q[TILED], self.kernel.do[TILED]
        stage, shape = flow.stage_of(self.band, tile), (self.k.shape[0], q.shape[1])
        flow.await_tile(stage)

        def vector(i: int) -> jax.Array:
            return along_columns(common.load_columns(self.kernel.vectors.at[stage, i]), shape)

        def products(accumulators: tuple[Ref, ...]) -> None:
            s_ref, dp_ref, dk_ref, dv_ref = accumulators
            plgpu.wgmma(s_ref, self.k, q.at[stage].transpose((1, 0)))
            plgpu.wgmma(dp_ref, self.v, do.at[stage].transpose((1, 0)))
            flow.pass_baton()
            s = common.mask(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), self.band, tile, self.limits)
            p = jnp.exp2(common.times(s, self.gain) - vector(0))
            # Before the product for dv, not beside it: p and ds at once are all that registers hold.
            ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - vector(1))
            plgpu.wgmma(dv_ref, p.astype(do.dtype), do.at[stage])
            plgpu.wgmma(dk_ref, ds.astype(q.dtype), q.at[stage])

        start = filled(0, *shape), filled(0, *shape), *gradients
        *_, dk, dv = pl.run_state(products)(tuple(map(plgpu.ACC.init, start)))
        flow.release(stage)
        return dk, dv
