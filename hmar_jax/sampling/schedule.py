"""counts and scalars per scale and step → a static plan and traced controls: how a picture is sampled, as data.

A schedule says, for every scale, how many tokens each step commits: `[[1], [1, 3], [1, 3, 5]]` draws the 2x2 map in two
steps. The first step of a scale is its next-scale pass, the others are masked passes (HMAR §4.3). Beside each count
stand the scalars of that pass: guidance, temperature, top-k, top-p, confidence noise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

Nested = tuple[tuple[float, ...], ...]
SCALARS = ("cfg", "temperature", "top_k", "top_p", "noise")

# FACTS: the published sampling settings by depth, (cfg, top-k); top-p is 0.99 for all.
_OFFICIAL_GUIDANCE = {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}
_OFFICIAL_COUNTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "official-256": ((1,), (1, 3), (1, 1, 2, 5), (16,), (25,), (36,), (64,), (100,), (169,), (256,)),
    "official-512": ((1,), (1, 3), (1, 1, 2, 5), (5, 11), (36,), (81,), (169,), (324,), (576,), (1024,)),
    "official-1024": (
        (1,), (1, 3), (1, 1, 2, 5), (3, 5, 8), (25,), (49,), (81,), (144,), (256,), (441,), (729,), (1296,), (2304,),
        (4096,),
    ),
}  # fmt: skip
# Masked steps on the small scales, as the official ones have them, for any ladder that starts 1, 2, 3.
_SMALL_HEAD = {1: (1,), 2: (1, 3), 3: (1, 1, 2, 5), 4: (3, 5, 8)}
PRESETS = (*_OFFICIAL_COUNTS, "small", "next-scale", "var")
# VAR's published sampling settings, the same for all depths.
_VAR = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}


class Pass(NamedTuple):
    """One run of the transformer.

    Attributes:
      scale, step: from 0; step 0 is the next-scale pass. number: among all passes, from 0.
      remaining: tokens of the scale that are still open after it.
      guided: whether the null half is computed.
    """

    scale: int
    step: int
    number: int
    remaining: int
    guided: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a schedule: what a compilation depends on."""

    counts: tuple[tuple[int, ...], ...]
    guided: tuple[tuple[bool, ...], ...]

    def passes(self, scale: int) -> Iterator[Pass]:
        """The passes of one scale, in order."""
        first = sum(len(steps) for steps in self.counts[:scale])
        for step, guided in enumerate(self.guided[scale]):
            remaining = sum(self.counts[scale][step + 1 :])
            yield Pass(scale, step, first + step, remaining, guided)


