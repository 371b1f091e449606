"""What the Hopper kernels share: a persistent grid in which one warpgroup loads and the others compute.

Each thread block takes every n-th item. Its last warpgroup runs ahead and fills, by TMA, one or two slots of row tiles
for each compute warpgroup and a ring of column tiles that all of them read. Barriers named *ready* say that a tile can
be read, those named *free* that it was; all are free at the start.

With `Blocks.relay` a baton goes round the compute warpgroups, and who holds it issues the products of logits (ping-pong
in FlashAttention-3, Shah et al. 2024): then tensor cores work for one warpgroup while others turn logits into weights,
where without all may wait for tensor cores at once, and then all for exponentials. Every warpgroup meets every tile
that its item loads, to work on it or to skip it, and passes the baton once at each: it always arrives.

Kernels use lane semantics: warpgroup semantics infer how shared memory is laid out, and would refuse the two views of
`hopper_common.tile_memory`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import backend

from pallas_kernels.scale_attention import hopper_tiles as tiles
from pallas_kernels.scale_attention.hopper_blocks import Blocks

Ref = Any  # a Pallas reference
Scalar = Any  # an int32 of the kernel


@dataclasses.dataclass(frozen=True)
class Band:
    """What a compute warpgroup is asked to do: an entry of the plan's table (see there), for one head of one image."""

    batch: Scalar
    head: Scalar
    row: Scalar
    origin: Scalar
    first: Scalar
    last: Scalar
    full_first: Scalar
    full_last: Scalar
    item: Scalar  # how many items came before, in this thread block
    turn: Scalar  # that the ring has at tile 0

    def needs_mask(self, tile: Scalar) -> Scalar:
        """Whether some row does not see all of a tile."""
        return (tile < self.full_first) | (tile >= self.full_last)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row operands that arrive together.

    Attributes:
      copies: functions (batch, head, first row, slot, warpgroup, barrier).
      ready, free: barriers, one for each slot and warpgroup.
      slots: items in memory at a time. One is enough for what is read when a band starts.
    """

    copies: Sequence[Callable[..., None]]
    ready: Ref
    free: Ref
    slots: int = 2


@dataclasses.dataclass(frozen=True)
class Ring:
    """Column operands whose tiles arrive together.

    Attributes:
      copies: functions (batch, head, first column, tile, stage, barrier).
      ready, free: barriers, one for each stage.
      prepare: does, if tiles are to be changed in place before they are ready: a function (head, stage).
      landed: the barriers that copies arrive at if so.
    """

    copies: Sequence[Callable[..., None]]
    ready: Ref
    free: Ref
    prepare: Callable[..., None] | None = None
    landed: Ref = None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The schedule of one kernel over `batch` images of `heads` heads, on so many thread blocks."""

    plan: tiles.Plan
    blocks: Blocks
    batch: int
    heads: int
    thread_blocks: int

    @classmethod
    def create(cls, ranges: np.ndarray, blocks: Blocks, batch: int, heads: int) -> Pipeline:
        """One thread block for each multiprocessor, if there is enough to do."""
        plan = tiles.plan_tiles(ranges, blocks.rows, blocks.columns, blocks.warpgroups)
        abstract = jax.sharding.get_abstract_mesh().abstract_device
        cores = abstract.num_cores if abstract else backend.get_default_device().core_count
        return cls(plan, blocks, batch, heads, min(cores, len(plan.table) * batch * heads))

    def row_barriers(self, copies: int, slots: int = 2) -> tuple[plgpu.Barrier, plgpu.Barrier]:
        """Ready and free, for each slot and warpgroup."""
        number = slots * self.blocks.warpgroups
        return plgpu.Barrier(num_barriers=number, num_arrivals=copies), plgpu.Barrier(num_barriers=number)

    def ring_barriers(self, copies: int) -> tuple[plgpu.Barrier, plgpu.Barrier]:
        """Ready and free, for each stage."""
        number, readers = self.blocks.stages, self.blocks.warpgroups
        return (
            plgpu.Barrier(num_barriers=number, num_arrivals=copies),
            plgpu.Barrier(num_barriers=number, num_arrivals=readers),
        )

    def baton_barriers(self) -> plgpu.Barrier | None:
        """One for each warpgroup, if there is a baton: that it has it."""
        return plgpu.Barrier(num_barriers=self.blocks.warpgroups) if self.blocks.relay else None

    def await_baton(self, baton: Ref | None) -> None:
        """Before a warpgroup issues the products of a tile."""
        if baton is not None:
            plgpu.barrier_wait(baton.at[lax.axis_index("wg")])

    def pass_baton(self, baton: Ref | None) -> None:
        """Once they are issued."""
        if baton is not None:
            plgpu.barrier_arrive(baton.at[lax.rem(lax.axis_index("wg") + 1, self.blocks.warpgroups)])

    def call(
        self,
        name: str,
        body: Callable[..., None],
        out_type: Sequence[Any],
        scratch: Mapping[str, Any],
        operands: Sequence[Any],
    ) -> Sequence[jax.Array]:
        """Runs `body(*operands, table, *outputs, **scratch)`."""
        kernel = plgpu.kernel(
            body,
            out_type=list(out_type),
            scratch_types=scratch,
            grid=(self.thread_blocks,),
            grid_names=("cta",),
            num_threads=self.blocks.warpgroups + 1,
            thread_name="wg",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        )
        return kernel(*operands, jnp.asarray(self.plan.table))

    def run(
        self,
        table: Ref,
        rows: Sequence[Rows],
        rings: Sequence[Ring],
        baton: Ref | None,
        attend: Callable[[Band], None],
    ) -> None:
        """The body of a kernel: every item of this thread block.

        Args:
          table: the plan's, in global memory.
          rows, rings: what is loaded.
          baton: of `baton_barriers`.
          attend: does a band: waits for rows, and at each tile from first to last for every ring, to be ready, awaits
            and passes the baton, and says what is free again.
        """
        me, width = lax.axis_index("wg"), self.blocks.warpgroups
        rounds = lax.div(
            len(self.plan.table) * self.batch * self.heads - lax.axis_index("cta") + (self.thread_blocks - 1),
            self.thread_blocks,
        )

        @pl.when(me < width)
        def _() -> None:
            plgpu.set_max_registers(self.blocks.compute_registers, action="increase")
            for operands in rows:
                for slot in range(operands.slots):
                    plgpu.barrier_arrive(operands.free.at[slot * width + me])
            for ring in rings:
                for stage in range(self.blocks.stages):
                    plgpu.barrier_arrive(ring.free.at[stage])
            pl.when(me == width - 1)(lambda: self.pass_baton(baton))  # the first to have it is warpgroup 0
            lax.fori_loop(0, rounds, lambda turn, done: self._compute(table, rings, baton, attend, turn, done), 0)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == width)
        def _() -> None:
            plgpu.set_max_registers(self.blocks.loader_registers, action="decrease")

            def load(turn: Scalar, carry: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
                return self._load(table, rows, rings, turn, *carry)

            done, head = lax.fori_loop(0, rounds, load, (jnp.int32(0), jnp.int32(0)))
            self._prepare(rings, done - 1, head)

    def _compute(
        self,
        table: Ref,
        rings: Sequence[Ring],
        baton: Ref | None,
        attend: Callable[[Band], None],
        turn: Scalar,
        done: Scalar,
    ) -> Scalar:
        """One item, of which this warpgroup has one band.

        `done` counts the column tiles that the rings have seen so far; returns what it is after the item.
        """
        item, batch, head = self._look_up(turn)
        entry = self._entry(table, item, lax.axis_index("wg"), turn)
        first, last = entry[tiles.FIRST], entry[tiles.LAST]
        load_first, load_last = entry[tiles.LOAD_FIRST], entry[tiles.LOAD_LAST]
        ring_turn = done - load_first

        def skip(tile: Scalar, _: None) -> None:
            stage = lax.rem(ring_turn + tile, self.blocks.stages)
            self.await_baton(baton)
            self.pass_baton(baton)
            for ring in rings:
                plgpu.barrier_wait(ring.ready.at[stage])
                plgpu.barrier_arrive(ring.free.at[stage])

        lax.fori_loop(load_first, first, skip, None)

        @pl.when(last > first)
        def _() -> None:
            where = entry[tiles.ROW], entry[tiles.ORIGIN], first, last, entry[tiles.FULL_FIRST], entry[tiles.FULL_LAST]
            attend(Band(batch, head, *where, item=turn, turn=ring_turn))

        lax.fori_loop(last, load_last, skip, None)
        return done + load_last - load_first

    def _load(
        self, table: Ref, rows: Sequence[Rows], rings: Sequence[Ring], turn: Scalar, done: Scalar, previous_head: Scalar
    ) -> tuple[Scalar, Scalar]:
        """Requests all that an item reads. A tile is prepared once the next, maybe of another item, is requested.

        `previous_head` is that of the item before; returns `done` as `_compute`, and the head.
        """
        item, batch, head = self._look_up(turn)
        self._load_rows(table, rows, turn)
        entry = self._entry(table, item, 0, turn)
        origin, grid = entry[tiles.ORIGIN], entry[tiles.GRID]
        first, last = entry[tiles.LOAD_FIRST], entry[tiles.LOAD_LAST]

        def request(tile: Scalar, latest_head: Scalar) -> Scalar:
            number = done + tile - first
            stage = lax.rem(number, self.blocks.stages)
            for ring in rings:
                plgpu.barrier_wait(ring.free.at[stage])
                arrived = (ring.landed if ring.prepare else ring.ready).at[stage]
                for copy in ring.copies:
                    copy(batch, head, origin + tile * self.blocks.columns, grid + tile, stage, arrived)
            pl.when(number > 0)(lambda: self._prepare(rings, number - 1, latest_head))
            return head

        return done + last - first, lax.fori_loop(first, last, request, previous_head)

    def _prepare(self, rings: Sequence[Ring], number: Scalar, head: Scalar) -> None:
        """Waits for a tile, by its number in the rings, and makes it ready where that takes more than loading."""
        stage = lax.rem(number, self.blocks.stages)
        for ring in rings:
            if ring.prepare:
                plgpu.barrier_wait(ring.landed.at[stage])
                ring.prepare(head, stage)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ring.ready.at[stage])

    def _load_rows(self, table: Ref, rows: Sequence[Rows], turn: Scalar) -> None:
        item, batch, head = self._look_up(turn)
        for reader in range(self.blocks.warpgroups):
            entry = self._entry(table, item, reader, turn)

            @pl.when(entry[tiles.LAST] > entry[tiles.FIRST])
            def _(entry: Ref = entry, reader: int = reader) -> None:
                for operands in rows:
                    slot = lax.rem(turn, operands.slots)
                    which = slot * self.blocks.warpgroups + reader
                    plgpu.barrier_wait(operands.free.at[which])
                    for copy in operands.copies:
                        copy(batch, head, entry[tiles.ROW], slot, reader, operands.ready.at[which])

    def _entry(self, table: Ref, item: Scalar, warpgroup: Scalar, turn: Scalar) -> Ref:
        """The band of a warpgroup. Roles rotate, so that idle and short bands fall on each in turn."""
        return table.at[item, lax.rem(warpgroup + turn, self.blocks.warpgroups)]

    def _look_up(self, turn: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Item, image and head of a turn: heavy regions first, and in a region the items of a head side by side."""
        number = lax.axis_index("cta") + turn * self.thread_blocks
        start, end = jnp.int32(0), 0
        first, count = (jnp.int32(x) for x in self.plan.regions[0])
        for (_, before), (next_first, next_count) in zip(self.plan.regions, self.plan.regions[1:], strict=False):
            end += before * self.batch * self.heads
            later = number >= end
            start = jnp.where(later, end, start)
            first, count = jnp.where(later, next_first, first), jnp.where(later, next_count, count)
        which = lax.div(number - start, count)
        batch = lax.div(which, self.heads)
        return first + number - start - which * count, batch, which - batch * self.heads
