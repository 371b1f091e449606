"""a picture file → (H,W,3) uint8, upright: the one place that reads pictures.

The formats are named, because Pillow picks a format by the content of a file, whatever its name, and some are no
pictures to be read without a care: PostScript and WMF start other programs, others are documents or films.

Damage. What a file says of its size is compared with bounds before memory is taken. PNG has checksums: a picture whose
checksum is wrong is refused. The other formats have none: a picture cut short is refused, but a changed byte among the
pixels, or an end marker that comes too early in a JPEG, may only show in the picture.

Axis letters: H, W height and width of the picture as it is stored.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from hmar_jax.data import jpeg_streams, metadata, pixels
from hmar_jax.errors import InputError, printable, reason
from hmar_jax.files import check_refusal, refusal

MOST_PIXELS = 2**30 // 6  # ½ GiB of RGB; Pillow itself refuses more
_MOST_SIDE = 2**16  # a JPEG has fewer; for 4 bytes of a BMP or a tile of a TIFF, decoders take memory for many rows
_LARGE, _SPARSE = 2**26, 2**12  # pixels from which a file needs a byte for so many; plain white takes PNG and GIF more
_MOST_IN_PYTHON = 2**24  # pixels of a kind that Pillow decodes in Python, in up to half a minute
_MOST_BYTES = 2**31  # the largest picture with four channels of 16 bits takes 1.4 GB
_MOST_TILE = 2**26  # pixels of a tile of a TIFF, which is decoded whole even if the picture is smaller
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI", "ICO", "ICNS"),
    *("DDS", "SGI", "SUN", "PCX", "PSD", "TGA"),
)
_TGA_END = b"TRUEVISION-XFILE.\0"  # most TGA files end so; they begin with no magic number
_TGA_ENDINGS = (".tga", ".icb", ".vda", ".vst")
_WRONG_LINKS = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
_PILLOW = r"PIL\."
_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # what Pillow may have been built without


class _FolderError(ValueError):
    """A folder where a picture is expected."""


class _TooLargeError(ValueError):
    """A picture beyond the bounds; the message says its size and the bound."""


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
    _silence_libtiff()
    return tuple(f for f in _FORMATS if f in Image.OPEN and (f not in _NEEDS or features.check(_NEEDS[f])))


def _silence_libtiff() -> None:
    """Has libtiff write no errors of its own to stderr, without a file's name (Pillow 12.3 leaves its handler in)."""
    with contextlib.suppress(OSError, AttributeError):  # another system, or Pillow without libtiff
        libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtiff" in line}
        for library in libraries:
            ctypes.CDLL(library).TIFFSetErrorHandler(None)


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
    name = printable(name, 400)
    try:
        with _opened(file) as stream:
            return _read(stream, background)
    except pixels.UnknownRangeError as error:
        raise _broken(
            name, f"has pixels of mode {str(error)!r}, of no known range", "save it with 8 or 16 bits a channel"
        ) from None
    except _TooLargeError as error:
        raise _broken(name, str(error), "make it smaller") from None
    except Image.DecompressionBombError as error:  # a picture inside an icon
        size, most = [*re.findall(r"\d+", str(error)), "too many", MOST_PIXELS][:2]
        raise _broken(name, f"has {size} pixels, more than {most} pixels", "make it smaller") from None
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
    if status.st_size > _MOST_BYTES:
        raise _TooLargeError(f"has {status.st_size} bytes, more than {_MOST_BYTES}")
    with open(file, "rb") as stream:
        yield stream


def _read(file: BinaryIO, background: str) -> np.ndarray:
    if size := metadata.stated_size(file):
        _check_size(*size, file)
    try:
        return _upright(metadata.without(file, bare=False), background)
    except (pixels.UnknownRangeError, metadata.DamagedError, _TooLargeError, Image.DecompressionBombError):
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
    try:
        picture = Image.open(file, formats=_with_magic_numbers())
    except UnidentifiedImageError:
        if not _may_be_tga(file):
            raise
        picture = Image.open(file, formats=("TGA",))
    _check_size(*picture.size, file)
    if picture.tile and picture.tile[0][0] in Image.DECODERS and picture.width * picture.height > _MOST_IN_PYTHON:
        raise _TooLargeError(f"has {picture.width}x{picture.height}, for this kind more than {_MOST_IN_PYTHON} pixels")
    if picture.format in jpeg_streams.FORMATS:
        file.seek(0)
        if fault := jpeg_streams.fault(file.read(), picture.format):
            raise _TooLargeError(fault)
        file.seek(0)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        _check_tiles(picture)
        pixels.state_planes(picture)
        metadata.keep_only_orientation(picture)
    return picture


@functools.cache
def _with_magic_numbers() -> tuple[str, ...]:
    return tuple(f for f in formats() if f != "TGA")


def _may_be_tga(file: BinaryIO) -> bool:
    """Whether a file is named as a TGA or ends as one: by its first bytes, a damaged file of any kind may pass."""
    file.seek(max(file.seek(0, io.SEEK_END) - len(_TGA_END), 0))
    end = file.read(len(_TGA_END))
    file.seek(0)
    return end == _TGA_END or str(getattr(file, "name", "")).lower().endswith(_TGA_ENDINGS)


def _check_size(width: int, height: int, file: BinaryIO) -> None:
    """Raises _TooLargeError where decoding would take more memory than a photograph does."""
    if width * height > MOST_PIXELS:
        raise _TooLargeError(f"has {width}x{height}, more than {MOST_PIXELS} pixels")
    if max(width, height) > _MOST_SIDE:
        raise _TooLargeError(f"has {width}x{height} pixels, a side of more than {_MOST_SIDE} pixels")
    if width * height <= _LARGE:
        return
    at = file.tell()
    length = file.seek(0, io.SEEK_END)
    file.seek(at)
    if width * height > _SPARSE * length:
        raise _TooLargeError(f"has {width}x{height} pixels, more than a file of its length can hold of a photograph")


def _check_tiles(picture: TiffImagePlugin.TiffImageFile) -> None:
    width, height = picture.tag_v2.get(TiffImagePlugin.TILEWIDTH, 1), picture.tag_v2.get(TiffImagePlugin.TILELENGTH, 1)
    if width * height > _MOST_TILE:
        raise _TooLargeError(f"has tiles of {width}x{height}, more than {_MOST_TILE} pixels")
