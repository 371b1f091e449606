"""The structure of JPEG and JPEG 2000 files, bounded before they are decoded.

A progressive JPEG may go over all its pixels in any number of scans, of some bytes each. JPEG 2000 divides a picture
into precincts and code-blocks, for each of which the decoder takes half a KiB at once, whether or not the file has it.
"""

from __future__ import annotations

import re

FORMATS = ("JPEG", "MPO", "JPEG2000", "ICNS")  # in Pillow's words
_MOST_SCANS = 100  # as libtiff has it; encoders write some ten
_MOST_CELLS = 2**18  # of a channel: 64x64, the usual code-blocks, of 2^30 pixels, or 16x16 of 2^26
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")  # of a JPEG, before a length; the others may be among pixels
# Wherever they are in a file, as a tile may have its own: the size of a picture; how it, or a channel, is divided.
_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4})(.{4})(.{4})", re.DOTALL)
_DIVISION = re.compile(
    rb"\xff(?=(?:\x52\x00[\x0c-\x2d]([\x00-\x07]).{3}[\x00\x01]|\x53\x00[\x09-\x2c].{1,2}?([\x00\x01]))"
    rb"([\x00-\x20])([\x00-\x08])([\x00-\x08])[\x00-\x7f][\x00\x01](.{0,33}))",
    re.DOTALL,
)


def scans(data: bytes) -> int:
    """How many scans a JPEG file has, up to its end marker; counted no further than is allowed."""
    at, count = 2, 0
    while count <= _MOST_SCANS and (found := _MARKER.search(data, at)) and found[0] != b"\xff\xd9":
        count += found[0] == b"\xff\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return count


def cells(data: bytes) -> int:
    """The most precincts or code-blocks of a channel of the JPEG 2000 pictures in a file; 0 where there are none."""
    pixels = most = 0
    for numbers in _SIZE.findall(data):
        right, bottom, left, top = map(int.from_bytes, numbers)
        pixels = max(pixels, (right - left) * (bottom - top))
    for own, of_channel, last, width, height, precincts in _DIVISION.findall(data):
        blocks, levels = (width[0] + 2, height[0] + 2), last[0]
        has_precincts = (own or of_channel)[0] & 1
        sizes = [(size & 15, size >> 4) for size in precincts] if has_precincts else []
        sizes += [(15, 15)] * (levels + 1 - len(sizes))
        count = 0
        for level, size in enumerate(sizes[: levels + 1]):
            area = 2 ** sum(map(min, blocks, size))
            count += pixels // (area * 4 ** (levels - level))
        most = max(most, count)
    return most


def fault(data: bytes, format: str | None) -> str:
    """What makes decoding a file of this format, in Pillow's words, take long; empty where nothing does."""
    if format in ("JPEG", "MPO") and scans(data) > _MOST_SCANS:
        return f"has more than {_MOST_SCANS} scans"
    if format in ("JPEG2000", "ICNS") and (found := cells(data)) > _MOST_CELLS:
        return f"has {found} precincts or code-blocks, more than {_MOST_CELLS}"
    return ""
