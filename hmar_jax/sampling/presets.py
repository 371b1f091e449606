"""Names → the counts and guidance that they stand for: the published schedules, and their like for other ladders."""

from __future__ import annotations

from typing import Any

from hmar_jax.config import TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

Counts = tuple[tuple[int, ...], ...]

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
    if name in _COUNTS:
        return _COUNTS[name]
    if name == "small":
        first, *rest = ladder.sides
        return ((first * first,), *(_SMALL_HEAD.get(side, (side * side,)) for side in rest))
    if name in ("next-scale", "var"):
        return tuple((length,) for length in ladder.lengths)
    raise InputError(
        f"Schedule {name!r} is unknown; choose {', '.join(NAMES)}, a .json file, or a curve and its steps, "
        "such as cosine:4, equal:2@7 or power2:4@5-9."
    )


def guidance(depth: int, name: str = "") -> dict[str, Any]:
    """The published cfg, top-k and perhaps top-p of a transformer depth (16 where it has none), or VAR's for `var`."""
    if name == "var":
        return _VAR
    cfg, top_k = _GUIDANCE.get(depth, _GUIDANCE[16])
    return {"cfg": cfg, "top_k": top_k}


def preset_for(ladder: ScaleLadder, transformer: TransformerConfig) -> str:
    """The preset that suits a model: the published one where there is one for its ladder, else the one like it."""
    if transformer.pattern == "block_causal":
        return "var"
    if not transformer.masked:
        return "next-scale"
    published = [name for name, counts in _COUNTS.items() if tuple(map(sum, counts)) == ladder.lengths]
    return published[0] if published else "small"
