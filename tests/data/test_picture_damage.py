"""What reading a picture file promises of files made to harm: only formats that are meant, bounded memory and time, and
no pixels that a checksum speaks against."""

import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from picture_bytes import NOISE, RED, chunk, colour, png, read, saved, tiff
from PIL import Image, ImageFile

from hmar_jax.data import picture_files
from hmar_jax.data.picture_files import BrokenPictureError, decode, formats

LARGE = b"a" * (2**21)
PIXELS = np.full((4, 4, 3), RED, np.uint8)


def test_no_format_that_is_read_starts_a_program_or_leaves_decoding_to_a_plugin():
    assert set(formats()) <= {
        *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI", "ICO", "ICNS"),
        *("DDS", "SGI", "SUN", "PCX", "PSD", "TGA"),
    }  # a further one is to be looked at first
    for name in formats():
        plugin = Image.OPEN[name][0]
        assert not (isinstance(plugin, type) and issubclass(plugin, ImageFile.StubImageFile))


FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "dos eps": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 80) + bytes(20) + b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(60),
    "pdf": b"%PDF-1.4\n1 0 obj\n",
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHI", 0, 0, 9, 9, 72, 0) + b"\0\0\1\0\x09\0\0\3" + bytes(60),
    "emf": b"\1\0\0\0" + struct.pack("<I", 108) + bytes(32) + b" EMF" + bytes(70),
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "grib": b"GRIB" + bytes(3) + b"\1" + bytes(100),
    "bufr": b"BUFR" + bytes(100),
    "cursor": b"\0\0\2\0\1\0" + bytes([4, 4, 0, 0, 4, 0, 4, 0, 0, 0, 24, 0, 22, 0, 0, 0]) + bytes(100),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "ico", "psd", "eps"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_picture_of_a_named_format_is_not_opened_whatever_its_name(tmp_path, kind, ending):
    file = tmp_path / f"a.{ending}"
    file.write_bytes(FOREIGN[kind])
    with pytest.raises(BrokenPictureError, match=r"it is no picture, or of a format that is not read here"):
        decode(file, "Picture")


def test_postscript_named_as_a_picture_is_not_opened(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda self: pytest.fail("it was opened"))
    with pytest.raises(BrokenPictureError, match=r"a\.png' cannot be read \(it is no picture.*replace it"):
        decode(file, f"Picture '{file}'")


@pytest.mark.parametrize("fault", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_refused_at_once(tmp_path, fault):
    path = tmp_path / "a.png"
    {"folder": os.mkdir, "pipe": os.mkfifo, "loop": lambda at: os.symlink(at, at)}[fault](path)
    with pytest.raises(BrokenPictureError, match=r"folder|regular file|symbolic links"):
        decode(path, "Picture")


def test_a_picture_of_too_many_pixels_is_refused_in_one_sentence(monkeypatch):
    data = saved(Image.new("RGB", (40, 30), RED), "PNG")
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 1199)
    with pytest.raises(BrokenPictureError, match=r"has 40x30, more than 1199 pixels; make it smaller\.$"):
        read(data)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow's own warning
    assert colour(data) == RED
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow's own error
    with pytest.raises(BrokenPictureError, match="pixels; make it smaller"):
        read(data)


def webp_canvas(width, height):
    """An animation whose one frame has 16x16 pixels."""
    whole = saved(Image.new("RGB", (16, 16), RED), "WEBP", lossless=True)
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes([100, 0, 0, 0]) + whole[12:]
    body = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + size + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def png_header(width, height, packed=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", packed or zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def in_icon(data):
    return b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0]) + struct.pack("<II", len(data), 22) + data


def in_icns(data):
    return b"icns" + struct.pack(">I", 16 + len(data)) + b"ic07" + struct.pack(">I", 8 + len(data)) + data


def bmp_header(width, height, data, compression=1):
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + sizes + bytes(1024) + data


GIF = saved(Image.new("P", (16, 16)), "GIF")


TILES = [(322, [32768]), (323, [32768]), (324, [8]), (325, [100])]


