"""Key ranges → which tiles to visit: pure numpy, known at trace time.

A *band* is a block of consecutive rows, worked on by one warpgroup. It visits the tiles, each some columns wide, of a
grid that starts at the *origin* of its region. Rows are queries and columns keys, or the other way round in the kernel
for dk and dv. Bands that share their columns form an *item*, the work of one thread block at a time.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

# What the table says of a band. Tiles are counted from the region's origin; intervals are half-open.
ROW = 0  # first row
ORIGIN = 1  # column where the region's grid starts
GRID = 2  # index of the grid's first tile in `Plan.columns`
FIRST, LAST = 3, 4  # tiles that hold a visible pair; none, of a warpgroup without work
FULL_FIRST, FULL_LAST = 5, 6  # those of them without a hidden pair, which need no mask
LOAD_FIRST, LOAD_LAST = 7, 8  # tiles that some band of the item visits
FIELDS = 12  # padded to whole 16-byte loads


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every tile that a kernel visits for one head.

    Attributes:
      table: (items, bands per item, FIELDS) int32.
      regions: (first item, number of items) of each region, the heaviest items first.
      columns: (tiles, columns per tile) int32, the columns of each tile of each grid, clipped to the last one.
    """

    table: np.ndarray
    regions: tuple[tuple[int, int], ...]
    columns: np.ndarray


def plan_tiles(ranges: np.ndarray, rows: int, columns: int, bands: int) -> Plan:
    """Covers all rows with bands and each band's range with tiles.

    The last band of a region is moved back to end with it, so bands may overlap. The rows that two bands share come out
    bit-equal from both, because tiles of a region lie on one grid and a tile that is wholly masked for a row leaves
    that row as it was: both may store them.

    Args:
      ranges: (L,2) int32, the columns [start, end) that each row sees; see `check_ranges`.
      rows, columns: of a tile.
      bands: how many form an item at most.
    """
    items: list[np.ndarray] = []
    grids: list[np.ndarray] = []
    regions = []
    for start, stop in _regions(ranges, rows):
        origin = int(ranges[start, 0])
        firsts = [max(min(row, stop - rows), 0) for row in range(start, stop, rows)]
        table = np.stack([_band(ranges, row, rows, columns, origin) for row in firsts])
        table[:, GRID] = sum(map(len, grids))
        tiles = np.arange(table[:, LAST].max())
        grids.append(np.minimum(origin + tiles[:, None] * columns + np.arange(columns), len(ranges) - 1))
        count = -(-len(table) // bands)
        regions.append(((table[:, LAST] - table[:, FIRST]).max(), len(items), count))
        items += [_item(chunk, bands) for chunk in np.array_split(table, count)]
    regions.sort(key=lambda region: -region[0])
    return Plan(
        np.stack(items).astype(np.int32),
        tuple((first, count) for _, first, count in regions),
        np.concatenate(grids).astype(np.int32),
    )


def _band(ranges: np.ndarray, row: int, rows: int, columns: int, origin: int) -> np.ndarray:
    """The table's entry for the rows from `row` on, without what its item adds."""
    (start, end), (last_start, last_end) = ranges[row] - origin, ranges[row : row + rows][-1] - origin
    band = np.zeros(FIELDS, np.int64)
    band[[ROW, ORIGIN]] = row, origin
    band[[FIRST, LAST]] = start // columns, -(-last_end // columns)
    full = -(-last_start // columns), end // columns
    band[[FULL_FIRST, FULL_LAST]] = full if full[0] < full[1] else (band[FIRST], band[FIRST])
    return band


def _item(table: np.ndarray, bands: int) -> np.ndarray:
    """(bands, FIELDS): the bands given, what they load together, and idle ones up to the full number."""
    table[:, LOAD_FIRST], table[:, LOAD_LAST] = table[:, FIRST].min(), table[:, LAST].max()
    idle = table[:1].copy()
    idle[:, [FIRST, LAST, FULL_FIRST, FULL_LAST]] = idle[:, [LOAD_FIRST]]
    return np.concatenate([table, *[idle] * (bands - len(table))])


def _regions(ranges: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Rows [start, stop) that share a grid: a long scale alone, short neighbours together, none shorter than a band."""
    changes = np.flatnonzero((np.diff(ranges, axis=0) != 0).any(axis=1)) + 1
    regions: list[tuple[int, int, bool]] = []
    for start, stop in itertools.pairwise([0, *changes.tolist(), len(ranges)]):
        short = stop - start < rows
        if regions and (regions[-1][1] - regions[-1][0] < rows or (short and regions[-1][2])):
            regions[-1] = (regions[-1][0], stop, True)
        else:
            regions.append((start, stop, short))
    if len(regions) > 1 and regions[-1][1] - regions[-1][0] < rows:
        regions[-2:] = [(regions[-2][0], regions[-1][1], True)]
    return [(start, stop) for start, stop, _ in regions]
