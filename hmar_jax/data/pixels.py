"""An open picture of any kind of pixel → 8-bit RGB.

16 bits. Pillow keeps 16-bit grey, and of 16-bit colours the high bytes. A file may state that its samples fill fewer
bits, as cameras of 12 bits do: a TIFF by BitsPerSample, or by a MaxSampleValue of 2^n−1; a PNG by its sBIT chunk. They
are then scaled by what is stated. Nothing is concluded from how bright a picture is: without such a statement a dark
one stays dark.

Alpha. Transparent parts are laid on a background. In BMP, TGA and ICO files alpha is often a byte that nobody wrote:
where it is 0 everywhere, the picture is opaque.

Axis letters: H, W height and width of the picture as it is stored, C its channels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from hmar_jax.data import metadata

_FULL = 2**16 - 1
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _MAX_SAMPLE, _S_MAX_SAMPLE = 258, 262, 284, 281, 341  # tags of TIFF
_ALPHA_UNUSED = ("BMP", "DIB", "TGA")
_COLOURS_OF_16_BITS = r"(RGB[AX]?|R);16[BLN]"  # in Pillow's words, also of planes


class UnknownRangeError(Exception):
    """Samples of which nothing says which of them is white; the message is the mode of Pillow that holds them."""


def rgb(picture: Image.Image, again: Callable[[], Image.Image], file: BinaryIO, background: str) -> Image.Image:
    """A picture as an RGB image, as it is stored: not yet turned.

    Args:
      picture: opened by Pillow, not yet loaded. again: opens it again, where 16-bit colours must be read in full.
      file: its bytes. background: colour that transparent parts are laid on.

    Raises:
      UnknownRangeError: floating point, or 32 bits. Whatever Pillow raises for broken bytes.
    """
    layout = _layout(picture)
    picture.load()
    top, key = _stated_top(picture, file, layout), picture.info.get("transparency")
    if picture.mode == "F" or (picture.mode == "I" and top is None and picture.format not in ("PNG", "PPM")):
        raise UnknownRangeError(picture.mode)
    if picture.mode[0] == "I":
        return _flat(_eight_bits(np.asarray(picture)[..., None], picture, top, key), background)
    if re.fullmatch(_COLOURS_OF_16_BITS, layout) and (top is not None or key is not None):
        samples = np.asarray(picture).astype(np.uint16) << 8 | _low_bytes(again(), layout)
        return _flat(_eight_bits(samples, picture, top, key), background)
    if layout in ("L;2", "L;4") and isinstance(key, int):  # the samples were scaled to 8 bits, their key was not
        picture.info["transparency"] = key * (255 // (2 ** int(layout[2:]) - 1))
    return _flat(picture, background, _has_unused_alpha(picture))


def _flat(image: Image.Image, background: str, alpha_unused: bool = False) -> Image.Image:
    if image.mode == "P" and image.palette is None:  # of a PNG in an ICNS; Pillow has it elsewhere
        return image.convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if alpha_unused and image.getchannel("A").getextrema()[1] == 0:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def _layout(picture: Any) -> str:
    """Pillow's name of how samples are stored, such as RGB;16B; it is known until the picture is loaded."""
    arguments = picture.tile[0][3] if picture.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _eight_bits(samples: np.ndarray, picture: Image.Image, top: int | None, key: Any) -> Image.Image:
    """Samples (H,W,C), C = 1, 3 or 4, as an image of 8 bits; `top` is white, pixels equal to `key` are transparent."""
    samples = samples.astype(np.int32)
    transparent = None if key is None else (samples == np.asarray(key)).all(-1)
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.tag_v2.get(_PHOTOMETRIC) == 0:
        samples = (top or _FULL) - samples  # 0 is white
    if top is None or not _fills(samples, top, picture.format):
        eight = samples >> 8
    else:
        eight = (samples * 255 + top // 2) // top
    eight = eight.clip(0, 255).astype(np.uint8)
    if transparent is not None:
        colours = np.broadcast_to(eight[..., :3], (*transparent.shape, 3))
        eight = np.concatenate([colours, np.where(transparent, 0, 255)[..., None].astype(np.uint8)], -1)
    return Image.fromarray(eight[..., 0] if eight.shape[-1] == 1 else eight)


def _fills(samples: np.ndarray, top: int, format: str | None) -> bool:
    """Whether samples of 16 bits lie from 0 to `top`, as the file states; a PNG may have them in the highest bits."""
    shifted = format == "PNG" and not (samples & (_FULL // (top + 1))).any()
    return not shifted and samples.min(initial=0) >= 0 and samples.max(initial=0) <= top


def _stated_top(picture: Image.Image, file: BinaryIO, layout: str) -> int | None:
    """The sample that stands for white, where the file states one below 2^16−1."""
    bits: list[int] = []
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        if layout == "I;12":
            return 2**12 - 1
        stated = picture.tag_v2.get(_MAX_SAMPLE, picture.tag_v2.get(_S_MAX_SAMPLE))
        tops = set(stated if isinstance(stated, tuple) else [stated])
        # Some write the brightest sample there instead, which is no range.
        bits = [n for n in range(9, 16) if tops == {2**n - 1}]
    elif picture.format == "PNG" and ";16" in layout:
        for kind, start, length in metadata.png_chunks(file):
            if kind == b"sBIT" and length <= 4:
                file.seek(start)
                bits = [max(file.read(length), default=16)]
    return 2 ** bits[0] - 1 if bits and 0 < bits[0] < 16 else None


def state_planes(picture: Any) -> None:
    """Says of the planes of an open TIFF, one for each colour, that they have 16 bits: Pillow takes them for 8."""
    if picture.tag_v2.get(_PLANAR) == 2 and set(picture.tag_v2.get(_BITS_PER_SAMPLE, ())) == {16}:
        order = "B" if picture.tag_v2.prefix == b"MM" else "L"
        _relabel(picture, lambda layout: f"{layout};16{order}" if len(layout) == 1 else layout)


def _low_bytes(picture: Any, layout: str) -> np.ndarray:
    """The low bytes of 16-bit colours: what Pillow takes for high ones if it is told the other order of bytes."""
    other = "L" if layout[-1].replace("N", sys.byteorder[0].upper()) == "B" else "B"
    _relabel(picture, lambda layout: layout[:-1] + other)
    picture.load()
    return np.asarray(picture)


def _relabel(picture: Any, change: Callable[[str], str]) -> None:
    """Changes Pillow's names of how the samples of an open picture are stored."""
    picture.tile = [
        tile._replace(args=change(tile.args) if isinstance(tile.args, str) else (change(tile.args[0]), *tile.args[1:]))
        for tile in picture.tile
    ]


def _has_unused_alpha(picture: Any) -> bool:
    if picture.format == "ICO":  # a PNG inside means its alpha
        picture.ico.buf.seek(picture.ico.entry[0].offset)
        return picture.ico.buf.read(4) != b"\x89PNG"
    return picture.format in _ALPHA_UNUSED
