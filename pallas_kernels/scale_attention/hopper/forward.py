"""The Hopper kernel for attention over token pyramids, forward.

A band of queries visits its tiles of keys, with a running maximum and sum as in FlashAttention (Dao 2023). Logits are
in units of log 2. `_Forward.flow` is what is loaded, `attend` what becomes of a band, `_Visits` what of its tiles.

With QK-norm no logit exceeds |q_scale|. Where that is at most `SAFE_SCALE`, exp2 of logits can neither overflow nor
vanish, and there is no maximum: a third fewer instructions, none of which waits for other lanes.

With `Blocks.paired` a tile's logits and the product of values and the weights of the tile before are asked for at once,
as in FlashAttention-3 (Shah et al. 2024): a turn and a wait at each tile, not two. The compiler waits for both products
before it turns logits into weights. Keys are then normalised by XLA beforehand: the loader would not keep up.

H200, B=8, H=24, 4096 tokens: 2.10 ms with a maximum, 1.72 ms without; in another run 1.64 ms with `Blocks.relay`, 1.51
ms with both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.scale_attention.hopper import common
from pallas_kernels.scale_attention.hopper.blocks import Blocks
from pallas_kernels.scale_attention.hopper.common import TILED, along_rows, filled, tile_memory
from pallas_kernels.scale_attention.hopper.pipeline import Band, Flow, Pipeline, Ref, Ring, Rows, Scalar

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
    out, lse = pipeline.call(
        "scale_attention_forward",
        _Forward,
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
        [qkv, factors, unit_keys, common.limits_of(ranges, rows)],
    )
    return out, lse


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The kernel in a thread block: one warpgroup loads what `flow` says, the others `attend` to bands of queries.

    Names in `_ref` or `_refs` lie in global memory, others in shared memory.
    """

    pipeline: Pipeline
    me: Scalar  # this warpgroup
    qkv_refs: Sequence[Ref]
    factor_refs: Sequence[Ref]  # signs and sizes of q_scale, with QK-norm
    unit_key_refs: Sequence[Ref]  # if they were normalised beforehand
    limits_ref: Ref
    table_ref: Ref
    out_ref: Ref
    lse_ref: Ref
    q: Ref
    k: Ref
    v: Ref
    out: Ref
    q_bar: tuple[Ref, Ref]  # ready and free
    kv_bar: tuple[Ref, Ref]
    landed: Ref
    baton: Ref

    @functools.cached_property
    def flow(self) -> Flow:
        """Queries, a band to each warpgroup; keys and values, tile by tile, to all."""
        q_at, k_at, v_at = common.views(self.qkv_refs, packed=len(self.qkv_refs) == 1)
        (k_at,) = common.views(self.unit_key_refs) or (k_at,)
        queries = Rows([common.copy_rows(q_at, self.q)], *self.q_bar)
        prepare = self.factor_refs and not self.unit_key_refs
        normalize = common.normalize(self.k, self.factor_refs[0]) if prepare else None
        # One ring for both: a second barrier a tile costs more than keys gain by being there before their values.
        copies = [common.copy_columns(k_at, self.k), common.copy_columns(v_at, self.v)]
        pairs = Ring(copies, *self.kv_bar, normalize, self.landed)
        return Flow(self.pipeline, self.table_ref, [queries], [pairs], self.baton)

    def attend(self, band: Band) -> None:
        """Queries → sums over all tiles → attended values."""
        (queries,), blocks = self.flow.rows, self.pipeline.blocks
        limits = common.load_limits(self.limits_ref, band, blocks.rows)
        slot, mine = queries.place(band.item, self.me, blocks.warpgroups)
        q = self.q[TILED].at[slot, self.me]
        plgpu.barrier_wait(queries.ready.at[mine])
        _, sizes = self.factor_refs or (None, None)
        gain = common.gain_of(q, sizes[band.head] if sizes is not None else None)
        safe = sizes[band.head] <= SAFE_SCALE if sizes is not None and q.dtype == jnp.bfloat16 else None
        visits = _Visits(self, band, limits, q, gain, safe)
        total, peak, mass = (visits.in_pairs if blocks.paired else visits.one_by_one)(visits.start())
        plgpu.barrier_arrive(queries.free.at[mine])
        self.lse_ref[band.batch, band.head, pl.ds(band.row, blocks.rows)] = peak + jnp.log2(mass)
        total *= along_rows(1 / mass, total.shape)
        common.store_rows(band, [(total, self.out, *common.views([self.out_ref]))])


class _Sums(NamedTuple):
    """What a band of queries has of the tiles that it has visited, float32.

    Attributes:
      total: (R,D), values by their weights.
      peak: (R,), what weights are relative to: weight = exp2(logit - peak).
      mass: (R,), weights.
    """

    total: jax.Array
    peak: jax.Array
    mass: jax.Array


