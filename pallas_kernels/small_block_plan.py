"""Who does what in `small_block`: phases, and the tasks that thread blocks share out among themselves in each.

A task of a product is a tile of 64 columns, whose weights all rows share. Where such tiles are too few to go round,
thread blocks take different rows of them (QKV, FC1), and different parts of the sum (PROJ, FC2).

Axis letters: B batch, R rows (tokens of all samples), C width, F features.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

TILE = 64  # rows and columns of a tile; the size of a head
CHUNK = 128  # of what a product sums over, loaded at a time
SLOTS = 13  # tiles (CHUNK, TILE) that fit into shared memory
THREADS, REGISTERS, LOADER_REGISTERS = 128, 64 * 1024, 56  # of a warpgroup; of a multiprocessor; of a thread that loads
MOST_READERS = 2

Ref = Any  # a Pallas reference
Scalar = Any  # an int32 of the kernel


class Phase(enum.IntEnum):
    """Parts of a block that wait for one another."""

    NORM1 = 0
    QKV = 1
    ATTENTION = 2
    PROJ = 3
    NORM2 = 4
    FC1 = 5
    FC2 = 6


class Buffers(NamedTuple):
    """What phases hand on in global memory. First the result, (R,C); the others have whole tiles of rows."""

    x: Any  # (R,C)
    operand: Any  # (R,C)
    qkv: Any  # (R,3C)
    attended: Any  # (R,C)
    hidden: Any  # (R,F)
    partial: Any  # (splits,R,C) float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes, and what follows from them."""

    batch: int
    tokens: int
    width: int
    features: int
    depth: int
    thread_blocks: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def heads(self) -> int:
        return self.width // TILE

    @property
    def groups(self) -> int:
        """Of row tiles, each for other thread blocks: more than one if FC1 has few column tiles."""
        return min(-(-self.rows // TILE), max(self.thread_blocks * TILE // self.features, 1))

    @property
    def readers(self) -> int:
        """Warpgroups that compute, of a thread block: a row tile of its group each, with the same weights."""
        return -(-self.rows // (TILE * self.groups))

    @property
    def is_worth_it(self) -> bool:
        """Whether this is fast: with more readers a thread block waits for its tensor cores and operands."""
        return self.readers <= MOST_READERS and self.heads <= self.thread_blocks

    @property
    def splits(self) -> int:
        """Parts of the sums of PROJ and FC2."""
        return min(max(self.thread_blocks // (self.heads * self.groups), 1), self.width // CHUNK)

    @property
    def samples(self) -> int:
        """That fit into a tile of attention."""
        return min(TILE // self.tokens, self.batch)

    @property
    def stages(self) -> int:
        """Of operands; weights have what they leave."""
        return 5 - self.readers

    @property
    def registers(self) -> int:
        """Of each thread that computes: what those that load leave of equal shares."""
        warpgroups = self.readers + 2
        pool = REGISTERS // THREADS // warpgroups // 8 * 8 * warpgroups
        return min((pool - 2 * LOADER_REGISTERS) // self.readers // 8 * 8, 240)

    def tasks(self, phase: Phase) -> int:
        """What the thread blocks share out among themselves."""
        match phase:
            case Phase.NORM1 | Phase.NORM2:
                return self.rows
            case Phase.ATTENTION:
                return -(-self.batch // self.samples) * self.heads
            case Phase.QKV:
                return 3 * self.heads * self.groups
            case Phase.FC1:
                return self.features // TILE * self.groups
        return self.heads * self.groups * self.splits

    def finishers(self, phase: Phase) -> int:
        """Warpgroups that have a share in a phase."""
        match phase:
            case Phase.NORM1 | Phase.NORM2:
                return min(self.tasks(phase), self.thread_blocks)
            case Phase.ATTENTION:
                return min(self.tasks(phase), self.thread_blocks * self.readers)
        return min(self.tasks(phase), self.thread_blocks) * self.readers

    def buffers(self) -> Buffers:
        rows = self.groups * self.readers * TILE

        def like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        return Buffers(
            x=like(self.rows, self.width),
            operand=like(rows, self.width),
            qkv=like(rows, 3 * self.width),
            attended=like(rows, self.width),
            hidden=like(rows, self.features),
            partial=like(self.splits, rows, self.width, dtype=jnp.float32),
        )

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers: a ring of weights, one of operands, and where that is, four tiles to attend."""
        flat = (plgpu.SwizzleTransform(2 * TILE),)  # type: ignore[abstract]
        tiled = (plgpu.TilingTransform((8, TILE)), *flat)  # type: ignore[abstract]
        memory = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16)
        barrier, readers = plgpu.Barrier, self.readers
        weights, attention = SLOTS - self.stages * readers, (readers, 4, TILE, TILE)
        return {
            "weights_memory": memory((weights, CHUNK, TILE), transforms=tiled),
            "weights_ready": barrier(num_barriers=weights),
            "weights_free": barrier(num_barriers=weights, num_arrivals=readers),
            "shared": plgpu.RefUnion(
                memory((self.stages, readers, TILE, CHUNK), transforms=tiled),
                memory(attention, transforms=flat),
                memory(attention, transforms=tiled),
            ),
            "operands_ready": barrier(num_barriers=self.stages, num_arrivals=readers),
            "operands_free": barrier(num_barriers=self.stages, num_arrivals=readers),
            "attention_ready": barrier(num_barriers=readers, num_arrivals=3),
        }


class Ring(NamedTuple):
    """Stages of shared memory, and barriers of each: that it can be read, that it was."""

    memory: Ref
    ready: Ref
    free: Ref

    def stage(self, number: Scalar) -> Scalar:
        return lax.rem(number, self.memory.shape[0])


class Task(NamedTuple):
    """A tile of a product, or a part of its sum."""

    group: Scalar
    tile: Scalar  # of columns
    split: Scalar
    first: Scalar  # chunk
    last: Scalar  # and the one after the last


@dataclasses.dataclass(frozen=True)
class Product:
    """operand (R,K) @ weights (depth,K,columns).

    Attributes:
      phase, after: what it is, and what the operand waits for.
      first, tasks: that this thread block begins with, and all there are.
    """

    phase: Phase
    after: Phase
    operand: Ref
    weights: Ref
    first: Scalar
    tasks: int
    splits: int = 1

    def task(self, number: Scalar) -> Task:
        tiles, chunks = self.weights.shape[2] // TILE, self.weights.shape[1] // CHUNK
        rest = lax.div(number, self.splits)
        group, split = lax.div(rest, tiles), number - rest * self.splits
        bounds = (lax.div((split + i) * chunks, self.splits) for i in range(2))
        return Task(group, rest - group * tiles, split, *bounds)
