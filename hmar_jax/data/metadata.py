"""What stands in a picture file beside the pixels: left out where it hinders reading, and which way is up.

Pillow parses comments, colour profiles, previews and EXIF data before and after the pixels, and refuses the whole file
where one of them is broken or larger than it allows. None of them but the orientation matters here.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import BinaryIO

from PIL import ExifTags, Image, TiffImagePlugin

PNG_START = b"\x89PNG\r\n\x1a\n"
_MOST = 2**16  # bytes of a PNG chunk that is kept for another reason than its pixels
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_KEPT = {  # where the significant bits stand, and where Pillow looks for the orientation: how the chunk begins
    b"sBIT": b"",
    b"eXIf": b"",
    b"iTXt": b"XML:com.adobe.xmp\0",
    b"tEXt": b"Raw profile type exif\0",
    b"zTXt": b"Raw profile type exif\0",
}
_MOST_CHUNKS = 2**20  # of a PNG; libpng writes one for 8 KiB
_MOST_OVERHEAD = 2**16  # bytes that compressed pixels may take beyond twice what they unpack to
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_JPEG_SHORTEST = {0xE0: 14, 0xE1: 0, 0xEE: 12}  # JFIF, EXIF, Adobe: the segments to keep, with their least content
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedError(ValueError):
    """A picture whose checksum is wrong; the message says of what."""


def stated_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height of a picture, where its format has Pillow take memory before it tells them; None of others."""
    file.seek(0)
    start = file.read(30)
    if start.startswith(PNG_START):
        return int.from_bytes(start[16:20]), int.from_bytes(start[20:24])
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X":
        return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:30], "little")
    return None


def without(file: BinaryIO, bare: bool) -> BinaryIO | None:
    """The same picture with less beside its pixels, from the start.

    Chunks that do not fit the file are passed on, so that a picture cut short is still one.

    Args:
      file: an open picture file.
      bare: False leaves out what could be too large, True whatever may fail; None is returned where there is nothing.
    """
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if start.startswith(PNG_START):
        return _png(file, bare)
    if start.startswith((b"GIF87a", b"GIF89a")):
        return _gif(file.read())
    if not bare:
        return file
    if start.startswith(b"\xff\xd8"):
        return _jpeg(file.read())
    if start[4:8] == b"ftyp":  # AVIF: an item of a type that nobody knows is not read
        return io.BytesIO(re.sub(rb"(infe.{8})Exif", rb"\1skip", file.read(), flags=re.DOTALL))
    return None


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture turned and mirrored as EXIF's `orientation` asks; as it is for values other than 2 to 8."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation of a loaded picture, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's parsers raise nearly anything for broken bytes
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def keep_only_orientation(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Hides the other metadata of an open TIFF. To turn it, loading parses EXIF, GPS and XMP data."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = picture.tag_v2.get(ExifTags.Base.Orientation, 1)
    picture.getexif = lambda: exif  # type: ignore[method-assign]
    picture.info.pop("xmp", None)


def png_chunks(file: BinaryIO) -> list[tuple[bytes, int, int]]:
    """The kind, start and length of the content of every chunk of a PNG file, as far as they can be followed.

    Raises:
      DamagedError: there are more chunks than any picture has.
    """
    size = file.seek(0, io.SEEK_END)
    chunks: list[tuple[bytes, int, int]] = []
    at = 8
    while at + 8 <= size and (not chunks or chunks[-1][0] != b"IEND"):
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if not kind.isalpha():
            break
        if len(chunks) == _MOST_CHUNKS:
            raise DamagedError(f"it has more than {_MOST_CHUNKS} chunks")
        chunks.append((kind, at + 8, length))
        at += 12 + length
    return chunks


def _png(file: BinaryIO, bare: bool) -> BinaryIO:
    chunks = png_chunks(file)
    packed = sum(length for kind, _, length in chunks if kind == b"IDAT")
    if packed > _MOST_OVERHEAD + 2 * _png_bytes(file):
        raise DamagedError(f"it has {packed} bytes of compressed pixels, more than they can be")
    kept = [PNG_START]
    for kind, start, length in chunks:
        begins = _PNG_KEPT.get(kind)
        useful = begins is not None and length <= _MOST and not (bare and begins)
        if useful or kind in _PNG_PIXELS:
            file.seek(start - 8)
            chunk = file.read(12 + length)
            whole = zlib.crc32(chunk[4:-4]).to_bytes(4) == chunk[-4:]
            if kind in _PNG_PIXELS and len(chunk) < 12 + length:
                raise DamagedError("it is cut short")
            if kind in _PNG_PIXELS and not whole:  # Pillow checks the others, and not that of IDAT
                raise DamagedError(f"the checksum of its {kind.decode()} chunk is wrong")
            if kind in _PNG_PIXELS or (begins is not None and whole and chunk[8:].startswith(begins)):
                kept.append(chunk)
    return io.BytesIO(b"".join(kept))


def _png_bytes(file: BinaryIO) -> int:
    """How many bytes the pixels of a PNG unpack to, at most: its rows, each with a byte before it."""
    file.seek(16)
    header = file.read(10).ljust(10, b"\0")
    width, height, bits, colour = struct.unpack(">IIBB", header)
    return 2 * height * (2 + width * bits * _PNG_CHANNELS.get(colour, 4) // 8)  # interlaced, it has more rows


def _gif(data: bytes) -> BinaryIO:
    """The first frame of a GIF without comments: Pillow's time for those grows with the square of their length."""

    def blocks_end(at: int) -> int:
        while at < len(data) and data[at]:
            at += 1 + data[at]
        return at + 1

    def after_table(at: int, flags: int) -> int:
        return at + (3 << (flags & 7) + 1 if flags & 0x80 else 0)

    at = after_table(13, data[10] if len(data) > 10 else 0)
    kept = [data[:at]]
    while data[at : at + 1] == b"!":
        end = blocks_end(at + 2)
        if data[at + 1 : at + 2] == b"\xf9":  # how transparent parts are shown
            kept.append(data[at:end])
        at = end
    if data[at : at + 1] == b"," and len(data) > at + 10:
        end = blocks_end(after_table(at + 10, data[at + 9]) + 1)
        kept += [data[at:end], b";" * (end <= len(data))]
    return io.BytesIO(b"".join(kept))


def _jpeg(data: bytes) -> BinaryIO:
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # the pixels
            break
        application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not application or length - 2 >= _JPEG_SHORTEST.get(marker, length):
            kept.append(data[at : at + 2 + length])
        at += 2 + length
    return io.BytesIO(b"".join(kept) + data[at:])
