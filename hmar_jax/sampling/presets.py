"""Names → the counts and guidance that they stand for: the published schedules, and their like for other ladders."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from hmar_jax.config import TransformerConfig
from hmar_jax.errors import InputError, shown
from hmar_jax.scales import ScaleLadder

logger = logging.getLogger(__name__)

Counts = tuple[tuple[int, ...], ...]
Order = Literal["confidence", "random", "halton"]
ORDERS: tuple[Order, ...] = get_args(Order)

# The published sampling settings by depth, (cfg, top-k); top-p is 0.99 for all. VAR's are the same for all depths.
_GUIDANCE = {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}
_VAR = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
_COUNTS: dict[str, Counts] = {
    "official-256": ((1,), (1, 3), (1, 1, 2, 5), (16,), (25,), (36,), (64,), (100,), (169,), (256,)),
    "official-512": ((1,), (1, 3), (1, 1, 2, 5), (5, 11), (36,), (81,), (169,), (324,), (576,), (1024,)),
    "official-1024": (
        (1,), (1, 3), (1, 1, 2, 5), (3, 5, 8), (25,), (49,), (81,), (144,), (256,), (441,), (729,), (1296,), (2304,),
        (4096,),
    ),
}  # fmt: skip
# Masked steps on the small scales, as the official ones have them, for any ladder that starts 1, 2, 3.
_SMALL_HEAD = {1: (1,), 2: (1, 3), 3: (1, 1, 2, 5), 4: (3, 5, 8)}
NAMES = (*_COUNTS, "small", "next-scale", "var")


def counts(name: str, ladder: ScaleLadder) -> Counts:
    """Tokens that each step commits, by scale: of the published ladder, or of this one where the name is for any."""
    match name if isinstance(name, str) else "":
        case "small":
            first, *rest = ladder.sides
            return ((first * first,), *(_SMALL_HEAD.get(side, (side * side,)) for side in rest))
        case "next-scale" | "var":
            return tuple((length,) for length in ladder.lengths)
        case published if published in _COUNTS:
            return _COUNTS[published]
    raise unknown(name)


def unknown(name: Any, recommended: Collection[str] = ()) -> InputError:
    """What to raise where no schedule has this name; it lists all, the model's own first."""
    own = f"{', '.join(recommended)} of this model, or " if recommended else ""
    return InputError(
        f"Schedule {shown(name)} is unknown; choose {own}{', '.join(NAMES)}, a .json file, or a curve and its steps, "
        "such as cosine:4, equal:2@7 or power2:4@5-9."
    )


def guidance(depth: int, name: str = "") -> dict[str, Any]:
    """The published cfg, top-k and perhaps top-p: VAR's for `var`, else those of a transformer depth.

    A depth that was not published has those of the published depth that is nearest to it, the smaller of two.
    """
    if name == "var":
        return _VAR
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise InputError(f"The depth is {shown(depth)}; expected the blocks of a transformer, 1 or more.")
    cfg, top_k = _GUIDANCE[_published(depth)]
    return {"cfg": cfg, "top_k": top_k}


def note_unpublished(depth: int, given: Mapping[str, Any]) -> None:
    """Logs, once a depth, whose guidance is taken where a depth has none and cfg and top_k are not both given."""
    if depth not in _GUIDANCE and any(given.get(name) is None for name in ("cfg", "top_k")):
        _note(depth)


@functools.cache
def _note(depth: int) -> None:
    logger.info("%s", guidance_origin(depth))


def guidance_origin(depth: int) -> str:
    """Where `guidance` of a depth is from, as a sentence."""
    nearest = _published(depth)
    cfg, top_k = _GUIDANCE[nearest]
    if depth == nearest:
        return f"cfg {cfg:g} and top-k {top_k} are those published for depth {depth}."
    return (
        f"No guidance was published for depth {depth}; cfg {cfg:g} and top-k {top_k} are those of depth {nearest}, the "
        "nearest. Other values may give better pictures (cfg, top_k)."
    )


def _published(depth: int) -> int:
    """The published depth nearest to a depth."""
    return min(_GUIDANCE, key=lambda other: (abs(other - depth), other))


def preset_for(ladder: ScaleLadder, transformer: TransformerConfig) -> str:
    """The preset that suits a model: the published one where there is one for its ladder, else the one like it."""
    if transformer.is_var:
        return "var"
    if not transformer.masked:
        return "next-scale"
    published = [name for name, counts in _COUNTS.items() if tuple(map(sum, counts)) == ladder.lengths]
    return published[0] if published else "small"
