"""PyTorch files that are damaged: whatever is read is bit-equal to what was written, or the file is refused."""

import io
import pickletools
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged
from official_files import old_torch_file_of, peak_memory, torch_file_of

from hmar_jax.errors import InputError
from hmar_jax.formats.pytorch_files import File
from hmar_jax.formats.pytorch_pickles import DTYPES

MORE = settings(max_examples=settings().max_examples * 3)  # of some milliseconds each
MADE = Path(__file__).parent.parent / "formats" / "pytorch_files"  # by PyTorch
ARRAYS = {"a": np.arange(24, dtype=np.float32), "b": np.ones((2, 30), np.float16), "c.d": np.zeros((0, 3), np.float64)}


def bytes_of(write, *options):
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder, "f.pth"), ARRAYS, *options).read_bytes()


def with_footers(content):
    """The archive as a program writes it that cannot go back to a header: sizes follow the records."""

    class Unseekable(io.RawIOBase):
        def __init__(self):
            self.data = bytearray()

        def writable(self):
            return True

        def write(self, part):
            self.data += part
            return len(part)

    stream = Unseekable()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            with after.open(name, "w", force_zip64=name.endswith("/0")) as record:
                record.write(before.read(name))
    return bytes(stream.data)


ZIPPED = {
    "PyTorch's": (MADE / "zip.pth").read_bytes(),
    "stored": bytes_of(torch_file_of),
    "deflated": bytes_of(torch_file_of, zipfile.ZIP_DEFLATED),
    "streamed": with_footers(bytes_of(torch_file_of)),
}
OLD = {"PyTorch's": (MADE / "old.pth").read_bytes(), "ours": bytes_of(old_torch_file_of)}


def read(path, content):
    """All arrays of a file by name; None where it is refused."""
    path.write_bytes(content)
    try:
        file = File(path)
        return {
            name: (file.shapes[name], file.dtypes[name], file.read(name).tobytes())
            for name in file.shapes
            if file.dtypes[name] in DTYPES
        }
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400
        return None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("torch") / "f.pth"


@pytest.fixture(scope="module")
def whole(path):
    return {name: read(path, content) for name, content in (ZIPPED | {f"old {n}": c for n, c in OLD.items()}).items()}


def test_undamaged_files_are_read(whole):
    assert len(whole["PyTorch's"]) == len(whole["old PyTorch's"]) == 19
    for name in ("stored", "deflated", "streamed", "old ours"):
        assert whole[name] == {n: (x.shape, x.dtype.name, x.tobytes()) for n, x in ARRAYS.items()}


@MORE
@given(st.sampled_from(sorted(ZIPPED)).flatmap(lambda name: st.tuples(st.just(name), damaged(ZIPPED[name]))))
def test_a_damaged_archive_is_refused_or_equal(path, whole, case):
    name, content = case
    assert read(path, content) in (None, whole[name])


def storages_at(content):
    """Where the storages of an old file begin: behind its five pickles."""
    stream = io.BytesIO(content)
    for _ in range(5):
        list(pickletools.genops(stream))
    return stream.tell()


@MORE
@given(st.sampled_from(sorted(OLD)), st.data())
def test_damaged_storages_of_an_old_file_are_refused_or_as_long(path, whole, name, data):
    """No checksum tells other numbers, but none are taken from elsewhere: every byte of the file has its place."""
    start = storages_at(OLD[name])
    content = OLD[name][:start] + data.draw(damaged(OLD[name][start:]))
    found = read(path, content)
    if found is not None:
        assert len(content) == len(OLD[name])
        shapes = ({name: entry[:2] for name, entry in file.items()} for file in (found, whole[f"old {name}"]))
        assert next(shapes) == next(shapes)


@MORE
@given(st.sampled_from(sorted(OLD)).flatmap(lambda name: damaged(OLD[name])))
def test_a_damaged_old_file_is_read_or_refused(path, content):
    read(path, content)


@given(st.sampled_from(sorted(OLD)), st.data())
def test_an_old_file_with_fewer_or_more_weights_is_refused(path, name, data):
    content = OLD[name]
    if data.draw(st.booleans()):
        assert read(path, content[: data.draw(st.integers(0, len(content) - 1))]) is None
    else:
        assert read(path, content + data.draw(st.binary(min_size=1, max_size=64))) is None


# --- what an archive says twice


def records(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: (info, archive.read(info)) for info in archive.infolist()}


