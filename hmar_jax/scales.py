"""ladder of sides → offsets, lengths, scale ids, key ranges. The one source of geometry.

Axis letters: L tokens (all scales joined, coarse to fine), K scales.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from numbers import Integral
from typing import Literal, get_args

import numpy as np

from hmar_jax.errors import NO_LISTS, InputError, check_choice, shown

Pattern = Literal["block_diagonal", "block_causal"]

# Pictures of 1024 pixels have some 10,000 tokens. What has one entry a token is made before weights are looked at.
MOST_TOKENS = 2**18

_PRESETS: dict[str, tuple[int, ...]] = {
    "64": (1, 2, 3, 4),
    "128": (1, 2, 3, 4, 5, 6, 8),
    "256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    "1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclasses.dataclass(frozen=True)
class ScaleLadder:
    """The sides of an image's token maps, coarse to fine; frozen and hashable, so static under `jit`.

    Attributes:
      sides: strictly increasing positive integers p_1 < … < p_K, of 2¹⁸ tokens at most.

    Raises:
      InputError: sides are not whole numbers, not positive or not increasing, there are none, or have too many tokens.
    """

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            if isinstance(self.sides, NO_LISTS) or any(isinstance(side, bool | np.bool_) for side in self.sides):
                raise TypeError
            sides = tuple(operator.index(side) for side in self.sides)
        except TypeError:
            raise InputError(
                f"Sides are {shown(self.sides)}; expected an increasing list of positive integers, such as 1,2,3,4."
            ) from None
        object.__setattr__(self, "sides", sides)
        if not sides or sides[0] < 1 or any(a >= b for a, b in itertools.pairwise(sides)):
            raise InputError(f"Sides {shown(sides)} are not an increasing list of positive integers, such as 1,2,3,4.")
        if self.length > MOST_TOKENS:
            raise InputError(f"Sides {shown(sides)} have {shown(self.length)} tokens; expected {MOST_TOKENS} at most.")

    @classmethod
    def preset(cls, resolution: str | int) -> ScaleLadder:
        """The published ladder for pictures of `resolution` pixels at 16 pixels a token (64 and 128 are ours)."""
        try:
            return cls(_PRESETS[str(resolution) if isinstance(resolution, str | Integral) else ""])
        except (KeyError, ValueError):  # the latter of an int of thousands of digits
            raise InputError(f"No ladder is named {shown(resolution)}; choose one of {', '.join(_PRESETS)}.") from None

    @classmethod
    def parse(cls, text: str) -> ScaleLadder:
        """The ladder of `1,2,3,4`, or the published one of `256` pixels (`preset`)."""
        if text in _PRESETS:
            return cls.preset(text)
        try:
            sides = tuple(int(side) for side in text.split(","))
        except ValueError:
            raise InputError(
                f"Sides {shown(text)} are not a list of whole numbers, such as 1,2,3,4, and no published ladder is "
                f"named so; those are {', '.join(_PRESETS)}."
            ) from None
        return cls(sides)

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale, p_k²."""
        return tuple(side * side for side in self.sides)

    @property
    def length(self) -> int:
        """L, tokens of all scales."""
        return sum(self.lengths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First token of each scale, and L at the end: K+1 numbers."""
        return tuple(np.cumsum((0, *self.lengths)).tolist())

    @property
    def slices(self) -> tuple[slice, ...]:
        """Each scale's tokens among all L."""
        return tuple(slice(a, b) for a, b in itertools.pairwise(self.offsets))

    @functools.cached_property
    def scale_ids(self) -> np.ndarray:
        """(L,) int32: the scale, from 0, that each token belongs to."""
        return np.repeat(np.arange(self.num_scales, dtype=np.int32), self.lengths)

    def key_ranges(self, pattern: Pattern) -> np.ndarray:
        """(L,2) int32: query i attends to keys in [start, end).

        `block_diagonal` lets a token see its own scale only, `block_causal` its own scale and all coarser ones.
        """
        offsets = np.asarray(self.offsets, np.int32)
        end = offsets[self.scale_ids + 1]
        check_choice("The attention pattern", pattern, get_args(Pattern))
        start = offsets[self.scale_ids] if pattern == "block_diagonal" else np.zeros_like(end)
        return np.stack([start, end], axis=1)

    def until(self, scale: int) -> ScaleLadder:
        """The ladder up to and with one scale (from 0): what a pass that sees the coarser scales attends over."""
        return ScaleLadder(self.sides[: scale + 1])

    def only(self, scale: int) -> ScaleLadder:
        """The ladder of one scale (from 0) by itself: what a sampling pass attends over."""
        return ScaleLadder((self.sides[scale],))
