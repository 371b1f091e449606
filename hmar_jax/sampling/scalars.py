"""counts and scalars of a schedule, as users and files give them → nested tuples, checked."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np

from hmar_jax.errors import NO_LISTS, InputError, shown
from hmar_jax.sampling.generators import MOST_PASSES

type Counts = tuple[tuple[int, ...], ...]
type Nested = tuple[tuple[float, ...], ...]

_LARGEST = 2.0**127  # what float32 holds with room to spare
_RULES = {
    "cfg": (-math.inf, math.inf, "a finite number"),
    "temperature": (1e-6, math.inf, "above 0, and finite"),
    "top_k": (0, 2**31 - 1, "a whole number, 0 (off) or more"),
    "top_p": (1e-6, 1, "above 0 and at most 1 (off)"),
    "noise": (0, math.inf, "0 or more, and finite"),
}
SCALARS = tuple(_RULES)


def checked_counts(counts: Any) -> Counts:
    """Counts as tuples; InputError where they are those of no schedule."""
    try:
        nested = tuple(tuple(map(_index, _list(steps))) for steps in _list(counts))
    except TypeError:
        nested = ()
    if not nested:
        raise InputError(f"Counts are {shown(counts)}; expected whole numbers for each scale, such as [[1], [1, 3]].")
    if (passes := sum(map(len, nested))) > MOST_PASSES:
        raise InputError(f"Counts of {passes} passes were given; expected {MOST_PASSES} at most.")
    for scale, steps in enumerate(nested):
        total = sum(steps)
        positive = bool(steps) and min(steps) > 0 and total < 2**31
        if not positive or math.isqrt(total) ** 2 != total or (scale == 0 and len(steps) > 1):
            rule = "one step of p² tokens" if scale == 0 else "positive counts that sum to p², such as 1,3 for p=2"
            raise InputError(
                f"Counts {shown(list(steps))} of scale {scale + 1} sum to {shown(total)}; expected {rule}."
            )
    return nested


def _list(value: Any) -> Any:
    """A list or whatever else has items in an order. Raises TypeError for texts, bytes, sets and dicts."""
    if isinstance(value, NO_LISTS):
        raise TypeError
    return value


def _index(value: Any) -> int:
    """A whole number as an int. Raises TypeError for others, truth values included."""
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def nested_like(name: str, value: Any, counts: Counts) -> Nested:
    """A scalar for all passes, or values nested like `counts`, as nested tuples of floats."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return tuple((_float(value),) * len(steps) for steps in counts)
    try:
        nested = tuple(tuple(map(_float, _list(steps))) for steps in _list(value))
    except (TypeError, ValueError):
        nested = ()
    if [len(steps) for steps in nested] != [len(steps) for steps in counts]:
        raise InputError(
            f"{name} is {shown(value)}; expected a number, or numbers nested like the counts {shown(counts)}."
        )
    return nested


def _float(value: Any) -> float:
    """A number as a float, infinite where it is beyond. Raises TypeError for others, also texts and truth values."""
    if isinstance(value, str | bytes | bool | np.bool_):
        raise TypeError
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def ramped(number: Any, cfg: Nested, refine: bool) -> Nested:
    """Guidance with number·k/(K-1) on the masked passes of scale k (from 0), or else on its next-scale pass."""
    name = "refine_cfg" if refine else "cfg"
    if not isinstance(number, Real) or isinstance(number, bool):
        raise InputError(f"{name} is {shown(number)}; expected a number.")
    number = _float(number)
    if not abs(number) < _LARGEST:
        raise InputError(f"{name} is {number}; expected a finite number.")
    last = max(len(cfg) - 1, 1)
    return tuple(
        tuple(number * k / last if (step > 0) == refine else value for step, value in enumerate(steps))
        for k, steps in enumerate(cfg)
    )


def check_range(name: str, values: Nested) -> None:
    """Raises InputError where a scalar is outside its range."""
    low, high, rule = _RULES[name]
    for value in (value for steps in values for value in steps):
        whole = name != "top_k" or float(value).is_integer()
        if not abs(value) < _LARGEST or not low <= value <= high or not whole:
            given = int(value) if name == "top_k" and whole else value
            raise InputError(f"{name} is {shown(given)}; expected {rule}.")
