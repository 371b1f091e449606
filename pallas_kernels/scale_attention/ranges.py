"""Key ranges: what the kernels may take for granted of them, the queries that share one, and those that see a key."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """Queries [first, last) that all see the keys [start, end): those of a scale."""

    first: int
    last: int
    start: int
    end: int


def runs(ranges: np.ndarray) -> Iterator[Run]:
    """Neighbouring queries that share their range, from (L,2) int."""
    first = 0
    for (start, end), same in itertools.groupby(map(tuple, ranges.tolist())):
        last = first + sum(1 for _ in same)
        yield Run(first, last, start, end)
        first = last


def transpose_ranges(ranges: np.ndarray) -> np.ndarray:
    """(L,2): the queries [start, end) that see each key."""
    keys = np.arange(len(ranges))
    seen = np.searchsorted(ranges[:, 1], keys, side="right"), np.searchsorted(ranges[:, 0], keys, side="right")
    return np.stack(seen, axis=1).astype(np.int32)


def check_ranges(ranges: np.ndarray) -> None:
    """Raises ValueError unless ranges are (L,2), not empty, nondecreasing, cover all keys and leave no gap."""
    if ranges.ndim != 2 or ranges.shape[1] != 2 or not len(ranges):
        raise ValueError(f"key_ranges have shape {ranges.shape}; expected (L, 2).")
    start, end = ranges[:, 0], ranges[:, 1]
    whole = (start < end).all() and start[0] == 0 and end[-1] == len(ranges) and (start[1:] <= end[:-1]).all()
    if not whole or (np.diff(ranges, axis=0) < 0).any():
        raise ValueError("key_ranges are to cover all keys, never be empty, never decrease and leave no gap.")
