"""Key ranges → the pairs of tiles that the TPU kernels visit, and how large tiles are: pure numpy.

A *tile pair* is some consecutive queries and some consecutive keys, both on grids that start at 0.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

# Rows of the list, and bits of its row of flags.
QUERY, KEY, FLAGS = 0, 1, 2
MASKED = 1  # some query of the pair must not see some key of it
FIRST_OF_QUERIES, LAST_OF_QUERIES = 2, 4  # no pair before, or after, has these queries
FIRST_OF_KEYS, LAST_OF_KEYS = 8, 16


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


def default_blocks(length: int) -> TpuBlocks:
    """What a ladder of L tokens takes on v5e, v5p and v6e: chosen by counting, not by a clock.

    Of all sizes whose backward kernel stays below 24 MiB in bfloat16 (v5p has 64 MiB of VMEM, the others 128), these
    have about the least tiles · (queries · keys + 64 (queries + keys) + 46000 / groups), over both patterns. The terms
    are the pairs computed, preparing a tile's operands, and the 0.35 µs that a step costs anyhow, as pairs that a v5e
    computes in that time, the mean of forward and backward. Area visited over pairs visible:

    | ladder  | block_diagonal | block_causal | VMEM forward, backward (D = 64, bfloat16) |
    | 256 px  | 3.34           | 1.61         | 5.0, 9.4 MiB                              |
    | 512 px  | 1.70           | 1.16         | 5.6, 17.1 MiB                             |
    | 1024 px | 1.39           | 1.12         | 5.6, 18.6 MiB                             |

    Smaller tiles waste less area, and more time on steps. 240, 320 and 592 end close to where a scale does.
    """
    if length <= 1024:
        queries, keys, groups = 384, 240, 4
    elif length <= 4096:
        queries, keys, groups = 384, 320, 4
    else:
        queries, keys, groups = 640, 592, 1
    return TpuBlocks(min(queries, -(-length // 128) * 128), min(keys, -(-length // 16) * 16), groups)


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
