"""DataConfig → its sources of examples: the part for training and the held-out one, each opened once in a run."""

from __future__ import annotations

import functools
import os

from hmar_jax.config import DataConfig
from hmar_jax.data.broken import WholePictures
from hmar_jax.data.crops import Source
from hmar_jax.data.folder import FolderSource
from hmar_jax.data.glyphs import Glyphs
from hmar_jax.data.held_out import NamedSource, Part, PartOfSource
from hmar_jax.data.tokens import TokenSource, validation_of
from hmar_jax.errors import InputError

SEEDS = 2**32  # of training; glyphs of greater ones are held out


class Sources:
    """The examples that a config names; a part of them is opened when it is first asked for, and then kept.

    Args:
      config: what to read. image_size: S; token caches need none.
    """

    def __init__(self, config: DataConfig, image_size: int = 0) -> None:
        self.config, self._image_size = config, image_size
        self._opened: dict[tuple[Part, int], Source] = {}

    def open(self, part: Part = "train", seed: int = 0, classes: int | None = None) -> Source:
        """One part of the examples.

        Args:
          part: `validation` is what `has_validation` promises: glyphs of seeds that no training has, the folder
            `validation` of a token cache, or the share `data.held_out` of other sources, which `train` then lacks.
          seed: of the glyphs; other sources are the same for all seeds.
          classes: that labels of tokens must be below; the names in a cache bound them too.

        Raises:
          InputError: the source is unknown, missing or unusable, or a setting is out of range.
        """
        key = part, seed if self.config.source == "glyphs" else 0
        if key not in self._opened:
            self._opened[key] = self._open(*key)
        source = self._opened[key]
        return source.with_classes(classes) if classes and isinstance(source, TokenSource) else source

    def has_validation(self) -> bool:
        """Whether there are examples that training never sees."""
        if self.config.source == "tokens":
            return os.path.isdir(validation_of(self.config.path))
        return self.config.source == "glyphs" or self.config.held_out > 0

    def _open(self, part: Part, seed: int) -> Source:
        config = self.config
        if config.source == "glyphs":
            return Glyphs(config.classes, self._image_size, seed + SEEDS * (part == "validation"))
        if config.source == "tokens":
            return TokenSource(validation_of(config.path) if part == "validation" else config.path)
        if config.held_out:
            source: NamedSource = PartOfSource(self.pictures, part, config.held_out)
        elif part == "train":
            source = self.pictures
        else:
            raise InputError(
                f"data.held_out is 0, so that no picture of {config.path!r} is held out; set it to a share."
            )
        return WholePictures(source, config) if config.skip_broken else source

    @functools.cached_property
    def pictures(self) -> NamedSource:
        """All pictures of a folder or TFDS dataset, whichever part they belong to."""
        if self.config.source == "folder":
            return FolderSource(self.config.path)
        from hmar_jax.data.tfds import TfdsSource  # slow to import, and the only one to want TFDS

        return TfdsSource(self.config.name, self.config.path, self.config.split)
