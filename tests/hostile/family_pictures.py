"""Small pictures of every format, damaged: refused, or of the right kind; of a PNG the very pixels, or none."""

import contextlib
import io
import os
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import damaged
from PIL import Image

from hmar_jax.data import picture_files
from hmar_jax.data.picture_files import BrokenPictureError, decode

NOISE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
MOST = 2**20  # pixels of a damaged picture that are worth the time to decode here


def saved(picture, format, **options):
    data = io.BytesIO()
    picture.save(data, format, **options)
    return data.getvalue()


def chunk(kind, content):
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "maker"
RGB = Image.fromarray(NOISE)
GREY16 = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
ALPHA = Image.fromarray(np.concatenate([NOISE, NOISE[..., :1]], -1))
WHOLE = {
    "png": saved(RGB, "PNG"),
    "png-alpha": saved(ALPHA, "PNG", exif=EXIF),
    "png-palette": saved(RGB.quantize(16), "PNG", transparency=3),
    "png-grey16": saved(GREY16, "PNG"),
    "jpeg": saved(RGB, "JPEG"),
    "jpeg-progressive": saved(RGB, "JPEG", progressive=True, exif=EXIF, comment=b"a" * 50),
    "jpeg-cmyk": saved(RGB.convert("CMYK"), "JPEG"),
    "mpo": saved(RGB, "MPO", save_all=True, append_images=[RGB]),
    "webp": saved(RGB, "WEBP"),
    "webp-lossless": saved(ALPHA, "WEBP", lossless=True, exif=EXIF),
    "webp-animated": saved(RGB, "WEBP", save_all=True, append_images=[ALPHA]),
    "avif": saved(RGB, "AVIF", exif=EXIF),
    "gif": saved(RGB, "GIF", comment=b"a" * 50, transparency=3),
    "gif-animated": saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)], loop=0),
    "bmp": saved(RGB, "BMP"),
    "dib": saved(RGB, "DIB"),
    "bmp-palette": saved(RGB.quantize(16), "BMP"),
    "tiff": saved(RGB, "TIFF"),
    "tiff-lzw": saved(RGB, "TIFF", compression="tiff_lzw", exif=EXIF),
    "tiff-zip": saved(ALPHA, "TIFF", compression="tiff_adobe_deflate"),
    "tiff-jpeg": saved(RGB, "TIFF", compression="jpeg"),
    "tiff-grey16": saved(GREY16, "TIFF"),
    "jpeg2000": saved(RGB, "JPEG2000"),
    "ppm": saved(RGB, "PPM"),
    "pgm16": b"P5 10 12 4095\n" + bytes(240),
    "ppm-text": b"P3 2 2 255\n" + b"1 2 3 " * 4,
    "qoi": saved(RGB, "QOI"),
    "ico": saved(ALPHA, "ICO", sizes=[(10, 12)]),
    "ico-bmp": saved(ALPHA, "ICO", sizes=[(10, 12)], bitmap_format="bmp"),
    "icns": saved(ALPHA.resize((16, 16)), "ICNS"),
    "dds": saved(ALPHA, "DDS"),
    "sgi": saved(RGB, "SGI"),
    "pcx": saved(RGB, "PCX"),
    "tga": saved(ALPHA, "TGA", compression="tga_rle"),
    "tga-raw": saved(RGB, "TGA"),
    "bmp-rle": b"BM"
    + (1078 + 60).to_bytes(4, "little")
    + bytes(4)
    + (1078).to_bytes(4, "little")
    + b"\x28\0\0\0\x0a\0\0\0\x0a\0\0\0\1\0\x08\0\1\0\0\0"
    + bytes(20)
    + bytes(range(256)) * 4
    + b"\x0a\x07\0\0" * 10
    + b"\0\1",
}
EXPECTED = {name: decode(io.BytesIO(data), name) for name, data in WHOLE.items()}


@contextlib.contextmanager
def bounded():
    """Pictures of more than a million pixels are refused as those beyond the bounds are, which saves time here."""
    before = picture_files.MOST_PIXELS
    picture_files.MOST_PIXELS = MOST
    try:
        yield
    finally:
        picture_files.MOST_PIXELS = before


def check(name, content, expected=None):
    """Reads a damaged picture: refused in a sentence, or (H,W,3) uint8; a PNG as `expected`."""
    try:
        with bounded():
            image = decode(io.BytesIO(content), "Picture 'a'")
    except BrokenPictureError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert 0 < image.size <= 3 * MOST
    if expected is not None:
        turned = [np.rot90(expected, turn) for turn in range(4)]  # the orientation is no pixel
        mirrored = [array[:, ::-1] for array in turned]
        assert any(array.shape == image.shape and (array == image).all() for array in turned + mirrored)


@settings(max_examples=settings().max_examples * 20)
@given(data=st.data(), name=st.sampled_from(sorted(WHOLE)))
def test_a_damaged_picture_is_refused_or_of_the_right_kind(data, name):
    content = data.draw(damaged(WHOLE[name]))
    still_png = content.startswith(b"\x89PNG") and (b"tRNS" in content or name != "png-palette")
    check(name, content, EXPECTED[name] if still_png else None)


@settings(max_examples=settings().max_examples * 4)
@given(name=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 0.999))
def test_a_picture_cut_anywhere_is_refused_or_has_all_its_pixels(name, share):
    """Of some formats the last bytes are no pixels."""
    content = WHOLE[name][: int(len(WHOLE[name]) * share)]
    try:
        image = decode(io.BytesIO(content), "Picture")
    except BrokenPictureError as error:
        assert str(error).isprintable()
    else:
        np.testing.assert_array_equal(image, EXPECTED[name])


@settings(max_examples=settings().max_examples * 4)
@given(content=st.binary(max_size=200))
@example(b"\0\0\2\0\1\0\4\4\0\0\4\0\4\0\0\0\x18\0\x16\0\0\0" + bytes(100))
def test_bytes_of_no_format_are_refused(content):
    check("bytes", content)


@pytest.mark.parametrize("header", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF"])
@given(content=st.binary(max_size=100))
def test_bytes_behind_a_magic_number_are_refused(header, content):
    check("header", header + content)


@settings(max_examples=settings().max_examples * 4)
@given(
    kind=st.sampled_from([b"eXIf", b"iTXt", b"tEXt", b"zTXt", b"iCCP", b"sBIT", b"gAMA", b"pHYs", b"acTL", b"abCd"]),
    content=st.binary(max_size=100),
    before=st.booleans(),
)
def test_no_chunk_beside_the_pixels_of_a_png_changes_them(kind, content, before):
    whole = WHOLE["png"]
    at = 33 if before else len(whole) - 12
    check("png", whole[:at] + chunk(kind, content) + whole[at:], EXPECTED["png"])


@given(width=st.integers(0, 2**32 - 1), height=st.integers(0, 2**32 - 1), bits=st.integers(0, 255))
@example(width=60_000, height=60_000, bits=8)
@example(width=2**31 - 1, height=1, bits=16)
def test_any_size_that_a_png_claims_is_refused_without_taking_it(width, height, bits):
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([bits, 2, 0, 0, 0])
    check("png", WHOLE["png"][:8] + chunk(b"IHDR", header) + WHOLE["png"][33:])


def test_reading_leaves_no_trace_on_stderr(capfd):
    for name, data in sorted(WHOLE.items()):
        for share in (0.5, 0.8):
            cut = int(len(data) * share)
            check(name, data[:cut] + os.urandom(16) + data[cut:])
    assert capfd.readouterr() == ("", "")
