"""Picture files made by hand, for tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from hmar_jax.data.picture_files import decode

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
RED = (200, 40, 30)


def saved(picture, format, **options):
    data = io.BytesIO()
    picture.save(data, format, **options)
    return data.getvalue()


def chunk(kind, content, crc=None):
    return struct.pack(">I4s", len(content), kind) + content + (crc or zlib.crc32(kind + content).to_bytes(4))


def png(samples, before=(), after=()):
    """A PNG of samples (H,W,C) uint8 or uint16, with further chunks before and after its pixels."""
    samples = np.asarray(samples)
    bits, kind = 8 * samples.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(samples.dtype.newbyteorder(">")).tobytes() for row in samples)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows)), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(samples, bits=16, photometric=1, tags=(), strips=1):
    """A TIFF of samples (H,W,C) uint16, or of packed bytes of `bits` with the shape (H,W,1) given by `samples`.

    Args:
      strips: parts of equal length that the samples are in; 0 puts every channel into a plane of its own.
    """
    height, width, channels = samples.shape
    data = (samples if strips else samples.transpose(2, 0, 1)).astype("<u2").tobytes()
    if bits == 12:
        number = "".join(f"{value:012b}" for value in samples.ravel())
        data = int(number, 2).to_bytes(len(number) // 8)
    count = strips or channels
    length = len(data) // count
    entries = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 277: [channels]}
    entries |= {273: [8 + i * length for i in range(count)], 279: [length] * count, 278: [height // (strips or 1)]}
    entries |= {284: [1 if strips else 2], **dict(tags)}
    start = 8 + len(data)
    end = start + 2 + 12 * len(entries) + 4
    fields, beyond = b"", b""
    for tag, values in sorted(entries.items()):
        content = struct.pack(f"<{len(values)}H", *values)
        if len(content) > 4:
            content, beyond = struct.pack("<I", end + len(beyond)), beyond + content
        fields += struct.pack("<HHI", tag, 3, len(values)) + content.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(entries)) + fields + bytes(4) + beyond


def read(data, **options):
    return decode(io.BytesIO(data), "Picture 'a'", **options)


def colour(data):
    """The one colour of a picture."""
    pixels = read(data)
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(value) for value in pixels[0, 0])
