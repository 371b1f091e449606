"""What a folder of pictures promises: classes by name, every format as upright RGB, and a sentence for every fault."""

import errno
import logging
import os

import numpy as np
import pytest
from PIL import Image

from hmar_jax.data import picture_files
from hmar_jax.data.folder import FolderSource
from hmar_jax.errors import InputError, TransientError

RED = (200, 40, 20)


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (12, 9), RED)).save(path, **options)
    return path


def only(folder):
    """The one picture of a folder."""
    source = FolderSource(folder)
    assert len(source) == 1
    return source[0]["image"]


def test_a_class_is_a_subfolder_in_the_order_of_names(tmp_path):
    for name in ("dog/b.png", "dog/a.jpg", "cat/z.png", "Zebra/q.PNG"):
        save(tmp_path / name)
    source = FolderSource(tmp_path)
    assert source.class_names == ("Zebra", "cat", "dog")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 1, 2, 2]
    assert source[3]["label"].dtype == np.int32


def test_pictures_without_subfolders_are_one_class(tmp_path):
    save(tmp_path / "shapes/a.png")
    save(tmp_path / "shapes/b.png", Image.new("L", (5, 7)))
    (tmp_path / "shapes/notes").mkdir()
    source = FolderSource(tmp_path / "shapes")
    assert source.class_names == ("shapes",)
    assert [source[i]["image"].shape for i in range(2)] == [(9, 12, 3), (7, 5, 3)]
    assert source[1]["label"] == 0


def test_loose_pictures_beside_class_folders_are_refused_and_both_named(tmp_path):
    (tmp_path / "data/annotations").mkdir(parents=True)
    for name in ("stray.png", "cat/a.png", "dog/b.png"):
        save(tmp_path / "data" / name)
    with pytest.raises(InputError, match=r"data' .*'stray\.png'.*'cat'; keep one or the other\.$"):
        FolderSource(tmp_path / "data")
    (tmp_path / "data/stray.png").rename(tmp_path / "data/.stray.png")
    (tmp_path / "data/annotations").rmdir()
    assert FolderSource(tmp_path / "data").class_names == ("cat", "dog")


