"""What reading a picture file promises: only formats that are meant, all pixels as they are meant, whatever metadata
stand beside them; cut or broken pixels are refused."""

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from hmar_jax.data import picture_files
from hmar_jax.data.picture_files import BrokenPictureError, decode, endings, formats

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
RED = (200, 40, 30)
ORIENTATION = 0x0112
HALVES = Image.new("RGB", (32, 16), "black")  # white on the left
HALVES.paste("white", (0, 0, 16, 16))


def saved(picture, format, **options):
    data = io.BytesIO()
    picture.save(data, format, **options)
    return data.getvalue()


def read(data, **options):
    return decode(io.BytesIO(data), "Picture 'a'", **options)


def colour(data):
    """The one colour of a picture."""
    pixels = read(data)
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(value) for value in pixels[0, 0])


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


def tiff(samples, bits=16, photometric=1, tags=()):
    """A TIFF of samples (H,W,C) uint16, or of packed bytes of `bits` with the shape (H,W,1) given by `samples`."""
    height, width, channels = samples.shape
    data = samples.astype("<u2").tobytes()
    if bits == 12:
        number = "".join(f"{value:012b}" for value in samples.ravel())
        data = int(number, 2).to_bytes(len(number) // 8)
    entries = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [0]}
    entries |= {277: [channels], 278: [height], 279: [len(data)], **dict(tags)}
    end = 8 + 2 + 12 * len(entries) + 4
    fields, beyond = [], b""
    for tag, values in sorted(entries.items()):
        content = struct.pack(f"<{len(values)}H", *values)
        if len(content) > 4:
            content, beyond = struct.pack("<I", end + len(beyond)), beyond + content
        fields.append([tag, len(values), content.ljust(4, b"\0")])
    next(field for field in fields if field[0] == 273)[2] = struct.pack("<H2x", end + len(beyond))
    directory = b"".join(struct.pack("<HHI", tag, 3, count) + content for tag, count, content in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4) + beyond + data


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".avif", ".jp2", ".tga", ".ppm", ".ico", ".apng", ".qoi", ".mpo"])
def test_the_endings_of_pictures_are_those_of_pillow(ending):
    assert ending in endings()
    assert set(endings()) < set(Image.registered_extensions())


@pytest.mark.parametrize("ending", [".eps", ".ps", ".pdf", ".wmf", ".emf", ".fits", ".mpg", ".h5", ".grib", ".bufr"])
def test_what_may_start_a_program_or_is_no_picture_has_no_ending(ending):
    assert ending not in endings()


@pytest.mark.parametrize(
    "format", ["BMP", "DIB", "PCX", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP", "AVIF", "JPEG2000"]
)
def test_every_format_is_read_by_its_content(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.abs(read(saved(Image.new("RGB", (16, 12), RED), format, **options)).astype(int) - RED).max() < 5
    assert format in formats()


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
    "bmp decoded slowly": (bmp_header(8000, 8000, b"\1\1\0\0" * 8000), "8000x8000, for this kind more than 33554432"),
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


BROKEN_EXIF = [
    b"garbage!",
    b"II*\0\xff\xff\xff\x7f",
    b"MM\0*\0\0\0\x08\xff\xff",
    b"MM\0*\0\0\0\x08\0\1\1\x12\0\5\0\0\0\1\0\0\xff\xff\0\0\0\0",  # a rational beyond the end
    b"MM\0*\0\0\0\x08\0\1\1\x1a\0\2\0\0\0\x08\0\0\0\x1a\0\0\0\0300 dpi\0",  # a resolution as text
    b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\2" + b"6\0\0\0\0\0\0\0",  # an orientation as text
    b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09\0\0\0\0\0\0",  # an orientation of 9
    b"",
]


@pytest.mark.parametrize("exif", BROKEN_EXIF)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "AVIF"])
def test_exif_that_cannot_be_read_leaves_the_pixels_as_stored(format, exif):
    whole = Image.Exif()
    whole[0x010F] = "x" * 40
    known = whole.tobytes()[6:]
    data = saved(HALVES, format, exif=whole.tobytes())
    assert data.count(known) == 1
    if format == "PNG":
        data = data.replace(chunk(b"eXIf", known), chunk(b"eXIf", exif))
    pixels = read(data.replace(known, exif.ljust(len(known), b"\0")))
    assert pixels.shape == (16, 32, 3)
    assert pixels[:, :12].mean() > 240
    assert pixels[:, 20:].mean() < 15


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_every_format_upright(format, orientation):
    stored = Image.fromarray(np.arange(6 * 4, dtype=np.uint8).reshape(4, 6) * 10).resize((24, 16), 0).convert("RGB")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = read(saved(stored, format, exif=exif)).astype(int)
    array = np.asarray(stored)
    turned = [array, array[:, ::-1], array[::-1, ::-1], array[::-1], array.swapaxes(0, 1)]
    turned += [np.rot90(array, -1), np.rot90(array, 2).swapaxes(0, 1), np.rot90(array)]
    assert np.abs(pixels - turned[orientation - 1]).max() < 40