@dataclasses.dataclass(frozen=True)
class _Visits:
    """What a band of queries does with its tiles of keys and values: q·k logits, w weights, p·v weighted values.

    `one_by_one`; the tensor cores are free while it turns logits into weights, for other warpgroups with a relay:

        tensor cores  q·k0     p0·v0 q·k1     p1·v1 q·k2     p2·v2
        other units       ─w0─           ─w1─           ─w2─
        release                     0              1              2

    `in_pairs`; one wait for both products of a step, and a tile's stage is kept for a step more:

        tensor cores  q·k0     q·k1 p0·v0     q·k2 p1·v1     p2·v2
        other units       ─w0─            ─w1─           ─w2─
        release                          0              1         2

    Attributes:
      kernel: that attends to them.
      band: of the queries.
      limits: the keys [start, end) that each query sees, (R,) both.
      q: (R,D), in shared memory.
      gain: of logits, `common.gain_of`.
      safe: whether they need no maximum; None if they do in any case.
    """

    kernel: _Forward
    band: Band
    limits: Sequence[jax.Array]
    q: Ref
    gain: Any
    safe: Scalar | None

    def start(self) -> _Sums:
        """Before the first tile."""
        lowest = NOTHING_SEEN if self.safe is None else jnp.where(self.safe, 0.0, NOTHING_SEEN)
        rows, size = self.q.shape
        return _Sums(filled(0, rows, size), filled(lowest, rows), filled(0, rows))

    def one_by_one(self, start: _Sums) -> _Sums:
        """Of all tiles: at each its logits, their weights, and these times its values."""

        def step(tile: Scalar, sums: _Sums) -> _Sums:
            stage = self.stage_of(tile)
            s = self.logits_of(tile, stage)
            total, peak, mass = self.follow(s, sums)

            def accumulate(refs: tuple[Ref, Ref]) -> None:
                total_ref, mass_ref = refs
                p = self.weigh(s, peak)
                self.multiply_values(total_ref, p.astype(self.q.dtype), stage)
                mass_ref[...] += p.sum(axis=1)  # while the product is under way

            total, mass = pl.run_state(accumulate)((plgpu.ACC.init(total), mass))
            self.kernel.flow.release(stage)
            return _Sums(total, peak, mass)

        return lax.fori_loop(self.band.first, self.band.last, step, start)

    def in_pairs(self, start: _Sums) -> _Sums:
        """As `one_by_one`, with the values of a tile multiplied together with the keys of the next."""

        def take(s: jax.Array, sums: _Sums) -> tuple[jax.Array, _Sums]:
            total, peak, mass = self.follow(s, sums)
            p = self.weigh(s, peak)
            return p.astype(self.q.dtype), _Sums(total, peak, mass + p.sum(axis=1))

        def step(tile: Scalar, carry: tuple[jax.Array, _Sums]) -> tuple[jax.Array, _Sums]:
            (p, sums), stage, before = carry, self.stage_of(tile), self.stage_of(tile - 1)

            def products(refs: tuple[Ref, Ref]) -> None:
                logits, total_ref = refs
                self.multiply_keys(logits, stage)
                self.multiply_values(total_ref, p, before)
                self.kernel.flow.pass_baton()

            self.kernel.flow.await_tile(stage)
            memory = plgpu.ACC.init(filled(0, *self.tile_shape)), plgpu.ACC.init(sums.total)
            s, total = pl.run_state(products)(memory)
            self.kernel.flow.release(before)
            return take(common.mask(s, self.band, tile, self.limits), sums._replace(total=total))

        first = self.band.first
        carry = take(self.logits_of(first, self.stage_of(first)), start)
        p, sums = lax.fori_loop(first + 1, self.band.last, step, carry)
        last = self.stage_of(self.band.last - 1)
        total = pl.run_state(lambda ref: self.multiply_values(ref, p, last))(plgpu.ACC.init(sums.total))
        self.kernel.flow.release(last)
        return sums._replace(total=total)

    # --- The parts of a visit, in the order of the data.

    def stage_of(self, tile: Scalar) -> Scalar:
        """Where in the ring a tile is."""
        return self.kernel.flow.stage_of(self.band, tile)

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.q.shape[0], self.kernel.pipeline.blocks.columns

    def multiply_keys(self, logits: Ref, stage: Scalar) -> None:
        """Asks for the product of queries and a tile of keys."""
        plgpu.wgmma(logits, self.q, self.kernel.k[TILED].at[stage].transpose((1, 0)))

    def logits_of(self, tile: Scalar, stage: Scalar) -> jax.Array:
        """(R,C), -inf where hidden, once the tile is there."""

        def product(logits: Ref) -> jax.Array:
            self.multiply_keys(logits, stage)
            self.kernel.flow.pass_baton()
            return logits[...]

        self.kernel.flow.await_tile(stage)
        s = pl.run_scoped(product, plgpu.ACC(self.tile_shape, jnp.float32))
        return common.mask(s, self.band, tile, self.limits)

    def follow(self, s: jax.Array, sums: _Sums) -> _Sums:
        """The sums, relative to a maximum that has seen one more tile, where one is needed."""

        def rescale(s: jax.Array, sums: _Sums) -> _Sums:
            peak = jnp.maximum(sums.peak, s.max(axis=1) * self.gain)
            shrink = jnp.exp2(sums.peak - peak)
            return _Sums(sums.total * along_rows(shrink, sums.total.shape), peak, sums.mass * shrink)

        if self.safe is None:
            return rescale(s, sums)
        return lax.cond(self.safe, lambda _, sums: sums, rescale, s, sums)

    def weigh(self, s: jax.Array, peak: jax.Array) -> jax.Array:
        """Logits → weights."""
        return jnp.exp2(common.times(s, self.gain) - along_rows(peak, s.shape))

    def multiply_values(self, total: Ref, weights: jax.Array, stage: Scalar) -> None:
        """Asks for the product of weights and a tile of values, to be added."""
        plgpu.wgmma(total, weights, self.kernel.v[TILED].at[stage])
