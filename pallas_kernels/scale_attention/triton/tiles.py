"""Key ranges → the tiles that the Triton kernels visit, and how large they are: what is known when tracing.

Axis letters: L tokens, D head size.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices

# What the table says of a tile of rows: the first and the one behind the last; the columns from the first that some row
# sees to the one behind the last; those of them, whole tiles, that all rows see.
ROW, STOP, FIRST, LAST, FULL_FIRST, FULL_LAST = range(6)


def plan_tiles(ranges: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Covers each row once; a long scale has tiles of its own, short neighbours share theirs.

    Args:
      ranges: (L,2) int32, the columns [start, end) that each row sees; see `check_ranges`.
      rows, columns: of a tile.

    Returns:
      (tiles, 6) int32, those with most columns first, so that none is left when all others are done.
    """
    table = []
    for start, stop in _regions(ranges, rows):
        for row in range(start, stop, rows):
            mine = ranges[row : min(row + rows, stop)]
            (first, least), (most, last) = mine[0], mine[-1]
            full_first = first + -(-(most - first) // columns) * columns
            full_last = full_first + max(least - full_first, 0) // columns * columns
            table.append((row, row + len(mine), first, last, full_first, full_last))
    table.sort(key=lambda entry: entry[FIRST] - entry[LAST])
    return np.array(table, np.int32)


def _regions(ranges: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Rows [start, stop): a scale with at least a tile of rows alone, shorter neighbours together."""
    changes = np.flatnonzero((np.diff(ranges, axis=0) != 0).any(axis=1)) + 1
    edges = [0, *changes.tolist(), len(ranges)]
    regions: list[tuple[int, int]] = []
    for short, scales in itertools.groupby(itertools.pairwise(edges), key=lambda scale: scale[1] - scale[0] < rows):
        together = list(scales)
        regions += [(together[0][0], together[-1][1])] if short else together
    return regions


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    Attributes:
      length, heads, size: L, H and D.
      packed: whether q, k and v are one (B,L,3,H,D).
      norm: whether q and k are normalised.
      rows, columns: of a tile.
    """

    length: int
    heads: int
    size: int
    packed: bool
    norm: bool
    rows: int
    columns: int

    @property
    def width(self) -> int:
        """D up to a power of 2, as Triton wants."""
        return 1 << (self.size - 1).bit_length()

    @property
    def row(self) -> int:
        """Numbers between tokens of (B,L,H,D)."""
        return self.heads * self.size

    @property
    def stride(self) -> int:
        """Numbers between tokens of q, k and v."""
        return self.row * 3 if self.packed else self.row

    @property
    def part(self) -> int:
        """Numbers between q and k, and k and v, of a token."""
        return self.row if self.packed else 0

    @property
    def vectors(self) -> int:
        """Numbers that the kernel for dq leaves for each query."""
        return 3 if self.norm else 1


# --- How large tiles are.

# What a thread block may use of shared memory, by compute capability: A100, Orin, Hopper, Blackwell of data centers.
SHARED_BYTES = {"8.0": 163 * 1024, "8.7": 163 * 1024, "9.0": 227 * 1024, "10.0": 227 * 1024, "10.3": 227 * 1024}
LEAST_SHARED_BYTES = 99 * 1024  # of all others since 8.0, L4 among them


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a kernel keeps in shared memory.

    Attributes:
      rows: operands (rows, D) of a tile.
      columns: operands (columns, D), one for each stage.
      vectors: float32 numbers for each column and stage.
    """

    rows: int
    columns: int
    vectors: int


# Of rows the operands of the first products; without QK-norm some vectors are not there.
NEEDS = {
    "forward": Needs(rows=1, columns=2, vectors=1),
    "grad_queries": Needs(rows=2, columns=2, vectors=1),
    "grad_keys": Needs(rows=2, columns=2, vectors=3),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel is cut.

    Attributes:
      rows, columns: of a tile, powers of 2 from 16 on, as `tl.dot` wants.
      warps: that work on a tile.
      stages: column tiles in flight.

    Raises:
      ValueError: a number is not supported.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if any(size not in (16, 32, 64, 128, 256) for size in (self.rows, self.columns)):
            raise ValueError(f"Tiles of {self.rows} x {self.columns} are not powers of 2 from 16 to 256.")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self.warps} warps are not a power of 2 up to 16.")
        if not 1 <= self.stages <= 8:
            raise ValueError(f"{self.stages} stages are not between 1 and 8.")

    def shared_terms(self, needs: Needs, head_size: int, itemsize: int) -> dict[str, int]:
        """Bytes of shared memory, term by term: at most what Triton takes, which reuses some of it."""
        width = 1 << (head_size - 1).bit_length()
        row_tile, column_tile = self.rows * width * itemsize, self.columns * width * itemsize
        halves = 2 if itemsize == 4 and self.rows >= 64 else 1  # of float32, of which Hopper's products take two
        return {
            "operands of rows": halves * needs.rows * row_tile,
            "operands of columns, all stages": self.stages * needs.columns * column_tile,
            "numbers of columns, all stages": self.stages * needs.vectors * self.columns * 4,
            "scratch of reductions": 1024,
        }

    def check(self, needs: Needs, head_size: int, itemsize: int, limit: int) -> None:
        """Raises ValueError if a kernel of such needs takes more shared memory than `limit`."""
        terms = self.shared_terms(needs, head_size, itemsize)
        used = sum(terms.values())
        if used > limit:
            raise ValueError(f"{self} needs {used} bytes of shared memory, {terms}; there are {limit}.")


@dataclasses.dataclass(frozen=True)
class TritonBlocks:
    """`Blocks` of each of the three kernels; their times add up, so that each can be chosen alone."""

    forward: Blocks
    grad_queries: Blocks
    grad_keys: Blocks

    def check(self, head_size: int, itemsize: int, limit: int) -> None:
        """Raises ValueError if a kernel takes more shared memory than `limit`."""
        for name, needs in NEEDS.items():
            getattr(self, name).check(needs, head_size, itemsize, limit)


# By bytes of a number and D up to a power of 2: the fastest measured on an H200 (bfloat16; float32 with D of 128 is not
# timed) of those that fit everywhere. For A100 and L4 they are compiled, not timed.
TUNED = {
    (2, 64): TritonBlocks(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    (2, 128): TritonBlocks(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (4, 64): TritonBlocks(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (4, 128): TritonBlocks(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
}


def tuned_blocks(head_size: int, dtype: Any) -> TritonBlocks:
    """The fastest known for heads of D up to 128."""
    return TUNED[_place(head_size, dtype)]


def table_entry(key_ranges: np.ndarray, head_size: int, dtype: Any, norm: bool) -> str:
    """Where in this module blocks belong that are measured here; arguments as of `candidates`."""
    del key_ranges, norm
    return "TUNED[{}, {}]".format(*_place(head_size, dtype))


def _place(head_size: int, dtype: Any) -> tuple[int, int]:
    return jnp.dtype(dtype).itemsize, 64 if head_size <= 64 else 128


def shared_bytes() -> int:
    """What a thread block may use of shared memory on the GPU that is compiled for."""
    return SHARED_BYTES.get(devices.compute_capability(), LEAST_SHARED_BYTES)


def candidates(key_ranges: np.ndarray, head_size: int, dtype: Any, norm: bool) -> list[TritonBlocks]:
    """What is worth timing here: what is in use, then others that differ from it in the blocks of one kernel.

    They fit into shared memory, and have four warps: eight were slower on an H200 wherever both were timed.

    Args:
      key_ranges: (L,2), what each query sees; tiles much longer than L are left out.
      head_size: D.
      dtype: of q, k and v.
      norm: whether q and k are normalised, which makes no difference to what is worth it.
    """
    del norm
    itemsize = jnp.dtype(dtype).itemsize
    used = tuned_blocks(head_size, dtype)
    found = [used]
    for name, needs in NEEDS.items():
        for rows, columns, stages in itertools.product((32, 64, 128), (32, 64), (2, 3)):
            blocks = Blocks(rows, columns, 4, stages)
            fits = sum(blocks.shared_terms(needs, head_size, itemsize).values()) <= shared_bytes()
            if fits and rows <= 2 * len(key_ranges):
                found.append(dataclasses.replace(used, **{name: blocks}))
    return list(dict.fromkeys(found))
