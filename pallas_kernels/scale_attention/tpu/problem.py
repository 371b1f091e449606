"""The static (hashable) arguments of a call of the TPU kernels, and the sizes that follow.

Axis letters: L tokens, H heads, D head size, G groups of heads of a step, W lanes of a group, P heads of a group.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from pallas_kernels.scale_attention.tpu import tiles
from pallas_kernels.scale_attention.tpu.tiles import TpuBlocks


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is attended to and how it is cut.

    Attributes:
      ranges: the bytes of key_ranges, (L,2) int32.
      heads, size: H, filled up to whole groups, and D.
      dtype: of q, k, v and the operands of products.
      normalize: whether q and k are L2-normalised.
      blocks: sizes of the tiles.
      interpret: for `pl.pallas_call`.
    """

    ranges: bytes
    heads: int
    size: int
    dtype: np.dtype
    normalize: bool
    blocks: TpuBlocks
    interpret: Any

    @functools.cached_property
    def key_ranges(self) -> np.ndarray:
        return np.frombuffer(self.ranges, np.int32).reshape(-1, 2)

    @property
    def length(self) -> int:
        """L."""
        return len(self.key_ranges)

    @property
    def padded(self) -> int:
        """L up to whole tiles of queries."""
        return -(-self.length // self.blocks.queries) * self.blocks.queries

    @property
    def width(self) -> int:
        """W."""
        return max(self.size, 128)

    @property
    def per_group(self) -> int:
        """P."""
        return self.width // self.size

    @property
    def all_groups(self) -> int:
        return self.heads // self.per_group

    @property
    def groups(self) -> int:
        """G: as the blocks say, or the next smaller number that divides all groups."""
        return max(n for n in range(1, min(self.blocks.groups, self.all_groups) + 1) if self.all_groups % n == 0)

    def tile_list(self, order: tiles.Order) -> np.ndarray:
        return tiles.tile_list(self.key_ranges, self.blocks.queries, self.blocks.keys, order)
