"""pictures + masks → which tokens are kept at each scale; edited pictures → composited ones. Zero-shot editing.

All of it is NumPy on the host and exact. A mask is True where a picture is to be drawn anew.
Axis letters: B batch, S pixels a side, L tokens, p tokens of one scale a side.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from hmar_jax.arrays import host_array
from hmar_jax.errors import InputError
from hmar_jax.images import to_unit
from hmar_jax.sampling.regions import box_mask
from hmar_jax.scales import ScaleLadder


def check_pictures(images: ArrayLike, size: int) -> np.ndarray:
    """Pictures (B,S,S,3) or one of them, uint8 or float in [0,1] → (B,S,S,3) float32 in [0,1].

    Raises:
      InputError: another shape, type or range.
    """
    pictures = host_array("Images are", images, f"(B, {size}, {size}, 3), uint8 or floats from 0 to 1")
    batch = pictures[None] if pictures.ndim == 3 else pictures
    if batch.ndim != 4 or batch.shape[1:] != (size, size, 3) or not len(batch):
        raise InputError(f"Images are {pictures.shape}; this model edits (B, {size}, {size}, 3) or one of them.")
    if batch.dtype == np.uint8:
        return to_unit(batch)
    low, high = batch.min(), batch.max()  # not a number where a pixel is not
    if not jnp.issubdtype(batch.dtype, jnp.floating) or not (low >= 0 and high <= 1):
        raise InputError(f"Images are {batch.dtype} from {low} to {high}; expected uint8, or floats from 0 to 1.")
    return to_unit(batch)


def check_mask(mask: ArrayLike, batch: int, size: int) -> np.ndarray:
    """A mask for all pictures or one for each, or a box, as (B,S,S) bool.

    Args:
      mask: bool (S,S) or (B,S,S), True where to draw anew; or a box (left, top, right, bottom) in pixels, right and
        bottom exclusive.

    Raises:
      InputError: another shape or type, or a box that is empty or not inside the picture.
    """
    array = host_array("The mask is", mask, f"bool ({size}, {size}) or a box (left, top, right, bottom)")
    if array.shape == (4,) and np.issubdtype(array.dtype, np.integer):
        array = box_mask(array.tolist(), size, size)
    if array.dtype != bool or array.shape not in ((size, size), (batch, size, size)):
        raise InputError(
            f"The mask is {array.dtype} {array.shape}; expected bool ({size}, {size}) or ({batch}, {size}, {size}), "
            "True where to draw anew, or a box (left, top, right, bottom) of whole numbers."
        )
    return np.broadcast_to(array, (batch, size, size))


def keep_tokens(mask: np.ndarray, ladder: ScaleLadder) -> np.ndarray:
    """Which tokens of all scales an edit keeps.

    At the last scale a token is drawn anew if the mask touches any pixel of its patch. That map is resized to the
    coarser scales (bilinear, not antialiased), where a token is kept from one half on. A scale of a single token is
    kept whatever the mask, as published: even an edit of the whole picture keeps its mean colour.

    Args:
      mask: (B,S,S) bool, S a multiple of the ladder's last side.

    Returns:
      (B,L) bool.
    """
    batch, size, full = mask.shape[0], mask.shape[1], ladder.sides[-1]
    patch = size // full
    finest = ~mask.reshape(batch, full, patch, full, patch).any(axis=(2, 4))
    keep = []
    for side in ladder.sides:
        weights = _bilinear_weights(full, side)
        resized = weights @ finest @ weights.T
        keep.append((2 * resized >= (2 * side) ** 2) | (side == 1))
    return np.concatenate([scale.reshape(batch, -1) for scale in keep], axis=1)


@functools.cache
def _bilinear_weights(source: int, target: int) -> np.ndarray:
    """(target, source) int64: linear interpolation at half-pixel centres, target ≤ source, times 2·target.

    In whole numbers one half is one half, so that mirrored masks keep mirrored tokens.
    """
    weights = np.zeros((target, source), np.int64)
    for i in range(target):
        below, above = divmod((2 * i + 1) * source - target, 2 * target)  # the centre, in units of 1/(2·target)
        weights[i, below] = 2 * target - above
        if above:
            weights[i, below + 1] = above
    return weights


def composite(edited: np.ndarray, originals: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
    """The originals outside the mask, bit for bit; inside it the edited pictures, blended in towards its rim.

    An edited pixel's weight is 1/(feather+1) at the rim and rises by as much with every pixel further in: the mean of
    the mask and its first `feather` erosions. The picture's own border is no rim.

    Args:
      edited, originals: (B,S,S,3) float32 in [0,1]. mask: (B,S,S) bool. feather: width of the seam in pixels, ≥ 0; 0
        is a hard edge.

    Returns:
      (B,S,S,3) float32 in [0,1].
    """
    eroded, depth = mask, mask.astype(np.float32)
    for _ in range(min(feather, mask.shape[1])):
        eroded = _eroded(eroded)
        depth += eroded
    weight = np.where(eroded, 1, depth / (min(feather, 2**31) + 1))[..., None].astype(np.float32)
    blend = weight * edited + (1 - weight) * originals
    return np.where(mask[..., None], blend, originals)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """(B,S,S) bool without the pixels that have a neighbour, of eight, outside of it."""
    for axis in (1, 2):
        padding = [(1, 1) if i == axis else (0, 0) for i in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, padding, constant_values=True), 3, axis)
        mask = windows.all(axis=-1)
    return mask
