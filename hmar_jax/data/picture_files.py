"""a picture file → (H,W,3) uint8, upright: the one place that reads pictures.

The formats are named, because Pillow picks a format by the content of a file, whatever its name, and some are no
pictures to be read without a care: PostScript and WMF start other programs, others are documents or films.

Axis letters: H, W height and width of the picture as it is stored.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from hmar_jax.data import metadata, pixels
from hmar_jax.errors import InputError, reason
from hmar_jax.files import check_refusal, refusal

MOST_PIXELS = 2**30 // 12  # Pillow's own limit: ¼ GiB of RGB
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI", "ICO", "ICNS"),
    *("DDS", "SGI", "SUN", "PCX", "PSD", "TGA"),  # TGA last: it has no magic number
)
_WRONG_LINKS = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
_PILLOW = r"PIL\."
_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # what Pillow may have been built without


class _FolderError(ValueError):
    """A folder where a picture is expected."""


class BrokenPictureError(InputError):
    """A picture that cannot be used.

    Attributes:
      name: what it is called. fault: what is wrong with it, e.g. "cannot be read (…)".
    """

    name = fault = ""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read, in Pillow's words."""
    Image.init()
    return tuple(f for f in _FORMATS if f in Image.OPEN and (f not in _NEEDS or features.check(_NEEDS[f])))


@functools.cache
def endings() -> tuple[str, ...]:
    """The endings of these formats, in lower case, with their dots."""
    known = {*formats(), "MPO"}  # JPEG files with further pictures, which the JPEG reader leaves alone
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in known))


def decode(file: str | os.PathLike[str] | io.BytesIO, name: str, background: str = "white") -> np.ndarray:
    """A picture file as (H,W,3) uint8, turned upright as its EXIF data asks.

    Metadata that cannot be read do not matter: the picture is then as it is stored.

    Args:
      file: path or open file, of one of `formats()`; of an animation, the first frame.
      name: what an error calls it, e.g. "Picture 'a.png'". background: colour that transparent parts are laid on.

    Raises:
      BrokenPictureError: it is missing, corrupt, cut short, too large, in floating point, or may not be read.
      TransientError: the disk refuses.
    """
    try:
        with _opened(file) as stream:
            return _read(stream, background)
    except pixels.UnknownRangeError as error:
        raise _broken(
            name, f"has pixels of mode {str(error)!r}, of no known range", "save it with 8 or 16 bits a channel"
        ) from None
    except Image.DecompressionBombError:
        raise _broken(name, f"has more than {MOST_PIXELS} pixels", "make it smaller") from None
    except UnidentifiedImageError:
        fault = "cannot be read (it is no picture, or of a format that is not read here)"
        raise _broken(name, fault, "replace it or take it away") from None
    # Pillow's plugins raise nearly anything for broken bytes: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        refused = refusal(error)
        if isinstance(refused, PermissionError):
            raise _broken(name, f"may not be read ({refused})", "check its permissions") from error
        if refused is None or refused.errno not in _WRONG_LINKS:
            check_refusal(name, error)
        remedy = "give a file, not a folder" if isinstance(error, _FolderError) else "replace it or take it away"
        raise _broken(name, f"cannot be read ({reason(error)})", remedy) from error


def _broken(name: str, fault: str, remedy: str) -> BrokenPictureError:
    error = BrokenPictureError(f"{name} {fault}; {remedy}.")
    error.name, error.fault = name, fault
    return error


@contextlib.contextmanager
def _opened(file: str | os.PathLike[str] | io.BytesIO) -> Iterator[BinaryIO]:
    if isinstance(file, io.BytesIO):
        yield file
        return
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe might never end
        raise _FolderError("it is a folder") if stat.S_ISDIR(status.st_mode) else ValueError("it is no regular file")
    if not status.st_size:
        raise ValueError("it is empty")
    with open(file, "rb") as stream:
        yield stream


def _read(file: BinaryIO, background: str) -> np.ndarray:
    try:
        return _upright(metadata.without(file, bare=False), background)
    except (pixels.UnknownRangeError, Image.DecompressionBombError):
        raise
    except Exception:
        with contextlib.suppress(Exception):
            return _upright(metadata.without(file, bare=True), background)
        raise


def _upright(file: BinaryIO | None, background: str) -> np.ndarray:
    if file is None:
        raise UnidentifiedImageError
    picture = _open(file)
    image = pixels.rgb(picture, lambda: _open(file), file, background)
    return np.asarray(metadata.upright(image, metadata.orientation(picture)))


def _open(file: BinaryIO) -> Image.Image:
    # Pillow's warnings name no file; they are about metadata, and about sizes, which are checked here. The filter is to
    # stand before any that others added meanwhile; adding it again moves it there.
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[2] is not Warning or getattr(first[3], "pattern", "") != _PILLOW:
        warnings.filterwarnings("ignore", category=Warning, module=_PILLOW)
    picture = Image.open(file, formats=formats())
    if picture.width * picture.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        metadata.keep_only_orientation(picture)
    return picture
