"""The kernel of `small_block`: what each warpgroup of a thread block does.

Axis letters: C width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu

from pallas_kernels.scale_attention import hopper_common as common
from pallas_kernels.scale_attention.hopper_common import along_columns, along_rows
from pallas_kernels.small_block_plan import (
    CHUNK,
    LOADER_REGISTERS,
    THREADS,
    TILE,
    Buffers,
    Phase,
    Plan,
    Product,
    Ref,
    Ring,
    Scalar,
    Task,
)

APART = 64  # int32 between numbers that are counted up, so that L2 serves them side by side
EPS = 1e-6
GELU_SCALE, GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


class Weights(NamedTuple):
    """Parameters of blocks, each with a leading depth axis: kernels bfloat16, the rest float32."""

    qkv: jax.Array  # (depth,C,3C): q of all heads, k, v
    proj: jax.Array  # (depth,C,C)
    fc1: jax.Array  # (depth,C,F)
    fc2: jax.Array  # (depth,F,C)
    qkv_bias: jax.Array  # (depth,3C)
    proj_bias: jax.Array  # (depth,C)
    fc1_bias: jax.Array  # (depth,F)
    fc2_bias: jax.Array  # (depth,C)
    q_scale: jax.Array  # (depth,H): q and k have norm 1 before


class Modulation(NamedTuple):
    """Gates, scales and shifts, (depth,B,1,C) float32 each: 1 of attention, 2 of the feed-forward."""

    g1: jax.Array
    g2: jax.Array
    s1: jax.Array
    s2: jax.Array
    b1: jax.Array
    b2: jax.Array


class ThreadBlock:
    """Its warpgroups: those that read weight tiles, and compute; one that loads these; one that loads operands.

    `number` counts the chunks that have gone through the rings.
    """

    def __init__(
        self, plan: Plan, given: tuple[Ref, Weights, Modulation], to: Buffers, scratch: dict[str, Ref]
    ) -> None:
        self.plan, self.to = plan, to
        self.given, self.parameters, self.modulation = given
        weights = self.parameters
        operands, self.flat, self.tiled = scratch["shared"]
        self.weights = Ring(scratch["weights_memory"], scratch["weights_ready"], scratch["weights_free"])
        self.operands = Ring(operands, scratch["operands_ready"], scratch["operands_free"])
        self.attention_ready = scratch["attention_ready"]
        self.counts = pl.get_global(plgpu.SemaphoreType.REGULAR((len(Phase) * APART,)))
        self.cta, self.me = lax.axis_index("cta"), lax.axis_index("wg")

        def product(phase: Phase, operand: Ref, kernel: Ref, first: Scalar = self.cta, splits: int = 1) -> Product:
            return Product(phase, Phase(phase - 1), operand, kernel, first, plan.tasks(phase), splits)

        # FC1 begins where QKV ends: neither keeps all thread blocks busy, and all are to load the same.
        other = lax.rem(self.cta + plan.tasks(Phase.FC1), plan.thread_blocks)
        self.qkv = product(Phase.QKV, to.operand, weights.qkv)
        self.proj = product(Phase.PROJ, to.attended, weights.proj, splits=plan.splits)
        self.fc1 = product(Phase.FC1, to.operand, weights.fc1, first=other)
        self.fc2 = product(Phase.FC2, to.hidden, weights.fc2, splits=plan.splits)

    def run(self) -> None:
        """The body of the kernel."""
        readers = self.plan.readers

        def each_block(do: Callable[[Scalar, Scalar], Scalar]) -> None:
            lax.fori_loop(0, self.plan.depth, do, jnp.int32(0))

        @pl.when(self.me < readers)
        def _() -> None:
            plgpu.set_max_registers(self.plan.registers, action="increase")
            for ring in (self.weights, self.operands):
                for stage in range(ring.memory.shape[0]):
                    plgpu.barrier_arrive(ring.free.at[stage])
            self._begin()
            each_block(self._compute)

        @pl.when(self.me >= readers)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            pl.when(self.me == readers)(lambda: each_block(self._load_weights))
            pl.when(self.me > readers)(lambda: each_block(self._load_operands))

    def _compute(self, block: Scalar, number: Scalar) -> Scalar:
        weights, modulation = self.parameters, self.modulation
        number = self._multiply(self.qkv, number, self._store_qkv, weights.qkv_bias.at[block])
        self._attend(block)
        number = self._multiply(self.proj, number, self._store_partial)
        self._add(block, Phase.PROJ, weights.proj_bias, modulation.g1, modulation.s2, modulation.b2, block)
        number = self._multiply(self.fc1, number, self._store_hidden, weights.fc1_bias.at[block])
        number = self._multiply(self.fc2, number, self._store_partial)
        following = jnp.minimum(block + 1, self.plan.depth - 1)  # after the last nobody reads the norm
        self._add(block, Phase.FC2, weights.fc2_bias, modulation.g2, modulation.s1, modulation.b1, following)
        return number

    # --- Between phases.

    def _finish(self, phase: Phase) -> None:
        plgpu.semaphore_signal(self.counts.at[phase * APART], memory_scope="gpu")

    def _wait(self, phase: Phase, block: Scalar) -> None:
        """Until a phase of a block is finished, and what it wrote can be read or written over."""
        count = (block + 1) * self.plan.finishers(phase)
        plgpu.semaphore_wait(self.counts.at[phase * APART], count, decrement=False, memory_scope="gpu")

    def _wait_to_copy(self, phase: Phase, block: Scalar) -> None:
        """As `_wait`, for what is read by TMA but was not written by it."""
        self._wait(phase, block)
        plgpu.inline_mgpu()(lambda _: mgpu.inline_ptx("fence.proxy.async.global;", has_side_effects=True))()

    # --- Loading.

    def _each_task(self, product: Product, number: Scalar, do: Callable[[Task, Scalar], Scalar]) -> Scalar:
        step = self.plan.thread_blocks
        count = lax.div(product.tasks - product.first + (step - 1), step)
        return lax.fori_loop(0, count, lambda i, number: do(product.task(product.first + i * step), number), number)

    def _load(self, product: Product, number: Scalar, ring: Ring, copy: Callable[..., None]) -> Scalar:
        def load(task: Task, number: Scalar) -> Scalar:
            def request(chunk: Scalar, number: Scalar) -> Scalar:
                stage = ring.stage(number)
                plgpu.barrier_wait(ring.free.at[stage])
                copy(task, pl.ds(chunk * CHUNK, CHUNK), ring.memory.at[stage], ring.ready.at[stage])
                return number + 1

            return lax.fori_loop(task.first, task.last, request, number)

        return self._each_task(product, number, load)

    def _load_weights(self, block: Scalar, number: Scalar) -> Scalar:
        for product in (self.qkv, self.proj, self.fc1, self.fc2):

            def copy(task: Task, chunk: Any, memory: Ref, ready: Ref, product: Product = product) -> None:
                plgpu.copy_gmem_to_smem(product.weights.at[block, chunk, pl.ds(task.tile * TILE, TILE)], memory, ready)

            number = self._load(product, number, self.weights, copy)
        return number

    def _load_operands(self, block: Scalar, number: Scalar) -> Scalar:
        plan = self.plan
        for product in (self.qkv, self.proj, self.fc1, self.fc2):

            def copy(task: Task, chunk: Any, memory: Ref, ready: Ref, product: Product = product) -> None:
                for reader in range(plan.readers):
                    first = (task.group * plan.readers + reader) * TILE
                    # As many as there are, but by eights; what else is in memory makes rows that nobody reads.
                    rows = TILE if plan.groups > 1 else min(-(-plan.rows // 8) * 8 - reader * TILE, TILE)
                    source, target = product.operand.at[pl.ds(first, rows), chunk], memory.at[reader, pl.ds(0, rows)]
                    plgpu.copy_gmem_to_smem(source, target, ready)

            pl.when(product.first < product.tasks)(functools.partial(self._wait_to_copy, product.after, block))
            number = self._load(product, number, self.operands, copy)
        return number

    # --- Products.

    def _multiply(
        self, product: Product, number: Scalar, store: Callable[..., None], bias: Ref | None = None
    ) -> Scalar:
        rings = self.weights, self.operands

        def release(number: Scalar) -> None:
            for ring in rings:
                plgpu.barrier_arrive(ring.free.at[ring.stage(number)])

        def compute(task: Task, number: Scalar) -> Scalar:
            end, columns = number + task.last - task.first, pl.ds(task.tile * TILE, TILE)
            offset = None
            if bias is not None:
                offset = plgpu.load(bias.at[columns], layout=common.COLUMN_LAYOUT, optimized=False)

            def sum_up(total: Ref) -> jax.Array:
                def step(at: Scalar, _: None) -> None:
                    for ring in rings:
                        plgpu.barrier_wait(ring.ready.at[ring.stage(at)])
                    operand = self.operands.memory.at[self.operands.stage(at), self.me]
                    plgpu.wgmma(total, operand, self.weights.memory.at[self.weights.stage(at)])
                    plgpu.wgmma_wait(1)
                    pl.when(at > number)(lambda: release(at - 1))

                lax.fori_loop(number, end, step, None)
                value = total[...]
                release(end - 1)
                return value

            total = _in_registers(sum_up)
            total = total if offset is None else total + along_columns(offset, total.shape)
            store(task, pl.ds((task.group * self.plan.readers + self.me) * TILE, TILE), columns, total)
            return end

        number = self._each_task(product, number, compute)
        pl.when(product.first < product.tasks)(lambda: self._finish(product.phase))
        return number

    def _store_qkv(self, _: Task, rows: Any, columns: Any, total: jax.Array) -> None:
        # What comes of memory past the last row may be NaN, which attention would multiply by 0.
        row = rows.start + plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=plgpu.Layout.WGMMA)
        self.to.qkv[rows, columns] = jnp.where(row < self.plan.rows, total, 0.0).astype(jnp.bfloat16)

    def _store_partial(self, task: Task, rows: Any, columns: Any, total: jax.Array) -> None:
        self.to.partial[task.split, rows, columns] = total

    def _store_hidden(self, _: Task, rows: Any, columns: Any, z: jax.Array) -> None:
        # GELU by its tanh approximation, (1 + tanh(u))/2 as the sigmoid of 2u, of instructions that a GPU has.
        gate = jnp.square(lax.rsqrt(1 + jnp.exp(-GELU_SCALE * (z + GELU_CUBE * z * z * z))))
        self.to.hidden[rows, columns] = (z * gate).astype(jnp.bfloat16)

    # --- Norms, by one warpgroup of a thread block: sums over all its threads go through memory that they share.

    def _begin(self) -> None:
        def normalise(row: Scalar) -> None:
            sample = lax.div(row, self.plan.tokens)
            x = self._vector(self.given.at[row])
            self.to.x[row] = x
            factor, offset = (self._vector(ref.at[0, sample, 0]) for ref in (self.modulation.s1, self.modulation.b1))
            self._normalise(row, x, factor, offset)

        self._each_row(Phase.NORM1, normalise)

    def _add(self, block: Scalar, after: Phase, bias: Ref, gate: Ref, scale: Ref, shift: Ref, normed: Scalar) -> None:
        """Stores x + gate·(y + bias), and its norm, with scale and shift of the block `normed`."""

        def add(row: Scalar) -> None:
            sample = lax.div(row, self.plan.tokens)
            x, y = self._vector(self.to.x.at[row]), self._vector(bias.at[block])
            opening = self._vector(gate.at[block, sample, 0])
            factor, offset = (self._vector(ref.at[normed, sample, 0]) for ref in (scale, shift))
            pl.when(row == self.cta)(lambda: self._wait(after, block))
            for part in [self._vector(self.to.partial.at[split, row]) for split in range(self.plan.splits)]:
                y += part
            x = (x.astype(jnp.float32) + opening * y).astype(x.dtype)
            self.to.x[row] = x
            self._normalise(row, x, factor, offset)

        self._each_row(Phase.NORM2 if after == Phase.PROJ else Phase.NORM1, add)

    def _each_row(self, phase: Phase, do: Callable[[Scalar], None]) -> None:
        step = self.plan.thread_blocks

        @pl.when((self.me == 0) & (self.cta < self.plan.rows))
        def _() -> None:
            count = lax.div(self.plan.rows - self.cta + (step - 1), step)
            lax.fori_loop(0, count, lambda i, _: do(self.cta + i * step), None)
            self._finish(phase)

    def _vector(self, ref: Ref) -> jax.Array:
        """(C,), as many numbers side by side to a thread as it can load at once of 16 bits."""
        side = next(side for side in (8, 4, 2, 1) if self.plan.width % (THREADS * side) == 0)
        tiling = plgpu.Tiling(((THREADS * side,), (THREADS // 4 * side,), (side,)))
        layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        return plgpu.load(ref, layout=layout, optimized=False)

    def _normalise(self, row: Scalar, x: jax.Array, scale: jax.Array, shift: jax.Array) -> None:
        n = x.astype(jnp.float32)
        n = n - jnp.sum(n) * (1 / self.plan.width)
        n = n * lax.rsqrt(jnp.sum(n * n) * (1 / self.plan.width) + EPS)
        self.to.operand[row] = (n * (1 + scale) + shift).astype(x.dtype)

    # --- Attention.

    def _attend(self, block: Scalar) -> None:
        first, step = self.me * self.plan.thread_blocks + self.cta, self.plan.thread_blocks * self.plan.readers
        tasks = self.plan.tasks(Phase.ATTENTION)

        @pl.when(first < tasks)
        def _() -> None:
            self._wait_to_copy(Phase.QKV, block)
            count = lax.div(tasks - first + (step - 1), step)
            lax.fori_loop(0, count, lambda i, _: self._attend_to(block, first + i * step), None)
            self._finish(Phase.ATTENTION)

    def _attend_to(self, block: Scalar, task: Scalar) -> None:
        """Some samples' rows of one head: tokens of other samples are hidden."""
        tile = lax.div(task, self.plan.heads)
        head, rows = task - tile * self.plan.heads, self.plan.samples * self.plan.tokens
        flat, ready = self.flat.at[self.me], self.attention_ready.at[self.me]
        q, k, v, out = (self.tiled.at[self.me, i] for i in range(4))
        for i in range(3):
            columns = pl.ds(i * self.plan.width + head * TILE, TILE)
            plgpu.copy_gmem_to_smem(self.to.qkv.at[pl.ds(tile * rows, TILE), columns], flat.at[i], ready)
        plgpu.barrier_wait(ready)
        keys = common.load(k)
        k[...] = (keys * along_rows(common.inverse_norm(keys), keys.shape)).astype(k.dtype)
        gain = common.inverse_norm(common.load(q)) * (self.parameters.q_scale[block, head] * common.LOG2E)
        plgpu.commit_smem()
        logits = _product(q, k.transpose((1, 0)))
        row, column = (plgpu.broadcasted_iota(jnp.int32, logits.shape, i, layout=plgpu.Layout.WGMMA) for i in range(2))
        visible = lax.div(row, self.plan.tokens) == lax.div(column, self.plan.tokens)
        logits = jnp.where(visible, logits * along_rows(gain, logits.shape), -jnp.inf)
        weights = jnp.exp2(logits - along_rows(logits.max(axis=1), logits.shape))
        mean = _product(weights.astype(v.dtype), v)
        out[...] = (mean * along_rows(1 / weights.sum(axis=1), mean.shape)).astype(out.dtype)
        plgpu.commit_smem()
        target = self.to.attended.at[pl.ds(tile * rows, rows), pl.ds(head * TILE, TILE)]
        plgpu.copy_smem_to_gmem(flat.at[3, pl.ds(0, rows)], target)
        plgpu.wait_smem_to_gmem(0)


def _in_registers(sum_up: Callable[[Ref], jax.Array]) -> jax.Array:
    """What tensor cores sum up in an accumulator (TILE, TILE), 0 at first."""
    return pl.run_scoped(sum_up, plgpu.ACC((TILE, TILE), jnp.float32))


def _product(a: Any, b: Ref) -> jax.Array:
    def multiply(total: Ref) -> jax.Array:
        plgpu.wgmma(total, a, b)
        return total[...]

    return _in_registers(multiply)
