"""Pictures as uint8, as float in [0,1] and as float in [-1,1] ⇄ one another; grids of them; PNG files.

Files and data hold uint8, users are given float in [0,1], networks see float in [-1,1]. What converts takes NumPy and
JAX arrays of any shape, inside `jit` too, and gives an array of the same kind. Needs no JAX, as data workers have none.

Axis letters: N pictures, S pixels a side.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmar_jax.files import local_path, write_whole

_GAP = 2  # pixels between the pictures of a grid, before enlargement


def to_uint8(images: Any) -> Any:
    """uint8 as it is; float in [0,1], clipped, times 255 to the nearest whole number.

    The two kinds of arrays round differently where 255 x is half-way between two numbers: NumPy's up, JAX's to the even
    one. Pictures of both have been published, so both stay.
    """
    if images.dtype == np.uint8:
        return images
    if isinstance(images, np.ndarray):
        return (np.clip(images.astype(np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def to_unit(images: Any) -> Any:
    """uint8, or float in [0,1] → float32 in [0,1]."""
    unit = images.astype(np.float32)
    return unit / np.float32(255) if images.dtype == np.uint8 else unit


def to_signed(images: Any) -> Any:
    """uint8, or float in [0,1] → float32 in [-1,1]."""
    signed = images.astype(np.float32)
    return signed / 127.5 - 1 if images.dtype == np.uint8 else 2 * signed - 1


def from_signed(images: Any) -> Any:
    """Float in [-1,1] → [0,1]."""
    return (images + 1) / 2


def grid(images: np.ndarray, columns: int, enlarge: int = 1) -> Image.Image:
    """Pictures row by row on white.

    Args:
      images: (N,S,S,3) uint8 or float in [0,1]. columns: pictures a row. enlarge: whole factor, nearest neighbour.
    """
    images = to_uint8(images)
    number, side = images.shape[:2]
    rows, pitch = -(-number // columns), side + _GAP
    canvas = np.full((rows * pitch + _GAP, columns * pitch + _GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = _GAP + i // columns * pitch, _GAP + i % columns * pitch
        canvas[y : y + side, x : x + side] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def save_png(picture: Image.Image | np.ndarray, path: Path) -> Path:
    """Writes a picture, PIL's or (S,S,3) uint8 or float in [0,1], whole or not at all.

    Raises:
      InputError: the disk refuses.
    """
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(to_uint8(picture))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return write_whole(local_path(path, "The picture's path"), stream.getvalue())
