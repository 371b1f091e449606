"""The Hopper kernel for attention over token pyramids, forward.

A band of queries visits its tiles of keys, with a running maximum and sum as in FlashAttention (Dao 2023). Logits are
in units of log 2.

With QK-norm no logit exceeds |q_scale|. Where that is at most `SAFE_SCALE`, exp2 of logits can neither overflow nor
vanish, and there is no maximum: a third fewer instructions, none of which waits for other lanes.

With `Blocks.paired` a tile's logits and the product of values and the weights of the tile before are asked for at once,
as in FlashAttention-3 (Shah et al. 2024): a turn and a wait at each tile, not two. The compiler waits for both products
before it turns logits into weights. Keys are then normalised by XLA beforehand: the loader would not keep up.

H200, B=8, H=24, 4096 tokens: 2.10 ms with a maximum, 1.72 ms without; in another run 1.64 ms with `Blocks.relay`, 1.51
ms with both.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.scale_attention import hopper_common as common
from pallas_kernels.scale_attention.hopper_blocks import Blocks
from pallas_kernels.scale_attention.hopper_common import along_rows, filled, tile_memory
from pallas_kernels.scale_attention.hopper_pipeline import Band, Pipeline, Ref, Ring, Rows, Scalar

# A running maximum before the first visible key; finite, so that exp2(-inf - NOTHING_SEEN) is 0 and not NaN.
NOTHING_SEEN = -1e30
# |q_scale| up to which bfloat16 needs no maximum: logits are within ±93 in units of log 2, so that exp2 gives normal
# numbers, and so are the sums of a million of them, times values of up to ten thousand. float16 has no such range.
SAFE_SCALE = 64.0


def forward(
    qkv: Sequence[jax.Array], q_scale: jax.Array | None, ranges: np.ndarray, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Attended values, and what the backward kernels want to know of logits.

    Args:
      qkv: q, k, v, each (B,L,H,D), or one (B,L,3,H,D).
      q_scale: (H,), or None without QK-norm.
      ranges: (L,2) int32, checked.
      blocks: how to cut.

    Returns:
      (B,L,H,D); and (B,H,≥L) float32, log2 of the sums of exp2 of logits.
    """
    norm = q_scale is not None
    dtype, (batch, length, heads, size) = qkv[0].dtype, common.shape_of(qkv)
    pipeline = Pipeline.create(ranges, blocks, batch, heads)
    width, rows, columns, stages = blocks.warpgroups, blocks.rows, blocks.columns, blocks.stages
    factors = common.sign_and_size(q_scale)
    unit_keys = [common.unit_keys(qkv, factors[0])] if norm and blocks.paired else []
    prepare = norm and not unit_keys
    logits_memory = plgpu.ACC((rows, columns), jnp.float32)

    def body(*refs: Ref, q: Ref, k: Ref, v: Ref, out: Ref, q_bar: Ref, kv_bar: Ref, landed: Ref, baton: Ref) -> None:
        qkv_refs, refs = refs[: len(qkv)], refs[len(qkv) :]
        (signs_ref, sizes_ref), refs = refs[: len(factors)] or (None, None), refs[len(factors) :]
        unit_key_refs, refs = refs[: len(unit_keys)], refs[len(unit_keys) :]
        limits_ref, table_ref, out_ref, lse_ref = refs
        (q_ready, q_free), (kv_ready, kv_free) = q_bar, kv_bar
        me = lax.axis_index("wg")

        def attend(band: Band) -> None:
            limits = [common.load_rows(limits_ref.at[i, pl.ds(band.row, rows)]) for i in range(2)]
            slot = lax.rem(band.item, 2)
            mine, my_q = slot * width + me, q[1].at[slot, me]
            plgpu.barrier_wait(q_ready.at[mine])
            gain = common.gain_of(my_q, sizes_ref[band.head] if norm else None)
            safe = sizes_ref[band.head] <= SAFE_SCALE if norm and dtype == jnp.bfloat16 else None

            def stage_of(tile: Scalar) -> Scalar:
                return lax.rem(band.turn + tile, stages)

            def await_turn(stage: Scalar) -> None:
                plgpu.barrier_wait(kv_ready.at[stage])
                pipeline.await_baton(baton)

            def multiply_keys(logits: Ref, stage: Scalar) -> None:
                plgpu.wgmma(logits, my_q, k[1].at[stage].transpose((1, 0)))

            def logits_of(tile: Scalar, stage: Scalar) -> jax.Array:
                def product(logits: Ref) -> jax.Array:
                    multiply_keys(logits, stage)
                    pipeline.pass_baton(baton)
                    return logits[...]

                await_turn(stage)
                return common.mask(pl.run_scoped(product, logits_memory), band, tile, limits)

            def follow(s: jax.Array, *carry: jax.Array) -> tuple[jax.Array, ...]:
                """The carry, relative to a maximum that has seen one more tile, where one is needed."""

                def rescale(s: jax.Array, total: jax.Array, peak: jax.Array, mass: jax.Array) -> tuple[jax.Array, ...]:
                    new_peak = jnp.maximum(peak, s.max(axis=1) * gain)
                    shrink = jnp.exp2(peak - new_peak)
                    return total * along_rows(shrink, total.shape), new_peak, mass * shrink

                if safe is None:
                    return rescale(s, *carry)
                return lax.cond(safe, lambda _, *carry: carry, rescale, s, *carry)

            def weigh(s: jax.Array, peak: jax.Array) -> jax.Array:
                return jnp.exp2(common.times(s, gain) - along_rows(peak, s.shape))

            def one_by_one(*start: jax.Array) -> tuple[jax.Array, ...]:
                def step(tile: Scalar, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    stage = stage_of(tile)
                    s = logits_of(tile, stage)
                    total, peak, mass = follow(s, *carry)

                    def accumulate(refs: tuple[Ref, Ref]) -> None:
                        total_ref, mass_ref = refs
                        p = weigh(s, peak)
                        plgpu.wgmma(total_ref, p.astype(dtype), v[1].at[stage])
                        mass_ref[...] += p.sum(axis=1)  # while the product is under way

                    total, mass = pl.run_state(accumulate)((plgpu.ACC.init(total), mass))
                    plgpu.barrier_arrive(kv_free.at[stage])
                    return total, peak, mass

                return lax.fori_loop(band.first, band.last, step, start)

            def in_pairs(*start: jax.Array) -> tuple[jax.Array, ...]:
                """As `one_by_one`, with the values of a tile multiplied together with the keys of the next."""

                def take(s: jax.Array, *carry: jax.Array) -> tuple[jax.Array, ...]:
                    total, peak, mass = follow(s, *carry)
                    p = weigh(s, peak)
                    return p.astype(dtype), total, peak, mass + p.sum(axis=1)

                def step(tile: Scalar, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    (p, total, peak, mass), stage, before = carry, stage_of(tile), stage_of(tile - 1)

                    def products(refs: tuple[Ref, Ref]) -> None:
                        logits, total_ref = refs
                        multiply_keys(logits, stage)
                        plgpu.wgmma(total_ref, p, v[1].at[before])
                        pipeline.pass_baton(baton)

                    await_turn(stage)
                    memory = plgpu.ACC.init(filled(0, rows, columns)), plgpu.ACC.init(total)
                    s, total = pl.run_state(products)(memory)
                    plgpu.barrier_arrive(kv_free.at[before])
                    return take(common.mask(s, band, tile, limits), total, peak, mass)

                carry = take(logits_of(band.first, stage_of(band.first)), *start)
                p, total, peak, mass = lax.fori_loop(band.first + 1, band.last, step, carry)
                last = stage_of(band.last - 1)
                total = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v[1].at[last]))(plgpu.ACC.init(total))
                plgpu.barrier_arrive(kv_free.at[last])
                return total, peak, mass

            lowest = NOTHING_SEEN if safe is None else jnp.where(safe, 0.0, NOTHING_SEEN)
            start = filled(0, rows, size), filled(lowest, rows), filled(0, rows)
            total, peak, mass = in_pairs(*start) if blocks.paired else one_by_one(*start)
            plgpu.barrier_arrive(q_free.at[mine])
            lse_ref[band.batch, band.head, pl.ds(band.row, rows)] = peak + jnp.log2(mass)
            total *= along_rows(1 / mass, total.shape)
            common.store_rows(band, [(total, out, *common.views([out_ref]))])

        q_at, k_at, v_at = common.views(qkv_refs, packed=len(qkv) == 1)
        (k_at,) = common.views(unit_key_refs) or (k_at,)
        queries = Rows([common.copy_rows(q_at, q[0])], q_ready, q_free)
        normalize = common.normalize(k[1], signs_ref) if prepare else None
        # One ring for both: a second barrier a tile costs more than keys gain by being there before their values.
        copies = [common.copy_columns(k_at, k[0]), common.copy_columns(v_at, v[0])]
        pairs = Ring(copies, kv_ready, kv_free, normalize, landed)
        pipeline.run(table_ref, [queries], [pairs], baton, attend)

    out, lse = pipeline.call(
        "scale_attention_forward",
        body,
        [
            jax.ShapeDtypeStruct((batch, length, heads, size), dtype),
            jax.ShapeDtypeStruct((batch, heads, max(length, rows)), jnp.float32),
        ],
        {
            "q": tile_memory(dtype, 2, width, rows, size),
            "k": tile_memory(dtype, stages, columns, size),
            "v": tile_memory(dtype, stages, columns, size),
            "out": tile_memory(dtype, width, rows, size),
            "q_bar": pipeline.row_barriers(1),
            "kv_bar": pipeline.ring_barriers(1 if prepare else 2),
            "landed": plgpu.Barrier(num_barriers=stages, num_arrivals=2) if prepare else None,
            "baton": pipeline.baton_barriers(),
        },
        [*qkv, *factors, *unit_keys, common.limits_of(ranges, rows)],
    )
    return out, lse
