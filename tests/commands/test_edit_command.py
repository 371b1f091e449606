"""`hmar-jax edit` writes what `Model.edit` gives, for any region and size of picture; bad input gets a sentence."""

import logging
import os
import struct
import zlib

import jax
import numpy as np
import pytest
import tiny_training as tiny
from PIL import Image

from hmar_jax import from_pretrained
from hmar_jax.commands.main import main
from hmar_jax.sampling import program, regions

SIZE = tiny.SIZE
PICTURE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
WIDE = np.random.default_rng(1).integers(0, 256, (40, 64, 3), dtype=np.uint8)
BOX = np.zeros((SIZE, SIZE), bool)
BOX[3:9, 2:12] = True


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    return tiny.once(tiny.shared_folder(tmp_path_factory) / "starts", tiny.write_starts) / "next_scale"


@pytest.fixture
def run(model_directory, tmp_path, capsys):
    """Runs the command on files of `tmp_path`; its exit code, and what it said."""
    logging.getLogger("hmar_jax").setLevel(logging.WARNING)
    for name, pixels in {
        "p.png": PICTURE,
        "wide.png": WIDE,
        "ones.png": BOX.astype(np.uint8),
        "black.png": np.zeros((SIZE, SIZE), np.uint8),
        "mask.png": np.where(BOX, 255, 0).astype(np.uint8),
    }.items():
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    whole = (tmp_path / "p.png").read_bytes()
    at = whole.index(b"IDAT") + 20
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    huge = whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:]
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for name, content in {"broken": whole[:50], "flipped": flipped, "huge": huge, "eps": b"%!PS-Adobe-3.0"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")

    def command(image, *options):
        files = [f"--image={tmp_path / image}", f"--output={tmp_path / 'out' / 'e.png'}"]
        filled = [option.format(tmp=tmp_path) for option in options]
        capsys.readouterr()
        return main(["edit", f"--model={model_directory}", *files, *filled]), *capsys.readouterr()

    return command


def read(folder):
    return {file.name: np.asarray(Image.open(file)) for file in (folder / "out").iterdir()}


def cells(grid, number):
    return [grid[2 : 2 + SIZE, 2 + i * (SIZE + 2) : 2 + i * (SIZE + 2) + SIZE] for i in range(number)]


@pytest.mark.parametrize(
    ("region", "mask"), [("--box=2,3,12,9", BOX), ("--keep=2,3,12,9", ~BOX), ("--mask={tmp}/mask.png", BOX)]
)
def test_the_region_is_drawn_anew_and_the_rest_of_the_file_is_untouched(run, model_directory, tmp_path, region, mask):
    code, said, _ = run("p.png", region, "--label=B", "--composite", "--seed=5", "--cfg=2")
    assert code == 0
    assert said == f"e.png and e-grid.png (input, mask, results) are in {tmp_path / 'out'}\n"
    written = read(tmp_path)
    assert written.keys() == {"e.png", "e-grid.png"}
    result = written["e.png"]
    np.testing.assert_array_equal(result[~mask], PICTURE[~mask])
    assert (result[mask] != PICTURE[mask]).any()
    out = from_pretrained(model_directory).edit(PICTURE, mask, 1, seed=5, cfg=2, composite=True)
    np.testing.assert_array_equal(result, np.floor(out.images[0] * 255 + 0.5))
    given, holed, drawn = cells(written["e-grid.png"], 3)
    np.testing.assert_array_equal(given, PICTURE)
    np.testing.assert_array_equal(holed, np.where(mask[..., None], 128, PICTURE))
    np.testing.assert_array_equal(drawn, result)


def test_variants_have_a_file_each_and_one_grid(run, model_directory, tmp_path):
    code, said, _ = run("p.png", "--box=2,3,12,9", "--variants=3", "--label=B", "--top-k=0", "--top-p=1")
    assert code == 0
    assert said.startswith("e-0.png e-1.png e-2.png and e-grid.png ")
    written = read(tmp_path)
    assert written.keys() == {"e-0.png", "e-1.png", "e-2.png", "e-grid.png"}
    out = from_pretrained(model_directory).edit(PICTURE, BOX, 1, variants=3, top_k=0, top_p=1.0)
    for i, cell in enumerate(cells(written["e-grid.png"], 5)[2:]):
        np.testing.assert_array_equal(written[f"e-{i}.png"], np.floor(out.images[i] * 255 + 0.5))
        np.testing.assert_array_equal(cell, written[f"e-{i}.png"])
    assert (written["e-0.png"] != written["e-1.png"]).any()


def test_results_have_the_name_that_was_given_and_replacing_them_is_said(run, tmp_path, caplog):
    options = ["p.png", "--box=2,3,12,9", "--label=B", "--cfg=2", "--output={tmp}/out/o.PNG"]
    code, said, _ = run(*options)
    assert (code, said) == (0, f"o.PNG and o-grid.PNG (input, mask, results) are in {tmp_path / 'out'}\n")
    assert read(tmp_path).keys() == {"o.PNG", "o-grid.PNG"}
    with caplog.at_level(logging.INFO, "hmar_jax"):
        assert run(*options)[0] == 0
    assert f"Replacing {tmp_path}/out/o.PNG, {tmp_path}/out/o-grid.PNG." in caplog.messages


def region(tmp_path, pixels, **given):
    """The model-size picture and mask that the command makes of a file and a region."""
    file = tmp_path / "picture.png"
    Image.fromarray(pixels).save(file)
    return regions.to_square(*regions.picture_and_mask(file, **given), SIZE)


def test_of_a_wide_picture_the_middle_is_taken_and_its_region_goes_along(tmp_path):
    white = np.zeros_like(WIDE)
    white[10:30, 25:64] = 255
    image, mask = region(tmp_path, white, box="25,10,64,30")
    expected = np.zeros((SIZE, SIZE), bool)
    expected[4:12, 5:] = True  # at 2/5, the first column of the middle being 12
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(image[..., 0] > 127, expected)
    middle, _ = region(tmp_path, WIDE, box="25,10,64,30")
    resized = Image.fromarray(WIDE[:, 12:52]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(middle, resized)


def test_padding_shrinks_the_picture_and_draws_around_it(tmp_path):
    half = np.where(np.arange(20) < 10, 40, 200).astype(np.uint8)
    image, mask = region(tmp_path, np.broadcast_to(half[:, None], (20, 20, 3)), pad=6)  # to 32, shrunk to 16
    kept = np.ones((SIZE, SIZE), bool)
    kept[3:13, 3:13] = False
    np.testing.assert_array_equal(mask, kept)
    # The halves go on to the border: edges are repeated. Lanczos rings where they meet, in the middle.
    np.testing.assert_array_equal(image[:, :5], 40)
    np.testing.assert_array_equal(image[:, 11:], 200)


@pytest.mark.parametrize("shape", [(40, 64), (512, 700), (600, 511), (11, 9)], ids=str)
def test_a_region_of_one_pixel_is_drawn_whatever_the_size_of_the_picture(tmp_path, shape):
    side = min(shape)
    for place in (0, side // 3, side // 2, side - 1):
        row, column = (place + (length - side) // 2 for length in shape)
        _, mask = region(tmp_path, np.zeros((*shape, 3), np.uint8), box=f"{column},{row},{column + 1},{row + 1}")
        assert mask.any()
        found = np.argwhere(mask)
        assert (np.abs((found + 0.5) / SIZE - (place + 0.5) / side) < 0.5 / SIZE + 0.5 / side).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_of_a_mask_with_transparency_only_what_is_painted_white_is_drawn(tmp_path, mode):
    stroke = Image.new(mode, (SIZE, SIZE))  # all transparent
    white = (255,) * len(mode)
    stroke.paste(white, (2, 3, 12, 9))
    stroke.paste((0,) * (len(mode) - 1) + (255,), (13, 0, 16, 4))
    stroke.save(tmp_path / "stroke.png")
    _, mask = region(tmp_path, PICTURE, mask=tmp_path / "stroke.png")
    np.testing.assert_array_equal(mask, BOX)


BAD = {
    "no such picture": ("none.png", ["--box=0,0,4,4"], "none.png' cannot be read"),
    "a picture cut short": ("broken.png", ["--box=0,0,4,4"], "broken.png' cannot be read"),
    "no such mask": ("p.png", ["--mask={tmp}/none.png"], "Mask '{tmp}/none.png' cannot be read"),
    "a mask of another size": (
        "wide.png",
        ["--mask={tmp}/mask.png"],
        "has 16x16 pixels, the picture 64x40; make it as",
    ),
    "three numbers": ("p.png", ["--box=1,2,3"], "Box '1,2,3' is not left,top,right,bottom in whole pixels"),
    "no numbers": ("p.png", ["--keep=all"], "Box 'all' is not left,top,right,bottom"),
    "an empty word": ("p.png", ["--box="], "Box '' is not left,top,right,bottom"),
    "an empty box": ("p.png", ["--box=4,4,4,8"], "Box 4,4,4,8 is not left < right, top < bottom inside 0,0,16,16"),
    "a box outside": ("p.png", ["--keep=0,0,17,8"], "Box 0,0,17,8 is not left < right"),
    "a box that is cropped away": ("wide.png", ["--box=0,0,12,40"], "Nothing is to be drawn anew in the middle square"),
    "no padding": ("p.png", ["--pad=0"], "--pad is 0; expected 1 to 4096 pixels"),
    "a label of no class": ("p.png", ["--box=0,0,4,4", "--label=Q"], "Label 'Q' is not a class of this model"),
    "a label too high": ("p.png", ["--box=0,0,4,4", "--label=7"], "Label 7 is out of range"),
    "two labels": ("p.png", ["--box=0,0,4,4", "--label=A,B"], "--label is A,B; expected one class"),
    "no variants": ("p.png", ["--box=0,0,4,4", "--variants=0"], "--variants is 0; expected 1 to 10000"),
    "a feather below 0": (
        "p.png",
        ["--box=0,0,4,4", "--feather=-1"],
        "feather is -1; expected a whole number, 0 or more",
    ),
    "an unknown schedule": ("p.png", ["--box=0,0,4,4", "--schedule=quick"], "quick"),
    "masked steps": ("p.png", ["--box=0,0,4,4", "--schedule=small"], "needs a mask branch"),
    "another format": ("p.png", ["--box=0,0,4,4", "--output=e.jpg"], "--output is e.jpg; pictures are written as PNG"),
    "a folder for a picture": ("", ["--box=0,0,4,4"], "; give a file, not a folder."),
    "a folder for a mask": (
        "p.png",
        ["--mask={tmp}"],
        "Mask '{tmp}' cannot be read (it is a folder); give a file, not a folder.",
    ),
    "a mask of 0 and 1": (
        "p.png",
        ["--mask={tmp}/ones.png"],
        "Mask '{tmp}/ones.png' leaves nothing to draw: its brightest pixel is 1 of 255. What is to be drawn anew is "
        "white (128 or more), the rest black; save the mask so.",
    ),
    "a mask of a flipped byte": ("p.png", ["--mask={tmp}/flipped.png"], "the checksum of its IDAT chunk is wrong"),
    "a picture of a flipped byte": ("flipped.png", ["--box=0,0,4,4"], "the checksum of its IDAT chunk is wrong"),
    "a mask of too many pixels": ("p.png", ["--mask={tmp}/huge.png"], "has 60000x60000, more than 178956970 pixels"),
    "a pipe for a mask": ("p.png", ["--mask={tmp}/pipe.png"], "Mask '{tmp}/pipe.png' cannot be read (it is no regular"),
    "a device for a picture": ("/dev/zero", ["--box=0,0,4,4"], "Picture '/dev/zero' cannot be read (it is no regular"),
    "postscript for a mask": ("p.png", ["--mask={tmp}/eps.png"], "it is no picture, or of a format that is not read"),
    "a name of 300 letters": ("a" * 300 + ".png", ["--box=0,0,4,4"], "File name too long"),
    "a black mask": ("p.png", ["--mask={tmp}/black.png"], "its brightest pixel is 0 of 255. What is to be"),
    "too many variants": (
        "p.png",
        ["--box=0,0,4,4", "--variants=30000000"],
        "--variants is 30000000; expected 1 to 10000",
    ),
    "no finite guidance": (
        "p.png",
        ["--box=0,0,4,4", "--label=B", "--cfg=inf"],
        "cfg is inf; expected a finite number",
    ),
    "no finite guidance, and no label": (
        "p.png",
        ["--box=0,0,4,4", "--cfg=inf"],
        "cfg is inf; expected a finite number",
    ),
    "an output that is a folder": (
        "p.png",
        ["--box=0,0,4,4", "--output={tmp}/folder.png"],
        "--output names {tmp}/folder.png, which is a folder; give a file.",
    ),
    "no such model": ("p.png", ["--box=0,0,4,4", "--model={tmp}/none"], "none is not a model directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(run, tmp_path, case):
    image, options, expected = BAD[case]
    code, out, err = run(image, *options)
    assert (code, out) == (2, "")
    assert err.startswith("hmar-jax edit: ")
    assert (err.count("\n"), err[-2:]) == (1, ".\n")
    assert expected.format(tmp=tmp_path) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("regions", [[], ["--box=0,0,4,4", "--pad=3"]], ids=["none", "two"])
def test_one_region_is_to_be_given(run, capsys, regions):
    with pytest.raises(SystemExit) as stopped:
        run("p.png", *regions)
    assert stopped.value.code == 2
    assert "usage: hmar-jax edit" in capsys.readouterr().err


def test_too_little_memory_is_a_sentence(run, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    monkeypatch.setattr(program, "sample", fail)
    code, _, err = run("p.png", "--box=2,3,12,9")
    assert code == 2
    assert err.endswith(
        "too little memory (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes); "
        "choose fewer --variants.\n"
    )


def test_results_that_cannot_be_written_are_named(run, tmp_path):
    (out := tmp_path / "out").write_text("a file where a folder is wanted")
    code, _, err = run("p.png", "--box=2,3,12,9", "--label=B", "--cfg=2")
    assert code == 2
    assert err == f"hmar-jax edit: --output is {out}, but {out} is a file; choose another folder.\n"
