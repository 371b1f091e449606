"""class names of a cache, a folder, a model and a checkpoint → refused where labels would change their meaning."""

from __future__ import annotations

from collections.abc import Sequence

from hmar_jax.errors import InputError

Named = tuple[str, Sequence[str]]  # what has the classes, as a sentence calls it; their names by label


def check_same_classes(here: Named, there: Named, remedy: str) -> None:
    """Raises InputError, with both lists, where two lists of class names differ; one without names fits all.

    Args:
      remedy: the end of the sentence, after the list of `there`.
    """
    (who, ours), (other, theirs) = here, there
    if not ours or not theirs or tuple(ours) == tuple(theirs):
        return
    raise InputError(f"{who} has the classes {_shown(ours, theirs)}, but {other} has {_shown(theirs, ours)}, {remedy}.")


def _shown(names: Sequence[str], others: Sequence[str], most: int = 8) -> str:
    """Names as part of a sentence; of many, those around the first that differs."""
    if len(names) <= most:
        return ", ".join(map(_cut, names))
    same = (a == b for a, b in zip(names, others, strict=False))
    first = next((i for i, equal in enumerate(same) if not equal), min(len(names), len(others)))
    start = max(0, min(first - 2, len(names) - most))
    shown = ", ".join(map(_cut, names[start : start + most]))
    return f"{'…, ' if start else ''}{shown}{', …' if start + most < len(names) else ''} ({len(names)} in all)"


def _cut(name: str, most: int = 32) -> str:
    printable = name if name.isprintable() else repr(name)[1:-1]
    return printable if len(printable) <= most else printable[: most - 1] + "…"