def test_loose_pictures_beside_folders_without_pictures_are_one_class(tmp_path):
    for name in ("a.png", "b.png", ".trash/old.png", "notes/deeper/c.png"):
        save(tmp_path / name)
    (tmp_path / "notes/a.txt").write_text("no picture")
    assert len(FolderSource(tmp_path)) == 2


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "JPG"])
def test_every_format_reads_as_rgb(tmp_path, ending):
    save(tmp_path / f"a.{ending}")
    image = only(tmp_path)
    assert image.shape == (9, 12, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - RED).max() < 12


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("P", (4, 4), 0), (0, 0, 0)),
        (Image.new("LA", (4, 4), (77, 255)), (77, 77, 77)),
        (Image.new("RGBA", (4, 4), (*RED, 255)), RED),
        (Image.new("RGBA", (4, 4), (*RED, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 77 * 257, np.uint16)), (77, 77, 77)),
    ],
    ids=["grey", "bilevel", "palette", "grey-alpha", "opaque", "transparent-is-white", "16-bit"],
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path, picture, expected):
    save(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(only(tmp_path), np.broadcast_to(np.uint8(expected), (4, 4, 3)))


def test_cmyk_becomes_rgb(tmp_path):
    save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    assert np.abs(only(tmp_path).astype(int) - (255, 0, 0)).max() < 12


def test_a_palette_colour_marked_transparent_is_white(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.putpixel((0, 0), 0)
    save(tmp_path / "a.png", picture, transparency=0)
    image = only(tmp_path)
    np.testing.assert_array_equal(image[0, 0], (255, 255, 255))
    np.testing.assert_array_equal(image[1, 1], RED)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(only(tmp_path)[0, 0], (255, 0, 0))


def test_exif_orientation_turns_the_picture_upright(tmp_path):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    save(tmp_path / "a.jpg", picture, exif=exif)
    image = only(tmp_path)
    assert image.shape == (32, 16, 3)
    assert image[:12].mean() > 240
    assert image[20:].mean() < 15


def test_hidden_and_foreign_files_are_skipped(tmp_path):
    save(tmp_path / "cat/a.png")
    save(tmp_path / ".cache/a.png")
    (tmp_path / "cat/._a.png").write_bytes(b"finder")
    (tmp_path / "cat/notes.txt").write_text("no picture")
    (tmp_path / "README").write_text("no picture")
    assert FolderSource(tmp_path).class_names == ("cat",)
    assert only(tmp_path).shape == (9, 12, 3)


def test_every_ending_of_a_picture_is_taken_and_what_is_left_out_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    for ending in ("jpg", "jfif", "jpe", "avif", "tga", "jp2"):
        save(tmp_path / f"cat/a.{ending}", format="jpeg" if ending[0] == "j" and ending != "jp2" else None)
    for name in ("a", "b.heic", "c.HEIC", "d.jpg_large", ".hidden.txt"):
        (tmp_path / f"cat/{name}").write_bytes((tmp_path / "cat/a.jpg").read_bytes())
    (tmp_path / "README.md").write_text("no picture")
    for _ in range(2):
        assert len(FolderSource(tmp_path)) == 6
    (message,) = caplog.messages
    for part in ("6 pictures", "left out (5 other files: ", "2 .heic", "1 .jpg_large", "1 without ending", "1 .md"):
        assert part in message


def test_what_is_said_of_other_files_is_one_line_without_control_characters(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    save(tmp_path / "cat/a.png")
    for name in (b"b.\x1b[2J\nx", b"c.\xff", b"d." + b"e" * 200):
        (tmp_path / "cat" / os.fsdecode(name)).write_bytes(b"")
    assert len(FolderSource(tmp_path)) == 1
    (message,) = caplog.messages
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("name", [b"d\xff", b"a\nb", b"\x1b[2J"])
def test_a_class_name_that_no_terminal_and_no_json_can_have_is_refused(tmp_path, name):
    save(tmp_path / os.fsdecode(name) / "a.png")
    with pytest.raises(InputError, match=r"is not UTF-8 or has control characters; rename it") as caught:
        FolderSource(tmp_path)
    assert str(caught.value).isprintable()


def test_class_names_of_any_language_are_kept(tmp_path):
    for name in ("été", "日本　語", "a\u00a0b"):
        save(tmp_path / name / "a.png")
    assert set(FolderSource(tmp_path).class_names) == {"été", "日本　語", "a\u00a0b"}


def test_a_picture_name_that_is_not_utf8_is_read(tmp_path):
    save(tmp_path / "cat/a.png")
    os.rename(tmp_path / "cat/a.png", os.fsencode(tmp_path) + b"/cat/\xff.png")
    assert only(tmp_path).shape == (9, 12, 3)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda at: os.symlink("/dev/zero", at)])
def test_what_is_named_as_a_picture_and_is_no_file_is_never_waited_for(tmp_path, make):
    save(tmp_path / "cat/a.png")
    make(tmp_path / "cat/b.png")
    source = FolderSource(tmp_path)
    if len(source) == 2:
        with pytest.raises(InputError, match=r"b\.png' cannot be read \(it is no regular file\)"):
            source[1]


def test_an_empty_file_named_as_a_picture_is_a_broken_picture(tmp_path):
    (tmp_path / "h.tga").write_bytes(b"")
    with pytest.raises(InputError, match=r"h\.tga' cannot be read \(it is empty\)"):
        only(tmp_path)


def test_links_to_pictures_and_to_folders_are_followed(tmp_path):
    save(tmp_path / "store/a.png")
    (tmp_path / "data/one").mkdir(parents=True)
    (tmp_path / "data/one/link.png").symlink_to(tmp_path / "store/a.png")
    (tmp_path / "data/two").symlink_to(tmp_path / "store")
    source = FolderSource(tmp_path / "data")
    assert source.class_names == ("one", "two")
    np.testing.assert_array_equal(source[0]["image"], source[1]["image"])


def test_a_link_to_itself_is_a_picture_that_cannot_be_read_or_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    save(tmp_path / "cat/a.png")
    (tmp_path / "cat/loop").symlink_to(tmp_path / "cat/loop")
    assert only(tmp_path).shape == (9, 12, 3)
    assert "1 without ending" in caplog.text
    (tmp_path / "cat/0.png").symlink_to(tmp_path / "cat/0.png")
    with pytest.raises(InputError, match=r"0\.png' cannot be read .*symbolic links"):
        FolderSource(tmp_path)[0]


@pytest.mark.parametrize("aim", ["dog", "gone"])
def test_a_link_in_place_of_a_class_folder_that_leads_nowhere_is_refused(tmp_path, aim):
    save(tmp_path / "cat/a.png")
    (tmp_path / "dog").symlink_to(tmp_path / aim)
    with pytest.raises(InputError, match="dog' is a link that leads nowhere"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("link", ["dog", "cat/deeper", "cat/b.png"])
def test_a_link_into_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, link):
    save(tmp_path / "cat/a.png")
    (tmp_path / link).symlink_to("/secret/x")
    scandir = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.path = entry.name, entry.path
            self._is_dir = entry.is_dir

        def is_dir(self):
            if self.path == str(tmp_path / link):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.path)
            return self._is_dir()

    class Entries(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    stat = os.stat
    monkeypatch.setattr(os, "scandir", lambda path: Entries(map(Entry, scandir(path))))
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), link)

    def may_not(path, *arguments, **options):
        if str(path) == str(tmp_path / link):
            raise refused
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", may_not)
    with pytest.raises(InputError, match=f"{link}' may not be read .*check its permissions"):
        [FolderSource(tmp_path)[i] for i in range(2)]


