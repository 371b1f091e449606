"""nested dicts of arrays ⇄ flat ones with dotted names, as files and partitions by path want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util

from hmar_jax.errors import InputError, printable, shown

Tree = dict[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]


def flatten(tree: Tree) -> dict[str, Any]:
    """`{"a": {0: x}}` → `{"a.0": x}`."""
    return {".".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`: names that are numbers become ints again, as NNX lists have them."""
    paths = {tuple(int(p) if p.isdigit() else p for p in name.split(".")): leaf for name, leaf in flat.items()}
    return traverse_util.unflatten_dict(paths)


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The leaves whose dotted name is chosen, and the others, as two trees that `merge` joins again."""
    flat = flatten(tree)
    return (
        unflatten({name: leaf for name, leaf in flat.items() if chosen(name)}),
        unflatten({name: leaf for name, leaf in flat.items() if not chosen(name)}),
    )


def merge(*trees: Tree) -> Tree:
    """One tree with the leaves of all; later ones win."""
    return unflatten({name: leaf for tree in trees for name, leaf in flatten(tree).items()})


def check_shapes(found: Shapes, expected: Shapes, where: str, remedy: str) -> None:
    """Raises InputError, naming entries, unless `found` has exactly the names and shapes expected.

    Args:
      where: what has them, to begin the sentence. remedy: its end.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for what, names in (("lacks", missing), ("has the unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            some = ", ".join(printable(name, 80) for name in names[:3])
            raise InputError(f"{where} {what} {some}{more}; {remedy}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError(f"{where} has {name} of shape {shown(tuple(found[name]))}, not {tuple(shape)}; {remedy}")
