"""What the Hopper kernels share: a persistent grid in which one warpgroup loads and the others compute.

Each thread block takes every n-th item. Its last warpgroup runs ahead and fills, by TMA, one or two slots of row tiles
for each compute warpgroup and a ring of column tiles that all of them read. Barriers named *ready* say that a tile can
be read, those named *free* that it was; all are free at the start.

With `Blocks.relay` a baton goes round the compute warpgroups, and who holds it issues the products of logits (ping-pong
in FlashAttention-3, Shah et al. 2024): then tensor cores work for one warpgroup while others turn logits into weights,
where without all may wait for tensor cores at once, and then all for exponentials. Every warpgroup meets every tile
that its item loads, to work on it or to skip it, and passes the baton once at each: it always arrives.

A `Pipeline` is the schedule, known when tracing. A `Kernel` says what is loaded, its `Flow`, and what is done with it.

Kernels use lane semantics: warpgroup semantics infer how shared memory is laid out, and would refuse the two views of
`common.tile_memory`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.devices import core_count
from pallas_kernels.scale_attention.hopper import tiles
from pallas_kernels.scale_attention.hopper.blocks import Blocks

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

    def place(self, item: Scalar, warpgroup: Scalar, width: int) -> tuple[Scalar, Scalar]:
        """The slot of an item, and the number of the barriers there of a warpgroup, one of `width`."""
        slot = lax.rem(item, self.slots)
        return slot, slot * width + warpgroup


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
        return cls(plan, blocks, batch, heads, min(core_count(), len(plan.table) * batch * heads))

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

    def rounds(self) -> Scalar:
        """How many items fall to this thread block."""
        items = len(self.plan.table) * self.batch * self.heads
        return lax.div(items - lax.axis_index("cta") + (self.thread_blocks - 1), self.thread_blocks)

    def look_up(self, turn: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Item, image and head of a turn: heavy regions first, and in a region the items of a head side by side."""
        regions = self.plan.regions
        number = lax.axis_index("cta") + turn * self.thread_blocks
        start, end = jnp.int32(0), 0
        first, count = (jnp.int32(x) for x in regions[0])
        for (_, before), (next_first, next_count) in itertools.pairwise(regions):
            end += before * self.batch * self.heads
            later = number >= end
            start = jnp.where(later, end, start)
            first, count = jnp.where(later, next_first, first), jnp.where(later, next_count, count)
        which = lax.div(number - start, count)
        batch = lax.div(which, self.heads)
        return first + number - start - which * count, batch, which - batch * self.heads

    def call(
        self,
        name: str,
        kernel: Callable[..., Kernel],
        out_type: Sequence[Any],
        scratch: Mapping[str, Any],
        operands: Sequence[Any],
    ) -> Sequence[Any]:
        """Runs `kernel(pipeline, warpgroup, *operands, table, *outputs, **scratch)`.

        An operand or an output may be a sequence of them.
        """

        def body(*refs: Any, **memory: Any) -> None:
            running = kernel(self, lax.axis_index("wg"), *refs, **memory)
            running.flow.run(running.attend)

        call = plgpu.kernel(
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
        return call(*operands, jnp.asarray(self.plan.table))


class Kernel(Protocol):
    """A kernel at work in a thread block: its producer loads what `flow` says, its consumers `attend` to bands.

    It is made of what `Pipeline.call` lists: references to global memory, in that order, and to shared memory, by name.
    """

    @property
    def flow(self) -> Flow:
        """What is loaded."""

    def attend(self, band: Band) -> None:
        """Does a band.

        It waits for rows, calls `await_tile`, `pass_baton` and `release` of the flow for each tile from first to last,
        and says that rows are free again.
        """


@dataclasses.dataclass(frozen=True)
class Flow:
    """How tiles go through a thread block, and how its warpgroups wait for each other.

    An item whose two bands visit tiles 0 to 3, with two consumers, a ring of two stages and a baton. `2>` is the copy
    of tile 2, into stage 0; `[2   ]` what a consumer does from `await_tile` to `release`; `.` waiting:

        loader      rows>0>1>.....2>...3>rows>0>      the next item's rows have a slot of their own
        consumer 0  .......[0   ][1   ][2   ][3   ]out
        consumer 1  .........[0   ][1   ][2   ][3   ]out

        barrier      who waits                         who arrives
        rows.free    loader, before it copies          the consumer of these rows, once it is done with them
        rows.ready   consumer, when a band starts      the copies
        ring.free    loader, before it copies          every consumer, by `release`
        ring.landed  loader, before it prepares        the copies, where the ring has `prepare`
        ring.ready   consumer, by `await_tile`         the copies, or the loader once it has prepared the tile
        baton        consumer, by `await_tile`         the consumer before, by `pass_baton`

    The loader prepares a tile once it has requested the next, so that copies are under way meanwhile.

    Attributes:
      pipeline: the schedule.
      table: the plan's, in global memory.
      rows, rings: what is loaded.
      baton: of `baton_barriers`.
    """

    pipeline: Pipeline
    table: Ref
    rows: Sequence[Rows]
    rings: Sequence[Ring]
    baton: Ref | None

    def run(self, attend: Callable[[Band], None]) -> None:
        """Every item of this thread block; `attend` is that of its `Kernel`."""
        me, width, rounds = lax.axis_index("wg"), self.pipeline.blocks.warpgroups, self.pipeline.rounds()
        pl.when(me < width)(lambda: self._compute(me, rounds, attend))
        pl.when(me == width)(lambda: self._load(rounds))

    # --- What a consumer does at each tile.

    def stage_of(self, band: Band, tile: Scalar) -> Scalar:
        """Where in the rings a tile is."""
        return lax.rem(band.turn + tile, self.pipeline.blocks.stages)

    def await_tile(self, stage: Scalar) -> None:
        """Until it is in all rings, and this warpgroup has the baton. Then products may be issued."""
        for ring in self.rings:
            plgpu.barrier_wait(ring.ready.at[stage])
        self._await_baton()

    def _await_baton(self) -> None:
        if self.baton is not None:
            plgpu.barrier_wait(self.baton.at[lax.axis_index("wg")])

    def pass_baton(self) -> None:
        """Once products are issued."""
        if self.baton is not None:
            plgpu.barrier_arrive(self.baton.at[lax.rem(lax.axis_index("wg") + 1, self.pipeline.blocks.warpgroups)])

    def release(self, stage: Scalar) -> None:
        """Once products are done: the producer may fill it again."""
        for ring in self.rings:
            plgpu.barrier_arrive(ring.free.at[stage])

    # --- Consumers.

    def _compute(self, me: Scalar, rounds: Scalar, attend: Callable[[Band], None]) -> None:
        blocks = self.pipeline.blocks
        plgpu.set_max_registers(blocks.compute_registers, action="increase")
        for operands in self.rows:
            for slot in range(operands.slots):
                plgpu.barrier_arrive(operands.free.at[slot * blocks.warpgroups + me])
        for ring in self.rings:
            for stage in range(blocks.stages):
                plgpu.barrier_arrive(ring.free.at[stage])
        pl.when(me == blocks.warpgroups - 1)(self.pass_baton)  # the first to have it is warpgroup 0
        lax.fori_loop(0, rounds, lambda turn, done: self._compute_item(attend, turn, done), 0)
        plgpu.wait_smem_to_gmem(0)

    def _compute_item(self, attend: Callable[[Band], None], turn: Scalar, done: Scalar) -> Scalar:
        """An item, of which this warpgroup has one band.

        `done` counts the column tiles that the rings have seen so far; returns what it is after the item.
        """
        item, batch, head = self.pipeline.look_up(turn)
        entry = self._entry(item, lax.axis_index("wg"), turn)
        first, last = entry[tiles.FIRST], entry[tiles.LAST]
        load_first, load_last = entry[tiles.LOAD_FIRST], entry[tiles.LOAD_LAST]
        ring_turn = done - load_first

        def skip(tile: Scalar, _: None) -> None:
            stage = lax.rem(ring_turn + tile, self.pipeline.blocks.stages)
            self._await_baton()
            self.pass_baton()
            for ring in self.rings:
                plgpu.barrier_wait(ring.ready.at[stage])
                plgpu.barrier_arrive(ring.free.at[stage])

        lax.fori_loop(load_first, first, skip, None)

        @pl.when(last > first)
        def _() -> None:
            where = entry[tiles.ROW], entry[tiles.ORIGIN], first, last, entry[tiles.FULL_FIRST], entry[tiles.FULL_LAST]
            attend(Band(batch, head, *where, item=turn, turn=ring_turn))

        lax.fori_loop(last, load_last, skip, None)
        return done + load_last - load_first

    # --- The producer.

    def _load(self, rounds: Scalar) -> None:
        plgpu.set_max_registers(self.pipeline.blocks.loader_registers, action="decrease")

        def load(turn: Scalar, carry: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            return self._load_item(turn, *carry)

        done, head = lax.fori_loop(0, rounds, load, (jnp.int32(0), jnp.int32(0)))
        self._prepare(done - 1, head)

    def _load_item(self, turn: Scalar, done: Scalar, previous_head: Scalar) -> tuple[Scalar, Scalar]:
        """Requests all that an item reads. A tile is prepared once the next, maybe of another item, is requested.

        `previous_head` is that of the item before; returns `done` as `_compute_item`, and the head.
        """
        item, batch, head = self.pipeline.look_up(turn)
        self._load_rows(turn)
        entry, blocks = self._entry(item, 0, turn), self.pipeline.blocks
        origin, grid = entry[tiles.ORIGIN], entry[tiles.GRID]
        first, last = entry[tiles.LOAD_FIRST], entry[tiles.LOAD_LAST]

        def request(tile: Scalar, latest_head: Scalar) -> Scalar:
            number = done + tile - first
            stage = lax.rem(number, blocks.stages)
            for ring in self.rings:
                plgpu.barrier_wait(ring.free.at[stage])
                arrived = (ring.landed if ring.prepare else ring.ready).at[stage]
                for copy in ring.copies:
                    copy(batch, head, origin + tile * blocks.columns, grid + tile, stage, arrived)
            pl.when(number > 0)(lambda: self._prepare(number - 1, latest_head))
            return head

        return done + last - first, lax.fori_loop(first, last, request, previous_head)

    def _load_rows(self, turn: Scalar) -> None:
        item, batch, head = self.pipeline.look_up(turn)
        width = self.pipeline.blocks.warpgroups
        for reader in range(width):
            entry = self._entry(item, reader, turn)

            @pl.when(entry[tiles.LAST] > entry[tiles.FIRST])
            def _(entry: Ref = entry, reader: int = reader) -> None:
                for operands in self.rows:
                    slot, which = operands.place(turn, reader, width)
                    plgpu.barrier_wait(operands.free.at[which])
                    for copy in operands.copies:
                        copy(batch, head, entry[tiles.ROW], slot, reader, operands.ready.at[which])

    def _prepare(self, number: Scalar, head: Scalar) -> None:
        """Waits for a tile, by its number in the rings, and makes it ready where that takes more than loading."""
        stage = lax.rem(number, self.pipeline.blocks.stages)
        for ring in self.rings:
            if ring.prepare:
                plgpu.barrier_wait(ring.landed.at[stage])
                ring.prepare(head, stage)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ring.ready.at[stage])

    def _entry(self, item: Scalar, warpgroup: Scalar, turn: Scalar) -> Ref:
        """The band of a warpgroup. Roles rotate, so that idle and short bands fall on each in turn."""
        return self.table.at[item, lax.rem(warpgroup + turn, self.pipeline.blocks.warpgroups)]