@pytest.mark.parametrize("names", [("train", "val"), ("test", "train", "validation"), ("all",)])
def test_a_folder_of_splits_says_which_of_them_to_give(tmp_path, names):
    for name in names:
        save(tmp_path / f"{name}/cat/a.png")
    right = str(tmp_path / ("train" if "train" in names else "all"))
    with pytest.raises(InputError, match=f"set data.path to the one whose .* such as '{right}'"):
        FolderSource(tmp_path)
    assert FolderSource(right).class_names == ("cat",)


def test_a_folder_of_splits_of_which_one_is_not_sorted_into_classes(tmp_path):
    save(tmp_path / "train/cat/a.png")
    save(tmp_path / "val/0001.png")
    with pytest.raises(InputError, match=f"such as '{tmp_path / 'train'}'"):
        FolderSource(tmp_path)


def test_no_pictures_names_the_endings_that_are_there(tmp_path):
    for name in ("a.heic", "b.heic", "c.pdf", "d"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"holds no pictures \(4 other files: 2 \.heic, 1 \.pdf, 1 without ending\); put"
    ):
        FolderSource(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "a.heic").rename(tmp_path / "cat/a.heic")
    with pytest.raises(InputError, match=r"cat' holds no pictures \(1 other file: 1 \.heic\); fill"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("fault", ["empty", "text", "cut", "dangling", "float"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, fault):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path = save(tmp_path / "bad.png", noise)
    match fault:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a picture")
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "dangling":
            path.unlink()
            path.symlink_to(tmp_path / "gone.png")
        case "float":
            path.unlink()
            path = save(tmp_path / "bad.tif", Image.new("F", (4, 4), 0.5))
    with pytest.raises(InputError, match=f"{path.name}.*(replace|save) it"):
        only(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing", "does not exist"),
        (lambda root: "", "data.path"),
        (lambda root: save(root / "a.png"), "is no folder"),
        (lambda root: root, "holds no pictures"),
        (lambda root: (save(root / "cat/a.png"), (root / "dog").mkdir(), root)[-1], "dog.*holds no pictures"),
    ],
    ids=["missing", "unset", "file", "empty", "empty-class"],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        FolderSource(make(tmp_path))


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(errno.EACCES, InputError, "may not be read .*permissions"), (errno.EIO, TransientError, "could not be read")],
)
@pytest.mark.parametrize("what", ["cat", "cat/a.png"])
def test_what_the_disk_refuses_is_named(tmp_path, monkeypatch, what, number, kind, message):
    save(tmp_path / "cat/a.png")
    refused = str(tmp_path / what)

    def unless_refused(do):
        def tried(path, *arguments):
            if str(path) == refused:
                raise OSError(number, os.strerror(number), str(path))
            return do(path, *arguments)

        return tried

    monkeypatch.setattr(os, "scandir", unless_refused(os.scandir))
    monkeypatch.setattr(picture_files, "open", unless_refused(open), raising=False)
    with pytest.raises(kind, match=f"'{refused}' {message}"):
        only(tmp_path)