def archive_of(parts, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(stream, "w", method) as archive:
        patch.setattr(zipfile.ZipFile, "_writecheck", lambda *_: None)  # which warns of names that are there twice
        for name, data in parts:
            archive.writestr(name, data)
    return stream.getvalue()


STORED = ZIPPED["stored"]
PARTS = [(name, data) for name, (_, data) in records(STORED).items()]
A, B = ARRAYS["a"].tobytes(), ARRAYS["b"].tobytes()
HEADER, ENTRY = (STORED.index(b"any/data/0"), STORED.rindex(b"any/data/0"))  # the names in both places


def overwritten(at, data, content=STORED):
    return content[:at] + data + content[at + len(data) :]


def number(value):
    return struct.pack("<I", value)


CRC = zlib.crc32(A)
# What PyTorch reads too, or what only repeats what the directory says: the records and their checksums are the same.
HARMLESS = {
    "a whole header in front": STORED[:64] + STORED,
    "bytes behind": STORED + b"junk",
    "a comment": STORED[:-2] + struct.pack("<H", 4) + b"junk",
    "another checksum in a header": overwritten(HEADER - 16, number(CRC ^ 1)),
    "another size in a header": overwritten(HEADER - 8, number(len(A) - 4)),
    "fewer entries": STORED[:-12] + struct.pack("<H", 1) + STORED[-10:],
}  # fmt: skip
OTHER = {
    "bytes in front": b"junk" + STORED,
    "bytes before the directory": STORED.replace(b"PK\1\2", b"junkPK\1\2", 1),
    "data.pkl twice": archive_of([*PARTS, PARTS[0]]),
    "data.pkl in two folders": archive_of([*PARTS, ("other/data.pkl", PARTS[0][1])]),
    "a storage twice": archive_of([*PARTS, ("any/data/0", bytes(len(A)))]),
    "no storage": archive_of(part for part in PARTS if part[0] != "any/data/0"),
    "a shorter storage": archive_of((name, data[:-4] if name == "any/data/0" else data) for name, data in PARTS),
    "a longer storage": archive_of((name, data + b"junk" if name == "any/data/0" else data) for name, data in PARTS),
    "a storage elsewhere": archive_of((name.replace("any/data/0", "any/../data/0"), data) for name, data in PARTS),
    "big-endian": archive_of([*PARTS, ("any/byteorder", b"big")]),
    "a later version": archive_of((name, b"11" if name == "any/version" else data) for name, data in PARTS),
    "bzip2": archive_of(PARTS, zipfile.ZIP_BZIP2),
    "lzma": archive_of(PARTS, zipfile.ZIP_LZMA),
    "another name in a header": overwritten(HEADER, b"any/data/9"),
    "another name in the directory": overwritten(ENTRY, b"any/data/9"),
    "names that changed places": STORED.replace(b"any/data/0", b"any/data/?").replace(b"any/data/1", b"any/data/0")
    .replace(b"any/data/?", b"any/data/1"),
    "another checksum in the directory": overwritten(ENTRY - 30, number(CRC ^ 1)),
    "a checksum of 0": overwritten(HEADER - 16, number(0), overwritten(ENTRY - 30, number(0))),
    "encrypted": overwritten(HEADER - 24, b"\1", overwritten(ENTRY - 38, b"\1")),
    "deflated, it says": overwritten(HEADER - 22, b"\x08", overwritten(ENTRY - 36, b"\x08")),
    "another size in the directory": overwritten(ENTRY - 22, number(len(A) - 4)),
    "sizes beyond the next record": overwritten(ENTRY - 26, number(len(A) + 64) * 2),
    "sizes of gigabytes": overwritten(ENTRY - 26, number(2**31) * 2),
    "the place of another record": overwritten(ENTRY - 4, number(STORED.index(b"any/data/1") - 30)),
    "a place beyond the file": overwritten(ENTRY - 4, number(2**31)),
    "a longer extra field": overwritten(HEADER - 2, struct.pack("<H", 40)),
    "a directory elsewhere": STORED[:-6] + number(0) + STORED[-2:],
    "a directory of gigabytes": STORED[:-10] + number(2**31) + STORED[-6:],
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_an_archive_that_contradicts_itself_is_refused(path, case):
    assert OTHER[case] != STORED
    assert read(path, OTHER[case]) is None


@pytest.mark.parametrize("case", HARMLESS)
def test_bytes_around_an_archive_and_wrong_repetitions_change_nothing(path, whole, case):
    assert HARMLESS[case] != STORED
    assert read(path, HARMLESS[case]) == whole["stored"]


def directory_of(count):
    """An archive of so many empty records."""
    entry = b"PK\1\2" + bytes(42)
    return b"PK\3\4" + entry * count + b"PK\5\6" + struct.pack("<4x2H2L2x", 0, 0, len(entry) * count, 4)


def test_a_directory_that_would_fill_the_memory_is_not_read(path):
    content = directory_of(10**6)
    assert peak_memory(lambda: read(path, content)) < 2**24
    assert read(path, content) is None


def test_other_flags_and_records_change_nothing(path, whole):
    more = [("any/.data/serialization_id", b"1"), ("any/byteorder", b"little"), ("any/.format_version", b"1")]
    for content in (
        archive_of([*PARTS, *more]),
        archive_of([*PARTS, ("any/..", b"x"), ("../../x", b"x"), ("/etc/x", b"x"), ("any/data/", b"")]),
        archive_of(reversed(PARTS)),
        archive_of([(name, data) for name, data in PARTS if name != "any/version"]),
    ):
        assert read(path, content) == whole["stored"]


# --- what would fill the memory


def zeros(size):
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = b"".join(squeeze.compress(bytes(2**20)) for _ in range(size // 2**20))
    return part + squeeze.flush()


def bomb(name, size):
    """An archive with one record more, which unpacks to `size` bytes of 0."""
    packed = zeros(size)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for other, data in PARTS:
            if other != name:
                archive.writestr(other, data)
        archive.writestr(name, packed)
    content = stream.getvalue()
    header, entry = content.index(name.encode()), content.rindex(name.encode())
    sizes = number(len(packed)) + number(size)
    content = overwritten(header - 22, b"\x08", overwritten(header - 12, sizes, content))
    return overwritten(entry - 36, b"\x08", overwritten(entry - 26, sizes, content))


@pytest.mark.parametrize("name", ["any/data.pkl", "any/data/0", "any/version", "any/byteorder", "any/other"])
def test_a_record_that_unpacks_to_much_is_not_unpacked(path, name):
    content = bomb(name, 2**28)
    assert peak_memory(lambda: read(path, content)) < 2**24
    assert read(path, content) is None


def test_a_record_that_unpacks_to_more_than_it_says_is_refused(path):
    content = bomb("any/data/0", 2**24)
    entry, header = content.rindex(b"any/data/0"), content.index(b"any/data/0")
    content = overwritten(entry - 22, number(len(A)), overwritten(header - 8, number(len(A)), content))
    assert peak_memory(lambda: read(path, content)) < 2**24
    assert read(path, content) is None