class Controls(NamedTuple):
    """The traced part of a schedule: one number a pass, (P,) each; all float32 but top_k int32."""

    cfg: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many tokens each step commits, and the scalars of each pass; all nested alike, scale by scale.

    Attributes:
      counts: tokens committed; those of a scale sum to p².
      cfg: guidance t in (1+t)·cond - t·null. Where it is 0 the null half is not computed.
      temperature: logits are divided by it, > 0.
      top_k: logits kept, ties with the last included; 0 keeps all.
      top_p: the ascending tail of mass at most 1 - top_p is dropped; 1 keeps all.
      noise: Gumbel noise on the log-confidence that orders commitment, ≥ 0; 0 is the published order.
    """

    counts: tuple[tuple[int, ...], ...]
    cfg: Nested
    temperature: Nested
    top_k: Nested
    top_p: Nested
    noise: Nested

    @classmethod
    def from_counts(
        cls,
        counts: Sequence[Sequence[int]],
        *,
        cfg: Any = 1.7,
        temperature: Any = 1.0,
        top_k: Any = 1000,
        top_p: Any = 0.99,
        noise: Any = 0.0,
    ) -> Schedule:
        """A schedule from counts, with the official guidance unless told otherwise.

        Args:
          counts: per scale, the tokens that each of its steps commits.
          cfg: a number t, ramped as published: t·k/(K-1) on the next-scale pass of scale k (from 0), none on masked
            passes; or nested like `counts` and taken as it is.
          temperature, top_k, top_p, noise: a number for all passes, or nested like `counts`.

        Raises:
          InputError: counts that are not positive or don't sum to a square, or scalars of another shape or range.
        """
        try:
            nested = tuple(tuple(operator.index(count) for count in steps) for steps in counts)
        except TypeError:
            nested = ()
        if not nested:
            raise InputError(f"Counts are {counts!r}; expected whole numbers for each scale, such as [[1], [1, 3]].")
        for scale, steps in enumerate(nested):
            total = sum(steps)
            if not steps or min(steps) < 1 or math.isqrt(total) ** 2 != total or (scale == 0 and len(steps) > 1):
                rule = "one step of p² tokens" if scale == 0 else "positive counts that sum to p², such as 1,3 for p=2"
                raise InputError(f"Counts {list(steps)} of scale {scale + 1} sum to {total}; expected {rule}.")
        if isinstance(cfg, int | float):
            last = max(len(nested) - 1, 1)
            cfg = [[cfg * k / last if step == 0 else 0.0 for step in range(len(c))] for k, c in enumerate(nested)]
        given = (cfg, temperature, top_k, top_p, noise)
        schedule = cls(nested, *(_nested(name, value, nested) for name, value in zip(SCALARS, given, strict=True)))
        schedule._check_ranges()
        return schedule

    def _check_ranges(self) -> None:
        rules = {
            "cfg": (-math.inf, math.inf, "a finite number"),
            "temperature": (1e-6, math.inf, "above 0"),
            "top_k": (0, 2**31 - 1, "a whole number, 0 (off) or more"),
            "top_p": (1e-6, 1, "above 0 and at most 1 (off)"),
            "noise": (0, math.inf, "0 or more"),
        }
        for name, (low, high, rule) in rules.items():
            for value in (value for steps in getattr(self, name) for value in steps):
                whole = name != "top_k" or float(value).is_integer()
                if not math.isfinite(value) or not low <= value <= high or not whole:
                    raise InputError(f"{name} is {value}; expected {rule}.")

    @classmethod
    def preset(cls, name: str, ladder: ScaleLadder, depth: int = 16) -> Schedule:
        """A named schedule for a ladder, with the published guidance of the given transformer depth.

        `official-256`, `official-512`, `official-1024` are published, each for its ladder. `small` has their masked
        steps on whichever of the sides 2, 3 and 4 a ladder has; `next-scale` and `var` have no masked step, the latter
        the guidance published for VAR: these three are for any ladder.
        """
        if name in _OFFICIAL_COUNTS:
            counts: Sequence[Sequence[int]] = _OFFICIAL_COUNTS[name]
        elif name == "small":
            counts = [_SMALL_HEAD.get(side, (side * side,)) for side in ladder.sides]
            counts[0] = (ladder.lengths[0],)
        elif name in ("next-scale", "var"):
            counts = [(length,) for length in ladder.lengths]
        else:
            raise InputError(f"Schedule {name!r} is unknown; choose {', '.join(PRESETS)}, or give a Schedule.")
        cfg, top_k = _OFFICIAL_GUIDANCE.get(depth, _OFFICIAL_GUIDANCE[16])
        scalars: dict[str, Any] = _VAR if name == "var" else {"cfg": cfg, "top_k": top_k}
        schedule = cls.from_counts(counts, **scalars)
        schedule.check_ladder(ladder, name)
        return schedule

    def replace(self, **scalars: Any) -> Schedule:
        """The schedule with other scalars, given as in `from_counts`; None leaves one as it is."""
        given = {name: value for name, value in scalars.items() if value is not None}
        return self.from_counts(self.counts, **({name: getattr(self, name) for name in SCALARS} | given))

    def check_ladder(self, ladder: ScaleLadder, name: str = "This schedule") -> None:
        """Raises InputError unless the schedule is for the sides of `ladder`."""
        sides = tuple(math.isqrt(sum(steps)) for steps in self.counts)
        if sides != ladder.sides:
            raise InputError(
                f"{name} is for the sides {','.join(map(str, sides))}, but the model was built for "
                f"{','.join(map(str, ladder.sides))}; choose a schedule for those, such as 'next-scale'."
            )

    @property
    def has_masked_steps(self) -> bool:
        return any(len(steps) > 1 for steps in self.counts)

    @property
    def plan(self) -> Plan:
        return Plan(self.counts, tuple(tuple(value != 0 for value in steps) for steps in self.cfg))

    @property
    def controls(self) -> Controls:
        flat = {name: [value for steps in getattr(self, name) for value in steps] for name in SCALARS}
        return Controls(**{n: jnp.asarray(v, jnp.int32 if n == "top_k" else jnp.float32) for n, v in flat.items()})

    def to_json(self) -> str:
        """JSON with the counts and all five scalars, nested alike."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """What `to_json` wrote, or written by hand: `counts`, and any scalar as a number or nested."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"The schedule is not JSON ({error}); write it with Schedule.to_json.") from None
        if not isinstance(fields, dict) or "counts" not in fields or set(fields) - {"counts", *SCALARS}:
            raise InputError(f"A schedule's JSON has 'counts' and perhaps {', '.join(SCALARS)}; got {text[:80]!r}.")
        return cls.from_counts(fields.pop("counts"), **fields)


def _nested(name: str, value: Any, counts: tuple[tuple[int, ...], ...]) -> Nested:
    """A scalar for all passes, or values nested like `counts`, as nested tuples of floats."""
    if isinstance(value, int | float):
        return tuple(tuple(float(value) for _ in steps) for steps in counts)
    try:
        nested = tuple(tuple(float(item) for item in steps) for steps in value)
    except (TypeError, ValueError):
        nested = ()
    if [len(steps) for steps in nested] != [len(steps) for steps in counts]:
        raise InputError(f"{name} is {value!r}; expected a number, or numbers nested like the counts {counts}.")
    return nested
