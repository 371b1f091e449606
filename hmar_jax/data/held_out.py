"""source → the part to train on and the part that is held out, by a hash of each example's name.

An example is held out if SHA-256 of its name, as a number from 0 to 1, is below the share that is asked for. The name
of a picture in a folder is its path below that folder, that of a TFDS example its number. So an example stays where it
is when others are added or removed, and two machines agree without a list.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from hmar_jax.errors import InputError

Part = Literal["train", "validation"]


@runtime_checkable
class NamedSource(Protocol):
    """Examples by index, each with a name of its own that does not depend on the others."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str: ...


class PartOfSource:
    """The examples of one part, in the order of the whole source, with the class names of the whole.

    Args:
      source: the whole. part: which to have.
      share: of the examples to hold out, above 0 and below 1. At least one is: that with the lowest hash.

    Raises:
      InputError: one of the parts would be empty, since the source has a single example or the share is too large.
    """

    def __init__(self, source: NamedSource, part: Part, share: float) -> None:
        self._source, self.class_names = source, source.class_names
        hashes = np.array([_hash(source.name(index)) for index in range(len(source))])
        held_out = (hashes < share) | (hashes == hashes.min())
        if held_out.all():
            raise InputError(
                f"data.held_out={share} leaves nothing to train on: the source has {len(source)} examples, and all of "
                "them are held out; lower it."
            )
        self._indices = np.flatnonzero(held_out if part == "validation" else ~held_out)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))


def _hash(name: str) -> float:
    """SHA-256 of a name as a number from 0 to below 1."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**48