LARGE = b"a" * (2**21)
PIXELS = np.full((4, 4, 3), RED, np.uint8)
TURNED = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE))],
        [chunk(b"iCCP", b"profile\0\1nonsense")],
        [chunk(b"iCCP", b"profile")],
        [chunk(b"zTXt", b"key\0\0" + zlib.compress(LARGE))],
        [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LARGE))],
        [chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(LARGE))],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LARGE)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\xff\xfe")],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='60'")],
        [chunk(b"tEXt", b"key\0" + LARGE) for _ in range(33)],
        [chunk(b"tEXt", b"transparency\0half"), chunk(b"tEXt", b"bbox\0half")],
        [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nnonsense")],
        [chunk(b"tEXt", b"key\0text", crc=b"none")],
        [chunk(b"pHYs", b"1"), chunk(b"gAMA", b"1"), chunk(b"sRGB", b""), chunk(b"cHRM", b"12345")],
        [chunk(b"acTL", b"1"), chunk(b"fcTL", b"1")],
    ],
    ids=lambda chunks: f"{chunks[0][4:8].decode()}-{chunks[0][8:20]!r}",
)
@pytest.mark.parametrize("where", ["before", "after"])
def test_no_chunk_beside_the_pixels_of_a_png_decides_whether_they_are_read(chunks, where):
    assert colour(png(PIXELS, **{where: chunks})) == RED
    assert read(png(np.resize(PIXELS, (4, 8, 3)), **{where: [*chunks, chunk(b"eXIf", TURNED)]})).shape == (8, 4, 3)


def test_large_text_in_a_png_is_not_kept_in_memory():
    class Counted(io.BytesIO):
        most = 0

        def read(self, size=-1, /):
            content = super().read(size)
            self.most = max(self.most, len(content))
            return content

    file = Counted(png(PIXELS, before=[chunk(b"tEXt", b"key\0" + LARGE)], after=[chunk(b"tEXt", b"key\0" + LARGE)]))
    assert decode(file, "Picture").shape == (4, 4, 3)
    assert file.most < 2**10


