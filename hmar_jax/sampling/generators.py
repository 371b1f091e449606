"""a curve and a few numbers → counts: how many tokens each step of each scale commits.

A curve gives the share of a scale's tokens that is still masked once a share of its steps is done, from 1 down to 0.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from numbers import Real
from typing import Any

from hmar_jax.errors import InputError, shown
from hmar_jax.scales import ScaleLadder

MOST_PASSES = 2**14  # of a schedule; one a token are 9451 on the ladder of 1024 pixels
CURVES = ("single", "equal", "cosine", "arccos", "power")
_TEXT = re.compile(r"([a-z]+)([0-9.]*)(?::([0-9]{1,9})(?:@([0-9]{1,9})(?:-([0-9]{1,9}))?)?)?")


def parse(text: str) -> dict[str, Any] | None:
    """`curve:steps@first-last` as arguments of `generate`: `cosine:4@5-9`, `power2:4` or `equal:2@7`; None for others.

    The exponent follows the curve's name; without `@` the steps are those of all scales.
    """
    found = _TEXT.fullmatch(text)
    if not found or found[1] not in CURVES:
        return None
    try:
        exponent = float(found[2]) if found[2] else None
    except ValueError:
        return None
    scales = (int(found[4]), int(found[5] or found[4])) if found[4] else None
    return {"curve": found[1], "steps": found[3] and int(found[3]), "scales": scales, "exponent": exponent}


def generate(
    ladder: ScaleLadder,
    curve: str = "single",
    steps: int | None = None,
    scales: tuple[int, int] | None = None,
    exponent: float | None = None,
) -> list[list[int]]:
    """Counts of a ladder by a curve; arguments as in `Schedule.generate`.

    Raises:
      InputError: an unknown curve, or numbers that it cannot have.
    """
    if not isinstance(curve, str) or curve not in CURVES:
        raise InputError(f"Curve {shown(curve)} is unknown; choose {', '.join(CURVES)}.")
    steps = _checked_steps(curve, steps)
    power, number = curve == "power", _is_exponent(exponent)
    if power != (exponent is not None) or power != number:
        rule = "a number above 0, such as 2" if power else "none, which 'power' alone has"
        raise InputError(f"The exponent of curve {curve!r} is {shown(exponent)}; expected {rule}.")
    first, last = _checked_scales(ladder, scales)
    passes = sum(min(steps, length) if first <= scale <= last else 1 for scale, length in enumerate(ladder.lengths, 1))
    if passes > MOST_PASSES:
        raise InputError(
            f"{shown(steps)} steps of scales {first} to {last} make {passes} passes; expected {MOST_PASSES} at most, "
            "so choose fewer steps, or fewer scales that have them."
        )
    return [
        _counts(length, steps if first <= scale <= last and scale > 1 else 1, curve, float(exponent or 1))
        for scale, length in enumerate(ladder.lengths, 1)
    ]


def _is_exponent(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # of 10**400
        return False


def _checked_steps(curve: str, steps: Any) -> int:
    """Steps as an int, 1 where the curve is `single`."""
    if curve == "single" and steps is None:
        return 1
    try:
        checked = 0 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        checked = 0
    if curve == "single" and checked == 1:
        return 1
    if curve == "single" or checked < 1:
        rule = "none, for it has one a scale" if curve == "single" else "a whole number, 1 or more"
        raise InputError(f"The steps of curve {curve!r} are {shown(steps)}; expected {rule}.")
    return checked


def _checked_scales(ladder: ScaleLadder, scales: Any) -> tuple[int, int]:
    """First and last scale, from 1; all of them where none are given."""
    if scales is None:
        return 1, ladder.num_scales
    try:
        first, last = map(operator.index, scales)
    except (TypeError, ValueError, RecursionError):
        first, last = 0, 0
    if not 1 <= first <= last <= ladder.num_scales:
        raise InputError(
            f"Scales are {shown(scales)}; expected the first and the last, from 1 to {ladder.num_scales} on the ladder "
            f"{','.join(map(str, ladder.sides))}."
        )
    return first, last


def _counts(length: int, steps: int, curve: str, exponent: float) -> list[int]:
    """What each step commits of `length` tokens; no more steps than tokens.

    After each step the number still masked is the nearest to the curve that leaves every step a token at least. (For
    convex and concave curves, as all of these are, choosing so step by step never makes two numbers meet.)
    """
    steps = min(steps, length)
    masked = [
        min(max(math.floor(length * _share_masked(step / steps, curve, exponent) + 0.5), steps - step), length - step)
        for step in range(steps + 1)
    ]
    return [before - after for before, after in itertools.pairwise(masked)]


def _share_masked(done: float, curve: str, exponent: float) -> float:
    match curve:
        case "cosine":
            return math.cos(math.pi / 2 * done)
        case "arccos":
            return math.acos(done) / (math.pi / 2)
        case "power":
            return 1 - done**exponent
    return 1 - done
