"""Key ranges → the pairs of tiles that the TPU kernels visit, and how large tiles are: pure numpy.

A *tile pair* is some consecutive queries and some consecutive keys, both on grids that start at 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices

# Rows of the list, and bits of its row of flags.
QUERY, KEY, FLAGS = 0, 1, 2
MASKED = 1  # some query of the pair must not see some key of it
FIRST_OF_QUERIES, LAST_OF_QUERIES = 2, 4  # no pair before, or after, has these queries
FIRST_OF_KEYS, LAST_OF_KEYS = 8, 16

VMEM_BYTES = (
    24 * 2**20
)  # that a backward kernel is to stay below; v5p has 64 MiB, the others 128, and XLA uses the rest
MOST_TOKENS = sys.maxsize

Order = Literal["queries", "keys"]


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """Sizes of the tiles, and so of what lies in VMEM.

    Attributes:
      queries: of a tile; they lie along lanes, so a multiple of 128.
      keys: of a tile; a multiple of 16, the rows of a packed bfloat16 register.
      groups: groups of 128 lanes (two heads of 64) that a step of the grid works on; fewer if this doesn't divide them
        all. A step costs about 0.35 µs beside its work, so small tiles want several.

    Raises:
      ValueError: a size is not such a multiple, or not positive.
    """

    queries: int = 256
    keys: int = 256
    groups: int = 1

    def __post_init__(self) -> None:
        for name, unit in (("queries", 128), ("keys", 16), ("groups", 1)):
            size = getattr(self, name)
            if size < 1 or size % unit:
                raise ValueError(f"TpuBlocks: {name} is {size}; it must be a positive multiple of {unit}.")

    def vmem_terms(self, length: int, head_size: int, itemsize: int, *, backward: bool) -> dict[str, int]:
        """Bytes of VMEM, term by term; what changes from step to step is held twice, so that it loads meanwhile.

        Args:
          length: L.
          head_size: D.
          itemsize: bytes of one number of q, k and v.
          backward: of the backward kernel, not the forward one.
        """
        width = max(head_size, 128)
        heads_per_group = width // head_size
        lanes, heads = self.groups * width, self.groups * heads_per_group
        padded = -(-length // self.queries) * self.queries
        statistics = self.groups * 8 * self.queries * 4  # (heads of a group, queries), filled up to 8 rows
        # Of one head; exact products of float32 split their operands, which takes as much again.
        pair = self.keys * self.queries * 4 * (2 if itemsize == 4 else 1)
        if not backward:
            return {
                "q and out, twice": 2 * 2 * self.queries * lanes * itemsize,
                "k and v, twice": 2 * 2 * self.keys * lanes * itemsize,
                "key ranges and logsumexp, twice": 2 * (8 * self.queries * 4 + statistics),
                "q scaled, one head at a time": heads * self.queries * width * itemsize,
                "out before division": self.queries * lanes * 4,
                "maxima and sums": 2 * statistics,
                "logits and weights of a head": 5 * pair // 2,
            }
        return {
            "q and dout, twice": 2 * 2 * self.queries * lanes * itemsize,
            "k, v, dk and dv, twice": 2 * 4 * self.keys * lanes * itemsize,
            "dq of all queries, twice": 2 * length * lanes * itemsize,
            "key ranges, logsumexp and delta, twice": 2 * (8 * self.queries * 4 + 2 * statistics),
            "k scaled, and v": 2 * self.keys * lanes * itemsize,
            "dq of all queries, growing": padded * lanes * 4,
            "dk and dv, growing": 2 * self.keys * lanes * 4,
            "logits, weights and their cotangents of a head": 9 * pair // 2,
        }


# The largest L, and the blocks up to there, by kind of device. Those of `DEFAULT_KIND`, for kinds that nobody has
# measured, are chosen by counting, not by a clock: of all sizes that fit into `VMEM_BYTES` they have about the least
# `weight`, over both patterns. Area visited over pairs visible:
#
# | ladder  | block_diagonal | block_causal | VMEM forward, backward (D = 64, bfloat16) |
# | 256 px  | 3.34           | 1.61         | 5.0, 9.4 MiB                              |
# | 512 px  | 1.70           | 1.16         | 5.6, 17.1 MiB                             |
# | 1024 px | 1.39           | 1.12         | 5.6, 18.6 MiB                             |
#
# Smaller tiles waste less area, and more time on steps. 240, 320 and 592 end close to where a scale does.
DEFAULT_KIND = "any"
TUNED = {
    DEFAULT_KIND: {
        1024: TpuBlocks(queries=384, keys=240, groups=4),
        4096: TpuBlocks(queries=384, keys=320, groups=4),
        MOST_TOKENS: TpuBlocks(queries=640, keys=592, groups=1),
    },
}


def tuned_blocks(length: int) -> TpuBlocks:
    """The best known for L tokens on the device that is compiled for, no larger than they need."""
    kind, most = _place(length)
    return _shrink(TUNED.get(kind, TUNED[DEFAULT_KIND])[most], length)


def table_entry(key_ranges: np.ndarray, head_size: int, dtype: Any, norm: bool) -> str:
    """Where in this module blocks belong that are measured here; arguments as of `candidates`."""
    del head_size, dtype, norm
    return "TUNED[{!r}][{}]".format(*_place(len(key_ranges)))


def _place(length: int) -> tuple[str, int]:
    """The kind of device that is compiled for, and the lengths up to which its blocks serve."""
    _, kind = devices.device()
    table = TUNED.get(kind, TUNED[DEFAULT_KIND])
    return kind, next(most for most in table if length <= most)


def _shrink(blocks: TpuBlocks, length: int) -> TpuBlocks:
    """Without tiles longer than what L fills."""
    queries, keys = min(blocks.queries, -(-length // 128) * 128), min(blocks.keys, -(-length // 16) * 16)
    return TpuBlocks(queries, keys, blocks.groups)


def candidates(key_ranges: np.ndarray, head_size: int, dtype: Any, norm: bool) -> list[TpuBlocks]:
    """What is worth timing: what is in use, then for each number of queries and groups the keys of least `weight`.

    They fit into `VMEM_BYTES`; those of much more weight than the best are left out.

    Args:
      key_ranges: (L,2), what each query sees.
      head_size: D.
      dtype: of q, k and v.
      norm: whether q and k are normalised, which makes no difference to what is worth it.
    """
    del norm
    length, itemsize = len(key_ranges), jnp.dtype(dtype).itemsize
    found = []
    for queries, groups in itertools.product(range(128, 1025, 128), (1, 2, 4)):
        blocks = [TpuBlocks(queries, keys, groups) for keys in range(128, 1025, 16)]
        fit = [b for b in blocks if sum(b.vmem_terms(length, head_size, itemsize, backward=True).values()) < VMEM_BYTES]
        if fit:
            found.append(_shrink(min(fit, key=lambda b: weight(key_ranges, b)), length))
    least = min((weight(key_ranges, b) for b in found), default=0)
    return list(dict.fromkeys([tuned_blocks(length), *(b for b in found if weight(key_ranges, b) <= 1.25 * least)]))


def weight(key_ranges: np.ndarray, blocks: TpuBlocks) -> float:
    """About the time that a head takes, as pairs that a v5e computes in it, the mean of forward and backward.

    Tile pairs · (queries · keys + 64 (queries + keys) + 46000 / groups): the pairs computed, preparing a tile's
    operands, and the 0.35 µs that a step costs anyhow.
    """
    queries, keys, groups = blocks.queries, blocks.keys, blocks.groups
    tiles = pad_ranges(key_ranges, queries).reshape(-1, queries, 2)
    visited = np.sum(-(-tiles[:, -1, 1] // keys) - tiles[:, 0, 0] // keys)
    return float(visited * (queries * keys + 64 * (queries + keys) + 46000 / groups))


def pad_ranges(ranges: np.ndarray, queries: int) -> np.ndarray:
    """(L,2) → (L',2), whole tiles of queries: those beyond L get the range of the last, so that none sees no key."""
    return np.pad(ranges, ((0, -len(ranges) % queries), (0, 0)), mode="edge")


def tile_list(ranges: np.ndarray, queries: int, keys: int, order: Order) -> np.ndarray:
    """The tile pairs that hold a visible pair, each once.

    Args:
      ranges: (L,2) int32, see `check_ranges`.
      queries, keys: of a tile.
      order: what changes slowest.

    Returns:
      (3,T) int32: index of the query tile, of the key tile, flags.
    """
    start, end = pad_ranges(ranges, queries).reshape(-1, queries, 2, 1).transpose(2, 0, 1, 3)
    first = np.arange(0, len(ranges), keys)
    seen = ((start < first + keys) & (end > first)).any(axis=1)
    whole = ((start <= first) & (end >= first + keys)).all(axis=1)
    if order == "queries":
        query, key = np.nonzero(seen)
    else:
        key, query = np.nonzero(seen.T)
    flags = np.where(whole[query, key], 0, MASKED)
    for index, first_flag, last_flag in (
        (query, FIRST_OF_QUERIES, LAST_OF_QUERIES),
        (key, FIRST_OF_KEYS, LAST_OF_KEYS),
    ):
        flags[np.unique(index, return_index=True)[1]] |= first_flag
        flags[len(index) - 1 - np.unique(index[::-1], return_index=True)[1]] |= last_flag
    return np.stack([query, key, flags]).astype(np.int32)