@pytest.mark.parametrize(
    "segment",
    [
        (0xE0, b"JFIF"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0"),
        (0xEE, b"Adobe"),
        (0xFE, b"\0" * 60_000),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='\xff'"),
    ],
    ids=str,
)
def test_no_segment_beside_the_pixels_of_a_jpeg_decides_whether_they_are_read(segment):
    marker, content = segment
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = saved(Image.new("RGB", (16, 8), RED), "JPEG", exif=exif)
    data = data[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + data[2:]
    pixels = read(data)
    assert pixels.shape == (16, 8, 3)
    assert np.abs(pixels.astype(int) - RED).max() < 5


def test_broken_directories_of_a_tiff_leave_the_pixels():
    grey = np.full((2, 2, 1), 77 * 257, np.uint16)
    assert colour(tiff(grey, tags={34665: [9], 34853: [60000], 282: [1], 700: [1, 2, 3], 274: [9]}.items())) == (
        77,
        77,
        77,
    )
    assert read(tiff(grey[:, :1], tags={274: [6], 34665: [9]}.items())).shape == (1, 2, 3)


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


def bmp_of_32_bits(alpha):
    """A BITMAPV4HEADER whose masks promise alpha."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 32, 3, 64, 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 122 + 64, 0, 0, 122) + header + bytes([*RED[::-1], alpha]) * 16


def rgba(format, alpha, **options):
    return saved(Image.new("RGBA", (16, 16), (*RED, alpha)), format, **options)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bmp_of_32_bits(0), RED),
        (bmp_of_32_bits(0)[14:], RED),
        (rgba("TGA", 0), RED),
        (rgba("ICO", 0, bitmap_format="bmp"), RED),
        (bmp_of_32_bits(255), RED),
        (rgba("TGA", 255), RED),
        (rgba("PNG", 0), (255, 255, 255)),
        (rgba("WEBP", 0, exact=True), (255, 255, 255)),
        (rgba("ICO", 0), (255, 255, 255)),
    ],
    ids=["bmp", "dib", "tga", "ico", "bmp-opaque", "tga-opaque", "png", "webp", "png-in-ico"],
)
def test_alpha_that_is_zero_everywhere_is_unused_except_in_formats_that_mean_it(data, expected):
    assert colour(data) == expected


def test_alpha_that_is_zero_in_places_is_meant():
    picture = Image.new("RGBA", (4, 4), (*RED, 255))
    picture.putpixel((0, 0), (*RED, 0))
    pixels = read(saved(picture, "TGA"))
    assert (pixels[0, 0] == 255).all()
    assert (pixels[1:] == RED).all()


def test_a_transparent_grey_of_16_bits_is_told_from_its_neighbours():
    grey = np.array([[1000, 1001], [40000, 65535]], np.uint16)[..., None]
    pixels = read(png(grey, before=[chunk(b"tRNS", struct.pack(">H", 1000))]))
    assert pixels[..., 0].tolist() == [[255, 3], [156, 255]]
    assert read(png(grey, before=[chunk(b"tRNS", struct.pack(">H", 1000))]), background="black")[0, 0, 0] == 0


def test_a_transparent_colour_of_16_bits_is_told_from_its_neighbours():
    colours = np.array([[[1000, 2000, 40000], [1001, 2000, 40000]]], np.uint16)
    pixels = read(png(colours, before=[chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 40000))]))
    assert pixels.tolist() == [[[255, 255, 255], [3, 7, 156]]]


def test_alpha_of_16_bits_is_laid_on_the_background():
    samples = np.array([[[65535, 0, 0, 0], [65535, 0, 0, 65535]]], np.uint16)
    assert read(png(samples)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert read(png(samples[..., [1, 3]])).tolist() == [[[255, 255, 255], [0, 0, 0]]]


@pytest.mark.parametrize(("bits", "key", "shown"), [(1, 0, [255, 255]), (2, 1, [0, 255]), (4, 5, [255, 170])])
def test_a_transparent_grey_of_few_bits_is_scaled_as_the_pixels_are(bits, key, shown):
    row = {1: [0b0100_0000], 2: [0b0001_0000], 4: [0x5A]}[bits]
    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", key)), (b"IDAT", zlib.compress(bytes([0, *row])))]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")
    assert read(data)[0, :, 0].tolist() == shown


TWELVE = np.array([[4095, 2048], [16, 1]], np.uint16)[..., None]
SHOWN = [[255, 128], [1, 0]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(tiff(TWELVE, bits=12), SHOWN, id="packed"),
        pytest.param(tiff(TWELVE, tags={281: [4095]}.items()), SHOWN, id="max"),
        pytest.param(tiff(TWELVE, tags={341: [4095]}.items()), SHOWN, id="smax"),
        pytest.param(tiff(TWELVE, tags={281: [4000]}.items()), [[15, 8], [0, 0]], id="brightest"),
        pytest.param(tiff(TWELVE * 2, tags={281: [4095]}.items()), [[31, 16], [0, 0]], id="untrue"),
        pytest.param(tiff(TWELVE), [[15, 8], [0, 0]], id="unsaid"),
        pytest.param(tiff(np.repeat(TWELVE, 3, -1), photometric=2, tags={281: [4095] * 3}.items()), SHOWN, id="colour"),
        pytest.param(png(TWELVE, before=[chunk(b"sBIT", b"\x0c")]), SHOWN, id="png"),
        pytest.param(png(TWELVE << 4, before=[chunk(b"sBIT", b"\x0c")]), SHOWN, id="shifted"),
        pytest.param(png(np.repeat(TWELVE, 3, -1), before=[chunk(b"sBIT", b"\x0c\x0c\x0c")]), SHOWN, id="rgb"),
        pytest.param(
            png(np.repeat(TWELVE << 4, 3, -1), before=[chunk(b"sBIT", b"\x0c\x0c\x0c")]), SHOWN, id="rgb-shifted"
        ),
        pytest.param(png(TWELVE), [[15, 8], [0, 0]], id="png-unsaid"),
        pytest.param(b"P5 2 2 4095\n" + TWELVE.astype(">u2").tobytes(), SHOWN, id="pgm"),
    ],
)
def test_samples_are_scaled_by_the_bits_that_the_file_states_and_never_by_what_they_are(data, expected):
    pixels = read(data)
    assert (pixels == pixels[..., :1]).all()
    np.testing.assert_allclose(pixels[..., 0], expected, atol=1)


def test_a_tiff_of_16_bits_whose_zero_is_white():
    assert read(tiff(np.array([[0, 65535]], np.uint16)[..., None], photometric=0))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_of_unknown_range_are_refused(mode):
    with pytest.raises(BrokenPictureError, match=f"mode '{mode}', of no known range; save it with 8 or 16"):
        read(saved(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize(
    ("picture", "format", "expected"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("YCbCr", (8, 8), (76, 85, 255)), "JPEG", (255, 0, 0)),
        (Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF", (255, 255, 255)),
        (Image.new("1", (8, 8), 1), "TIFF", (255, 255, 255)),
        (Image.new("LA", (8, 8), (77, 255)), "TIFF", (77, 77, 77)),
    ],
    ids=["cmyk-jpeg", "cmyk-tiff", "ycbcr", "lab", "bilevel", "grey-alpha"],
)
def test_colour_spaces_become_rgb(picture, format, expected):
    assert np.abs(np.subtract(colour(saved(picture, format)), expected)).max() < 3


def test_a_palette_with_alpha_is_laid_on_the_background():
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.putpixel((0, 0), 0)
    pixels = read(saved(picture, "PNG", transparency=bytes([0, 128])))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 1] - (np.array(RED) * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (16, 16), shade) for shade in ("red", "blue")]
    pixels = read(saved(frames[0], format, save_all=True, append_images=frames[1:]))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 5


def test_a_broken_picture_travels_between_processes_with_its_name_and_fault():
    with pytest.raises(BrokenPictureError) as caught:
        read(b"nonsense")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name) == (str(caught.value), "Picture 'a'")
    assert again.fault.startswith("cannot be read")


def test_reading_warns_of_nothing():
    exif = Image.Exif()
    exif[0x010F] = "x" * 40
    data = saved(HALVES, "WEBP", exif=exif)
    at = data.index(exif.tobytes()[6:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(data[: at + 8] + b"\xff\xff" + data[at + 10 :])
