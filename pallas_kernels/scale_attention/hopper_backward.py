"""The Hopper kernels for attention over token pyramids, backward: one for dq, and one for dk and dv.

Both compute the weights again, from the logits and what `forward` kept of them, so that neither has to add to what
another thread block wrote. In the second one rows are keys and columns queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.scale_attention import hopper_common as common
from pallas_kernels.scale_attention.hopper_blocks import Blocks
from pallas_kernels.scale_attention.hopper_common import along_columns, along_rows, filled, tile_memory
from pallas_kernels.scale_attention.hopper_pipeline import Band, Pipeline, Ref, Ring, Rows, Scalar
from pallas_kernels.scale_attention.ranges import transpose_ranges


def grad_queries(
    qkv: Sequence[jax.Array],
    out: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    q_scale: jax.Array | None,
    ranges: np.ndarray,
    blocks: Blocks,
) -> Sequence[jax.Array]:
    """Gradient by q, and what else of queries is found on the way.

    Args:
      qkv, q_scale, ranges: as `forward`.
      out, lse: from `forward`.
      dout: (B,L,H,D), the gradient by out.
      blocks: how to cut.

    Returns:
      dq, (B,L,H,D), or, if qkv is packed, (B,L,3,H,D) of which only the first third is written;
      delta, (B,H,≥L) float32, the inner products of out and dout;
      with norm also (B,H,≥L) float32, what each query adds to the gradient by |q_scale|.
    """
    norm = q_scale is not None
    dtype, (batch, _, heads, size) = dout.dtype, dout.shape
    pipeline = Pipeline.create(ranges, blocks, batch, heads)
    width, rows, columns, stages = blocks.warpgroups, blocks.rows, blocks.columns, blocks.stages
    factors, packed = common.sign_and_size(q_scale), len(qkv) == 1

    def body(
        *refs: Ref, q: Ref, do: Ref, o: Ref, k: Ref, v: Ref, dq: Ref, bars: Sequence[Any], landed: Ref, baton: Ref
    ) -> None:
        qkv_refs, refs = refs[: len(qkv)], refs[len(qkv) :]
        (signs_ref, sizes_ref), refs = refs[: len(factors)] or (None, None), refs[len(factors) :]
        out_ref, dout_ref, lse_ref, limits_ref, table_ref, dq_ref, delta_ref, *dots_ref = refs
        (row_ready, row_free), (o_ready, o_free), (k_ready, k_free), (v_ready, v_free) = bars
        me = lax.axis_index("wg")

        def attend(band: Band) -> None:
            vector_at = (band.batch, band.head, pl.ds(band.row, rows))
            limits = [common.load_rows(limits_ref.at[i, pl.ds(band.row, rows)]) for i in range(2)]
            lse = common.load_rows(lse_ref.at[vector_at])
            slot = lax.rem(band.item, 2)
            mine, my_q, my_do = slot * width + me, q[1].at[slot, me], do[1].at[slot, me]
            plgpu.barrier_wait(row_ready.at[mine])
            plgpu.barrier_wait(o_ready.at[me])
            delta = jnp.sum(common.load(o[1].at[0, me]) * common.load(my_do), axis=1)
            plgpu.barrier_arrive(o_free.at[me])
            delta_ref[vector_at] = delta
            gain = common.gain_of(my_q, sizes_ref[band.head] if norm else None)

            def step(tile: Scalar, total: jax.Array) -> jax.Array:
                stage = lax.rem(band.turn + tile, stages)
                plgpu.barrier_wait(k_ready.at[stage])
                plgpu.barrier_wait(v_ready.at[stage])
                pipeline.await_baton(baton)

                def products(accumulators: tuple[Ref, ...]) -> None:
                    s_ref, dp_ref, total_ref = accumulators
                    plgpu.wgmma(s_ref, my_q, k[1].at[stage].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, my_do, v[1].at[stage].transpose((1, 0)))
                    pipeline.pass_baton(baton)
                    s = common.mask(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), band, tile, limits)
                    p = jnp.exp2(common.times(s, gain) - along_rows(lse, s.shape))
                    ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - along_rows(delta, s.shape))
                    plgpu.wgmma(total_ref, ds.astype(dtype), k[1].at[stage])

                start = filled(0, rows, columns), filled(0, rows, columns), total
                *_, total = pl.run_state(products)(tuple(map(plgpu.ACC.init, start)))
                plgpu.barrier_arrive(k_free.at[stage])
                plgpu.barrier_arrive(v_free.at[stage])
                return total

            total = lax.fori_loop(band.first, band.last, step, filled(0, rows, size))
            if norm:
                total, dots_ref[0][vector_at] = common.through_norm(total, my_q, gain)
            else:
                total *= size**-0.5
            plgpu.barrier_arrive(row_free.at[mine])
            common.store_rows(band, [(total, dq, common.views([dq_ref], packed=packed)[0])])

        q_at, k_at, v_at = common.views(qkv_refs, packed=packed)
        out_at, dout_at = common.views([out_ref, dout_ref])
        queries = Rows([common.copy_rows(q_at, q[0]), common.copy_rows(dout_at, do[0])], row_ready, row_free)
        outs = Rows([common.copy_rows(out_at, o[0])], o_ready, o_free, slots=1)
        normalize = common.normalize(k[1], signs_ref) if norm else None
        keys = Ring([common.copy_columns(k_at, k[0])], k_ready, k_free, normalize, landed)
        values = Ring([common.copy_columns(v_at, v[0])], v_ready, v_free)
        pipeline.run(table_ref, [queries, outs], [keys, values], baton, attend)

    vectors = jax.ShapeDtypeStruct(lse.shape, jnp.float32)
    return pipeline.call(
        "scale_attention_grad_queries",
        body,
        [jax.ShapeDtypeStruct(qkv[0].shape, dtype), vectors, *([vectors] if norm else [])],
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
        [*qkv, *factors, out, dout, lse, common.limits_of(ranges, rows)],
    )


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

    def body(
        *refs: Ref,
        k: Ref,
        v: Ref,
        q: Ref,
        do: Ref,
        vectors: Ref,
        dk: Ref,
        dv: Ref,
        bars: Sequence[Any],
        landed: Ref,
        baton: Ref,
    ) -> None:
        qkv_refs, refs = refs[: len(qkv)], refs[len(qkv) :]
        factor_refs, refs = refs[: len(factors)], refs[len(factors) :]
        (dout_ref, vectors_ref, limits_ref), refs = refs[:3], refs[3:]
        table_ref, gradients = refs[packed], [*refs[:packed], *refs[packed + 1 :]]
        (row_ready, row_free), (q_ready, q_free), (do_ready, do_free) = bars
        me = lax.axis_index("wg")

        def attend(band: Band) -> None:
            limits = [common.load_rows(limits_ref.at[i, pl.ds(band.row, rows)]) for i in range(2)]
            slot = lax.rem(band.item, 2)
            mine, my_k, my_v = slot * width + me, k[1].at[slot, me], v[1].at[slot, me]
            plgpu.barrier_wait(row_ready.at[mine])
            gain = common.gain_of(my_k, 1.0 if norm else None)

            def step(tile: Scalar, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                stage = lax.rem(band.turn + tile, stages)
                plgpu.barrier_wait(q_ready.at[stage])
                plgpu.barrier_wait(do_ready.at[stage])
                pipeline.await_baton(baton)

                def vector(i: int) -> jax.Array:
                    return along_columns(common.load_columns(vectors.at[stage, i]), (rows, columns))

                def products(accumulators: tuple[Ref, ...]) -> None:
                    s_ref, dp_ref, dk_ref, dv_ref = accumulators
                    plgpu.wgmma(s_ref, my_k, q[1].at[stage].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, my_v, do[1].at[stage].transpose((1, 0)))
                    pipeline.pass_baton(baton)
                    s = common.mask(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), band, tile, limits)
                    p = jnp.exp2(common.times(s, gain) - vector(0))
                    # Before the product for dv, not beside it: p and ds at once are all that registers hold.
                    ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=0) - vector(1))
                    plgpu.wgmma(dv_ref, p.astype(dtype), do[1].at[stage])
                    plgpu.wgmma(dk_ref, ds.astype(dtype), q[1].at[stage])

                start = filled(0, rows, columns), filled(0, rows, columns), *carry
                *_, dk_total, dv_total = pl.run_state(products)(tuple(map(plgpu.ACC.init, start)))
                plgpu.barrier_arrive(q_free.at[stage])
                plgpu.barrier_arrive(do_free.at[stage])
                return dk_total, dv_total

            start = filled(0, rows, size), filled(0, rows, size)
            dk_total, dv_total = lax.fori_loop(band.first, band.last, step, start)
            dk_total = common.through_norm(dk_total, my_k, gain)[0] if norm else dk_total * size**-0.5
            plgpu.barrier_arrive(row_free.at[mine])
            *_, dk_at, dv_at = common.views(gradients, packed=packed)
            common.store_rows(band, [(dk_total, dk, dk_at), (dv_total, dv, dv_at)])

        q_at, k_at, v_at = common.views(qkv_refs, packed=packed)
        (dout_at,) = common.views([dout_ref])
        keys = Rows([common.copy_rows(k_at, k[0]), common.copy_rows(v_at, v[0])], row_ready, row_free)
        normalize = common.normalize(q[1], factor_refs[0]) if norm else None
        queries = Ring([common.copy_columns(q_at, q[0])], q_ready, q_free, normalize, landed)
        copies = [common.copy_columns(dout_at, do[0]), common.copy_vectors(vectors_ref, vectors)]
        pipeline.run(table_ref, [keys], [queries, Ring(copies, do_ready, do_free)], baton, attend)

    vectors = common.by_tile([lse, delta], pipeline.plan)
    return pipeline.call(
        "scale_attention_grad_keys",
        body,
        [] if packed else [jax.ShapeDtypeStruct(dout.shape, dtype)] * 2,
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
        [*qkv, *factors, dout, vectors, common.limits_of(ranges, rows), *([into] if packed else [])],
    )
