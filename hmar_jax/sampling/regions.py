"""A picture file and the region of it to draw anew, as the command line gives them → arrays of a model's size.

Needs no JAX, so that what is wrong with a file is said before it is imported.
Axis letters: H, W height and width of the picture file, S pixels a side of the model's pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hmar_jax.data.picture_files import decode
from hmar_jax.errors import InputError, shown

_WHITE = 128  # of 255: from here on a pixel of a mask is to be drawn anew
_MOST_PADDING = 4096  # on each side of a picture: 200 MiB more of one that is as large


def picture_and_mask(
    file: Path, *, mask: Path | None = None, box: str | None = None, keep: str | None = None, pad: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The picture (H,W,3) uint8, and where to draw it anew, (H,W) bool, from the one region that is given.

    Args:
      mask: file of a picture as large, white where to draw anew. box, keep: `left,top,right,bottom` in pixels, to draw
        anew inside, or outside of it. pad: pixels to add on every side, and draw.

    Raises:
      InputError: a file cannot be read, sizes differ, or a box is none.
    """
    image = decode(file, f"Picture '{file}'")
    height, width = image.shape[:2]
    if mask is not None:
        # Paint programs save white strokes on nothing.
        white = Image.fromarray(decode(mask, f"Mask '{mask}'", background="black")).convert("L")
        if white.size != (width, height):
            sizes = f"{white.width}x{white.height} pixels, the picture {width}x{height}"
            raise InputError(f"Mask '{mask}' has {sizes}; make it as large as the picture.")
        brightest = int(np.asarray(white).max())
        if brightest < _WHITE:
            raise InputError(
                f"Mask '{mask}' leaves nothing to draw: its brightest pixel is {brightest} of 255. What is to be "
                f"drawn anew is white ({_WHITE} or more), the rest black; save the mask so."
            )
        return image, np.asarray(white) >= _WHITE
    if pad is not None:
        if not 1 <= pad <= _MOST_PADDING:
            raise InputError(f"--pad is {shown(pad)}; expected 1 to {_MOST_PADDING} pixels.")
        # Repeated edges, for the encoder sees what lies around a kept token.
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        return padded, np.pad(np.zeros((height, width), bool), pad, constant_values=True)
    if keep is not None:
        return image, ~box_mask(read_box(keep), width, height)
    assert box is not None
    return image, box_mask(read_box(box), width, height)


def read_box(text: str) -> list[int]:
    """`left,top,right,bottom` as numbers."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise InputError(
            f"Box {shown(text)} is not left,top,right,bottom in whole pixels, such as 0,0,64,128."
        ) from None
    return [left, top, right, bottom]


def to_square(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle square of a picture and its mask, at S = `size`: (S,S,3) uint8, (S,S) bool.

    A pixel of the mask is True if any of the pixels that it is made of is: small regions do not vanish.

    Raises:
      InputError: nothing in it is to be drawn anew.
    """
    side = min(mask.shape)
    top, left = ((length - side) // 2 for length in mask.shape)
    image, mask = (array[top : top + side, left : left + side] for array in (image, mask))
    image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
    firsts = np.arange(size) * side // size
    for axis in (0, 1):
        mask = np.logical_or.reduceat(mask, firsts, axis)
    if not mask.any():
        raise InputError("Nothing is to be drawn anew in the middle square of the picture; choose a region inside it.")
    return image, mask


def box_mask(box: list[int], width: int, height: int) -> np.ndarray:
    """A box (left, top, right, bottom) in pixels, right and bottom exclusive, as (height, width) bool, True inside.

    Raises:
      InputError: it is empty or not inside the picture.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"Box {left},{top},{right},{bottom} is not left < right, top < bottom inside 0,0,{width},{height}."
        )
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask
