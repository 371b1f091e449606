"""Pictures that cannot be used: all of them named at once, or left out.

source ─look at every picture→ the broken ones ─┬→ one sentence, with all of them in the log
└→ the source without them (data.skip_broken)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from hmar_jax.config import DataConfig
from hmar_jax.data.held_out import NamedSource
from hmar_jax.data.picture_files import BrokenPictureError
from hmar_jax.data.reading import Reader, read
from hmar_jax.errors import InputError, printable
from hmar_jax.progress_bar import progress

logger = logging.getLogger(__name__)

_SHOWN = 10  # broken pictures in a sentence
_WITH_FAULTS = 3  # are in a sentence with all that is wrong with them, more by name alone
_LISTED = 1000  # in the log
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Broken:
    """A picture that cannot be used: its index in the source, what it is called, and its fault."""

    index: int
    name: str
    fault: str

    def __str__(self) -> str:
        return f"{self.name} {self.fault}"


def broken(source: NamedSource, config: DataConfig) -> list[Broken]:
    """Reads every picture of a source, by `config.workers` or threads; those that cannot be used, by index.

    Raises:
      InputError: an example is wrong in another way. TransientError: the disk refuses.
    """
    looks = grain.MapDataset.range(len(source)).map(_Look(source)).batch(_BATCH, drop_remainder=False, batch_fn=list)
    reader, found = Reader[list[Broken]](read(looks, config)), list[Broken]()
    with progress(len(source), 0, "checked") as advance:
        for looked_at in reader:
            found += [one for one in looked_at if one.fault]
            advance(len(looked_at))
    reader.close()
    return found


def naming_all(source: NamedSource, config: DataConfig, first: BrokenPictureError) -> InputError:
    """The error that names all broken pictures of a source, one of which was met."""
    found = broken(source, config) or [Broken(0, first.name, first.fault)]
    if len(found) > _WITH_FAULTS:
        _log("cannot be used", found, len(source))
        shown = ", ".join(repr(printable(source.name(one.index), 60)) for one in found[:_SHOWN])
    else:
        shown = ", ".join(printable(str(one), 250) for one in found)
    more = f", and {len(found) - _SHOWN} more, which the log names" * (len(found) > _SHOWN)
    return InputError(
        f"{len(found)} of {len(source)} pictures cannot be used: {shown}{more}; replace them or take them away, or set "
        "data.skip_broken=True."
    )


class WholePictures:
    """A source without its broken pictures, which are looked for once, when an example is first wanted.

    Attributes:
      class_names: of the source, even where a class has no whole picture.

    Raises:
      InputError: no picture is whole (when an example is first wanted).
    """

    def __init__(self, source: NamedSource, config: DataConfig) -> None:
        self._source, self._config = source, config
        self.class_names = source.class_names

    @functools.cached_property
    def left_out(self) -> Sequence[Broken]:
        """The broken pictures."""
        found = broken(self._source, self._config)
        if found:
            _log("are left out", found, len(self._source))
        return found

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def name(self, index: int) -> str:
        """The name of an example in the source."""
        return self._source.name(int(self._indices[index]))

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        kept = np.setdiff1d(np.arange(len(self._source)), [one.index for one in self.left_out])
        if not len(kept):
            raise InputError(f"None of {len(self._source)} pictures can be used, such as {self.left_out[0]}.")
        return kept


@dataclasses.dataclass(frozen=True)
class _Look:
    """The index of an example → `Broken`, of which the fault is empty if there is none."""

    source: NamedSource

    def __call__(self, index: int) -> Broken:
        try:
            self.source[index]
        except BrokenPictureError as error:
            return Broken(index, error.name, error.fault)
        return Broken(index, "", "")


def _log(what: str, found: Sequence[Broken], total: int) -> None:
    logger.warning("%d of %d pictures %s:", len(found), total, what)
    for one in found[:_LISTED]:
        logger.warning("  %s", printable(str(one), 400))
    if len(found) > _LISTED:
        logger.warning("  … and %d more", len(found) - _LISTED)
