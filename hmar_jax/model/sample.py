"""Pictures that a `Model` has drawn, with their tokens: shown and saved.

Axis letters: B batch, S pixels a side, L tokens, N tokens of one scale.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hmar_jax import images
from hmar_jax.arrays import whole
from hmar_jax.errors import InputError
from hmar_jax.files import check_files, check_pictures, is_there, local_path, note_replaced, remove, writing

_COLUMNS = 8  # of a grid, unless there are fewer pictures


class DrawRecord(NamedTuple):
    """One pass as `Sample.draws` lists it: scale and step from 0, the others (B,N) as in `sampler.Draw`."""

    scale: int
    step: int
    tokens: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What `Model.sample` and `Model.edit` give.

    Attributes:
      images: (B,S,S,3) float32 in [0,1]; None with `decode=False`, which the type leaves out: who has pictures decoded
        need not rule it out.
      tokens: (B,L) int32, final.
      draws: with `record=True` every pass's draw, in order; else None.
    """

    images: np.ndarray | Any
    tokens: np.ndarray
    draws: list[DrawRecord] | None = None

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL has them, 8 bits a channel."""
        return [Image.fromarray(picture) for picture in images.to_uint8(self._images())]

    def grid(self, columns: int | None = None, enlarge: int = 1) -> Image.Image:
        """All pictures as one, row by row on white.

        Args:
          columns: pictures a row; by default 8, or as many as there are. enlarge: whole factor, nearest neighbour.
        """
        pictures = self._images()
        columns = min(_COLUMNS, len(pictures)) if columns is None else whole("columns", columns, 1, 10_000)
        return images.grid(pictures, columns, whole("enlarge", enlarge, 1, 100))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a grid where the path ends in `.png`, else a folder with a file 00000.png, … for each picture.

        Pictures of these names that are there already are replaced, other files are left alone. A new folder appears
        with all of its pictures or not at all.

        Returns:
          The path.

        Raises:
          InputError: what stands there is no picture, or the disk refuses. MachineError: it is full.
        """
        path = local_path(path, "The pictures' path")
        pictures = [self.grid()] if path.suffix.lower() == ".png" else self.pil()
        files = [path] if path.suffix.lower() == ".png" else [path / f"{i:05d}.png" for i in range(len(pictures))]
        check_files("path", files)
        check_pictures("path", files)
        if path in files or is_there(path, "Folder"):
            note_replaced(files)
            for file, picture in zip(files, pictures, strict=True):
                images.save_png(picture, file)
            return path
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            try:
                remove(partial)  # what a killed run left
                for file, picture in zip(files, pictures, strict=True):
                    images.save_png(picture, partial / file.name)
                partial.rename(path)
            finally:
                remove(partial)
        return path

    def _images(self) -> np.ndarray:
        if self.images is None:
            raise InputError(
                "This sample has no pictures, as it was drawn with decode=False; decode its tokens with "
                "model.tokenizer.decode, or leave decode=False out."
            )
        return self.images

    def _repr_png_(self) -> bytes | None:
        """What notebooks show."""
        return None if self.images is None else self.grid()._repr_png_()
