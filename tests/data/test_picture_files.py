"""What reading a picture file promises: only formats that are meant, all pixels as they are meant, whatever metadata
stand beside them; cut or broken pixels are refused."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from picture_bytes import RED, chunk, colour, png, read, saved, tiff
from PIL import Image

from hmar_jax.data.picture_files import BrokenPictureError, decode, endings, formats

ORIENTATION = 0x0112


HALVES = Image.new("RGB", (32, 16), "black")  # white on the left
HALVES.paste("white", (0, 0, 16, 16))


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
        pytest.param(
            tiff(np.repeat(TWELVE, 3, -1), photometric=2, tags={281: [4095] * 3}.items(), strips=2), SHOWN, id="strips"
        ),
        pytest.param(
            tiff(np.repeat(TWELVE, 3, -1), photometric=2, tags={281: [4095] * 3}.items(), strips=0), SHOWN, id="planes"
        ),
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


@pytest.mark.parametrize("strips", [0, 1, 2], ids=["planes", "one-strip", "two-strips"])
def test_a_tiff_of_16_bits_is_read_however_its_colours_lie(strips):
    samples = np.random.default_rng(0).integers(0, 2**16, (4, 6, 3), np.uint16)
    assert (read(tiff(samples, photometric=2, strips=strips)) == samples >> 8).all()


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
        (Image.new("RGB", (8, 8), RED).quantize(2), "ICNS", RED),
        (Image.new("LA", (8, 8), (77, 255)), "TIFF", (77, 77, 77)),
    ],
    ids=["cmyk-jpeg", "cmyk-tiff", "ycbcr", "lab", "bilevel", "palette-icns", "grey-alpha"],
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