BOMBS = {
    "png": (png_header(60_000, 60_000), "60000x60000, more than 178956970 pixels"),
    "png of 2^31": (png_header(2**31 - 1, 2**31 - 1), "2147483647x2147483647, more than"),
    "png of 13000": (png_header(13_000, 13_000), "13000x13000 pixels, more than a file of its length"),
    "long png": (png_header(100_000, 1), "a side of more than 65536 pixels"),
    "webp": (webp_canvas(60_000, 60_000), "60000x60000, more than 178956970 pixels"),
    "webp of 12000": (webp_canvas(12_000, 12_000), "12000x12000 pixels, more than a file"),
    "gif": (GIF[:6] + struct.pack("<HH", 60_000, 60_000) + GIF[10:], "3600000000 pixels, more than"),
    "gif of 13000": (GIF[:6] + struct.pack("<HH", 13_000, 13_000) + GIF[10:], "more than a file of its length"),
    "icon": (in_icon(png_header(60_000, 60_000)), "3600000000 pixels, more than"),
    "icns": (in_icns(png_header(60_000, 60_000)), "3600000000 pixels, more than"),
    "bmp": (bmp_header(170_000_000, 1, b"\0\2\0\xff" * 100), "a side of more than"),
    "bmp decoded slowly": (bmp_header(8000, 8000, b"\1\1\0\0" * 8000), "8000x8000, for this kind more than 16777216"),
    "tiff tiles": (tiff(np.zeros((16, 16, 1)), tags=TILES), "tiles of 32768x32768, more than"),
    "pixels of a small png": (png_header(4, 4, bytes(2**20)), "1048576 bytes of compressed pixels, more than they"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_size_that_a_small_file_claims_takes_no_memory(bomb):
    data, expected = BOMBS[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(BrokenPictureError, match=expected):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_large_photograph_is_within_the_bounds(format):
    """Sizes alone: decoding 108 million pixels takes seconds."""
    whole = saved(NOISE.convert("P") if format == "GIF" else NOISE, format)
    picture_files._check_size(12_000, 9_000, io.BytesIO(whole * (10**6 // len(whole))))
    picture_files._check_size(16_000, 11_000, io.BytesIO(whole * (10**6 // len(whole))))


def test_a_large_plain_picture_is_read():
    assert read(saved(Image.new("L", (9000, 8000), 7), "PNG")).shape == (8000, 9000, 3)


def test_a_file_larger_than_any_picture_is_refused_at_once(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.write(saved(NOISE, "PNG"))
        file.truncate(2**40)
    with pytest.raises(BrokenPictureError, match=r"has 1099511627776 bytes, more than 2147483648; make it smaller"):
        decode(tmp_path / "a.png", "Picture")


def test_comments_of_a_gif_cost_no_time():
    at = GIF.index(b",", 13)
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 2**16 + b"\0"  # 16 MiB, for which Pillow takes a minute
    code = "import sys; from pathlib import Path; from hmar_jax.data.picture_files import decode\n"
    code += "import io; decode(io.BytesIO(sys.stdin.buffer.read()), 'a')"
    subprocess.run([sys.executable, "-c", code], input=GIF[:at] + comment + GIF[at:], check=True, timeout=25)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    "format",
    [
        *("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "TGA", "PPM", "PCX", "SGI", "QOI", "ICO"),
        *("JPEG2000", "DDS"),
    ],
)
def test_a_picture_cut_short_is_refused(format, share):
    data = saved(NOISE, format)
    with pytest.raises(BrokenPictureError, match="cannot be read"):
        read(data[: int(len(data) * share)])


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_any_flipped_bit_of_the_pixels_of_a_png_is_refused():
    data = saved(NOISE.resize((8, 8)), "PNG")
    start = data.index(b"IDAT") - 4
    for at in range(start, len(data) - 12):
        with pytest.raises(BrokenPictureError, match=r"cannot be read"):
            read(flipped(data, at))
    for at in range(8, 8 + 25):  # the header
        with pytest.raises(BrokenPictureError):
            read(flipped(data, at))


def test_a_wrong_checksum_inside_the_compressed_pixels_of_a_png_is_refused():
    packed = bytearray(zlib.compress(b"\0" + PIXELS[0].tobytes()))
    assert read(png_header(4, 1, bytes(packed))).shape == (1, 4, 3)
    packed[-1] ^= 1
    with pytest.raises(BrokenPictureError, match="cannot be read"):
        read(png_header(4, 1, bytes(packed)))


def test_what_libtiff_says_of_a_broken_file_does_not_reach_the_terminal(tmp_path, capfd):
    picture = saved(NOISE, "TIFF", compression="tiff_lzw")
    (tmp_path / "a.tif").write_bytes(picture[:500] + bytes(200) + picture[700:])
    with pytest.raises(BrokenPictureError, match="cannot be read"):
        decode(tmp_path / "a.tif", "Picture")
    assert capfd.readouterr() == ("", "")


def test_a_long_name_is_cut_and_its_control_characters_are_escaped():
    with pytest.raises(BrokenPictureError) as caught:
        decode(io.BytesIO(b"nonsense"), "Picture '\x1b[2J\n" + "a" * 5000 + "'")
    assert len(str(caught.value)) < 600
    assert caught.value.name.isprintable()


def test_a_png_cut_short_is_refused_even_if_its_metadata_are_broken():
    data = png(np.asarray(NOISE), before=[chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE))])
    with pytest.raises(BrokenPictureError, match="cannot be read"):
        read(data[:-2000])


# --- few bytes that take long


def with_scans(count):
    """A progressive JPEG whose shortest scan is there `count` times more."""
    data = saved(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    starts = [match.start() for match in re.finditer(b"\xff\xda", data)]
    ends = [re.compile(b"\xff[^\0]").search(data, start + 2).start() for start in starts]
    start, end = min(zip(starts, ends, strict=True), key=lambda scan: scan[1] - scan[0])
    return data[:end] + data[start:end] * count + data[end:]


def test_a_jpeg_of_many_scans_is_not_decoded():
    assert decode(io.BytesIO(with_scans(20)), "x").shape == (64, 64, 3)
    with pytest.raises(BrokenPictureError, match=r"x has more than 100 scans; make it smaller\."):
        decode(io.BytesIO(with_scans(100)), "x")


def jpeg2000(side, blocks=b"\4\4", precincts=b""):
    """JPEG 2000 of one resolution that says to have `side` pixels a side, with other code-blocks and precincts."""
    options = {"no_jp2": True, "num_resolutions": 1}
    data = bytearray(saved(Image.new("L", (64, 64)), "JPEG2000", **options | {"precinct_size": (64, 64)}))
    size, division = data.index(b"\xff\x51"), data.index(b"\xff\x52")
    data[size + 6 : size + 14] = data[size + 22 : size + 30] = struct.pack(">II", side, side)
    data[division + 10 : division + 12] = blocks
    data[division + 14 : division + 15] = precincts or data[division + 14 : division + 15]
    return bytes(data)


CELLS = {
    "small code-blocks": jpeg2000(8000, b"\0\0"),
    "small precincts": jpeg2000(8000, precincts=b"\x11"),
    "behind usual ones": jpeg2000(8000).replace(b"\xff\x5c", b"\xff\x53\0\x0a\0\1\0\4\4\0\1\x11\xff\x5c", 1),
    "within a comment": jpeg2000(8000).replace(
        b"\xff\x52", b"\xff\x64\0\x0b\0\1\xff\x52\0\x0d\1\xff\x53" + b"\0\x0a\0\1\0\4\4\0\1\x11\xff\x52", 1
    ),
}


@pytest.mark.parametrize("case", CELLS)
def test_jpeg_2000_of_many_parts_is_not_decoded(case):
    with pytest.raises(BrokenPictureError, match=r"x has \d+ precincts or code-blocks, more than 262144; make it "):
        decode(io.BytesIO(CELLS[case]), "x")


@pytest.mark.parametrize(
    "options",
    [{}, {"codeblock_size": (4, 4)}, {"precinct_size": (64, 64)}, {"tile_size": (32, 32)}, {"num_resolutions": 1}],
    ids=str,
)
def test_usual_jpeg_2000_is_read(options):
    assert (decode(io.BytesIO(saved(NOISE, "JPEG2000", **options)), "x") == np.asarray(NOISE)).all()
