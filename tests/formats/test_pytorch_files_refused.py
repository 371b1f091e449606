"""PyTorch's files that are damaged, hostile or something else: one sentence each, and no code of theirs runs."""

import gzip
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from official_files import (
    assert_bit_equal,
    assert_one_sentence,
    old_torch_file_of,
    packed_anew,
    peak_memory,
    torch_file_of,
    torch_pickle,
)

from hmar_jax import InputError
from hmar_jax.formats import safetensors_files
from hmar_jax.formats.pytorch_files import File

MADE = Path(__file__).with_name("pytorch_files")  # by PyTorch: see make.py there
COUNT = np.arange(24, dtype=np.float32)
MB = 2**20
FORMATS = {
    "zip": torch_file_of,
    "old": old_torch_file_of,
    "deflated": lambda path, state: torch_file_of(path, state, zipfile.ZIP_DEFLATED),
}


# --- damage


def refused(path, name=None):
    """What opening a file, and reading a tensor or else all of them, is refused with."""
    with pytest.raises(InputError) as error:
        file = File(path)
        for entry in file.shapes if name is None else [name]:
            file.read(entry)
    said = str(error.value)
    assert str(path) in said
    return assert_one_sentence(said.replace(f"{path.parent}/", ""))


@pytest.fixture
def arrays():
    return {"a": COUNT, "b": np.ones((2, 300), np.float32)}


def flipped(path, content, keep_checksum=True):
    """The file with one byte of the first place of `content` changed."""
    data = path.read_bytes()
    at = data.index(content) + len(content) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return path


def test_a_flipped_byte_of_a_zip_is_found(tmp_path, arrays):
    path = flipped(torch_file_of(tmp_path / "f.pth", arrays), COUNT.tobytes())
    assert (
        refused(path)
        == "f.pth is no whole PyTorch file (a: the checksum of record 'any/data/0' is wrong); copy or save it again."
    )
    assert File(path).read("b").shape == (2, 300)


def test_a_flipped_byte_of_a_storage_that_tensors_share_is_found(tmp_path):
    path = tmp_path / "f.pth"
    shutil.copy(MADE / "zip.pth", path)
    flipped(path, COUNT.tobytes())
    assert "(strided: the checksum of record 'zip/data/9' is wrong)" in refused(path, "strided")


def test_files_that_pytorch_wrote_without_checksums_are_read(tmp_path, arrays, monkeypatch):
    path = torch_file_of(tmp_path / "f.pth", arrays)
    with zipfile.ZipFile(path) as archive:
        sums = {info.CRC for info in archive.infolist()}
    data = path.read_bytes()
    for checksum in sums:
        data = data.replace(checksum.to_bytes(4, "little"), bytes(4))
    path.write_bytes(data)
    assert_bit_equal({name: File(path).read(name) for name in arrays}, arrays)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_record_that_is_cut_takes_nothing_of_the_next(tmp_path, arrays, method):
    whole = torch_file_of(tmp_path / "whole.pth", arrays)
    path = packed_anew(whole, tmp_path / "f.pth", method, lambda name, x: x[: len(x) // 2] if "data/0" in name else x)
    said = "f.pth is no whole PyTorch file (storage '0' should have 96 bytes and has 48); copy or save it again."
    assert refused(path) == said


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_is_refused(tmp_path, arrays, file_format, share):
    path = FORMATS[file_format](tmp_path / "f.pth", arrays)
    os.truncate(path, int(path.stat().st_size * share))
    assert re.match(r"f\.pth is (damaged|cut|no whole PyTorch file)", refused(path))


@pytest.mark.parametrize(
    "content", [b"hello world\n", b"PK\x03\x04", b"\x80\x02.", b"N." * 9, b"\x80\x02K\x01."], ids=repr
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "f.pth").write_bytes(content)
    assert re.match(r"f\.pth is (damaged|no whole PyTorch file)", refused(tmp_path / "f.pth"))


def test_what_is_no_file_is_named(tmp_path):
    assert refused(tmp_path / "f.pth") == "f.pth does not exist; give a .safetensors or .pth file."
    (tmp_path / "f.pth").mkdir()
    os.mkfifo(tmp_path / "g.pth")
    assert refused(tmp_path / "f.pth") == "File f.pth is a folder; give a file."
    assert refused(tmp_path / "g.pth") == "File g.pth is a named pipe; give a file."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs\noid sha256:12\nsize 9\n", "is a pointer of Git LFS; run `git lfs pull` there, or "),
        (b"<!DOCTYPE html><html></html>", "is a web page; download the file itself."),
        (b"<HTML>\n", "is a web page; download the file itself."),
        (gzip.compress(b"weights", mtime=0), "is packed by gzip; unpack it with gunzip."),
    ],
)
def test_what_a_download_gives_instead_of_weights_is_named(tmp_path, content, expected):
    (tmp_path / "f.pth").write_bytes(content)
    assert refused(tmp_path / "f.pth").startswith(f"f.pth {expected}")
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"f.safetensors {expected}")):
        safetensors_files.File(tmp_path / "f.safetensors")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert refused(tmp_path / "f.pth").startswith("f.pth is a zip archive, but has no data.pkl as PyTorch writes it; ")


def test_a_file_in_another_byte_order_is_refused(tmp_path, arrays):
    with zipfile.ZipFile(torch_file_of(tmp_path / "f.pth", arrays), "a") as archive:
        archive.writestr("any/byteorder", "big")
    assert refused(tmp_path / "f.pth").startswith("f.pth was written by a machine of another byte order; ")


def old_file(path, arrays, system=None, version=1001, content=None, keys=None, after=b""):
    """A file from before PyTorch 1.6, with other parts than `old_torch_file_of` gives it."""
    keys = [str(number) for number in range(len(arrays))] if keys is None else keys
    values = (0x1950A86A20F9469CFC6C, version, {"little_endian": True} if system is None else system)
    storages = [array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values()]
    pickles = [*(pickle.dumps(value, 2) for value in values), content or torch_pickle(arrays), pickle.dumps(keys, 2)]
    path.write_bytes(b"".join([*pickles, *storages, after]))
    return path


OLD = {
    "big-endian": ({"system": {"little_endian": False}}, "was written by a machine of another byte order; "),
    "another version": ({"version": 1000}, "is no whole PyTorch file (its version is not known); "),
    "a storage twice": ({"keys": ["0", "0"]}, "is no whole PyTorch file (its storages are not those of its tensors); "),
    "another storage": ({"keys": ["0", "2"]}, "is no whole PyTorch file (its storages are not those of its tensors); "),
    "keys that are none": ({"keys": [[], {}]}, "is no whole PyTorch file (unhashable type: 'list'); "),
    "no list of storages": ({"keys": 7}, "is no whole PyTorch file (its storages are not those of its tensors); "),
    "storages in another order": (
        {"keys": ["1", "0"]},
        "is no whole PyTorch file (storage '0' should have 96 bytes and",
    ),
    "more than its storages": ({"after": b"x"}, "is no whole PyTorch file (it goes on behind its last storage); "),
}


@pytest.mark.parametrize("case", OLD)
def test_an_old_file_that_contradicts_itself_is_refused(tmp_path, arrays, case):
    change, expected = OLD[case]
    assert File(old_file(tmp_path / "f.pth", arrays)).shapes.keys() == arrays.keys()
    assert refused(old_file(tmp_path / "f.pth", arrays, **change)).startswith(f"f.pth {expected}")


def test_a_storage_of_two_lengths_is_refused(tmp_path, arrays):
    content = torch_pickle({"a": COUNT, "b": COUNT[:7]}).replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    said = "f.pth is damaged (storage '0' has two lengths in its pickle); copy or save it again."
    assert refused(file_with(tmp_path / "f.pth", content)) == said
    assert refused(old_file(tmp_path / "f.pth", arrays, content=content)) == said


def test_a_tensor_whose_sign_is_not_in_its_storage_is_not_read(tmp_path):
    """PyTorch negates and conjugates without touching the storage; what is to be done stands in the pickle."""
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    content = torch_pickle({"a": COUNT}).replace(hooks, hooks + b"}X\x03\x00\x00\x00neg\x88s")
    path = packed_anew(
        torch_file_of(tmp_path / "whole.pth", {"a": COUNT}),
        tmp_path / "f.pth",
        change=lambda name, data: content if name.endswith(".pkl") else data,
    )
    assert File(path).dtypes == {"a": "negated or conjugated"}


# --- malice


def file_with(path, content):
    """A zip file with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any/data.pkl", content)
    return path


NAMES = [
    "posix.system", "subprocess.Popen", "builtins.eval", "__builtin__.getattr", "argparse.Namespace", "io.open",
    "torch.load", "torch.hub.load", "numpy.load", "torch._utils._import_dotted_name",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", ["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_no_code_of_a_file_runs(tmp_path, monkeypatch, name, operation, old):
    monkeypatch.chdir(tmp_path)
    module, _, function = name.rpartition(".")
    named = f"c{module}\n{function}\n".encode()
    if operation == "STACK_GLOBAL":
        named = pickle.dumps(module, 2)[2:-1] + pickle.dumps(function, 2)[2:-1] + b"\x93"
    content = b"\x80\x04}" + pickle.dumps("model", 2)[2:-1] + named + pickle.dumps(("touch called",), 2)[2:-1] + b"Rs."
    path = tmp_path / "f.pth"
    if old:
        path.write_bytes(b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})) + content)
    else:
        file_with(path, content)
    expected = (
        f"f.pth is refused: it holds {name}, which is no tensor or plain data and could run any code when loaded; "
    )
    assert refused(path) == expected + "save its state dict alone, with torch.save or as .safetensors."
    assert os.listdir(tmp_path) == ["f.pth"]


def holding_itself(depth=0):
    content = {}
    content["x"] = content
    return content


def doubling(levels):
    content = {}
    for _ in range(levels):
        content = {"a": content, "b": content}
    return content


def tuples(depth):
    """A tuple in a tuple in … as the key of a dictionary, which NumPy and Python would hash recursively."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


HOSTILE = {
    "holds itself": pickle.dumps(holding_itself(), 2),
    "holds all twice, and again": pickle.dumps(doubling(45), 2),
    "deep": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "a long name": pickle.dumps({"x" * 5000: 1}, 2),
    "a string longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes longer than any memory": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fabc.",
    "an unknown operation": b"\x80\x02\xff.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing on the stack": b"\x80\x02s.",
    "no mark": b"\x80\x02t.",
    "no such memo": b"\x80\x02h\x05.",
    "no end": b"\x80\x02}",
    "a number is called": b"\x80\x02K\x01)R.",
    "a list gets items": b"\x80\x02]K\x01K\x02s.",
    "a tensor without a storage": b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(NK\x00))tRs.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_one_sentence(tmp_path, case):
    said = refused(file_with(tmp_path / "f.pth", HOSTILE[case]))
    assert re.match(r"f\.pth (is damaged \(|is no whole PyTorch file \(|holds a dictionary|has the operation)", said), (
        said
    )


def test_a_deep_key_and_a_far_memo_cost_nothing(tmp_path):
    for number, content in enumerate([tuples(900_000), b"\x80\x02Nr\xff\xff\xff\x7f."]):
        path = file_with(tmp_path / f"{number}.pth", content)
        assert peak_memory(lambda path=path: File(path)) < 200 * MB
        assert File(path).shapes == {}


BEYOND = {
    "a start beyond": (24, (1,), (1,)),
    "a shape beyond": (0, (25,), (1,)),
    "strides beyond": (0, (2, 2), (23, 1)),
    "huge": (0, (10**12, 10**12), (1, 1)),
    "negative": (-1, (1,), (1,)),
    "negative strides": (4, (2,), (-1,)),
    "no strides": (0, (2, 3), (1,)),
    "of floats": (0, (2.5,), (1,)),
}


@pytest.mark.parametrize("case", BEYOND)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, case, old):
    start, shape, strides = (pickle.dumps(value, 2)[2:-1] for value in BEYOND[case])
    plain = torch_pickle({"a": COUNT})
    where = pickle.dumps(0, 2)[2:-1] + pickle.dumps((24,), 2)[2:-1] + pickle.dumps((1,), 2)[2:-1]
    assert plain.count(where) == 1
    content = plain.replace(where, start + shape + strides)
    path = (old_torch_file_of if old else torch_file_of)(tmp_path / "f.pth", {"a": COUNT})
    if old:
        path.write_bytes(path.read_bytes().replace(plain, content))
    else:
        packed_anew(path, tmp_path / "g.pth", change=lambda name, data: content if name.endswith(".pkl") else data)
        os.replace(tmp_path / "g.pth", path)
    assert re.match(r"f\.pth is (damaged|no whole PyTorch file) \(", refused(path))


def test_a_record_that_claims_to_be_huge_takes_no_memory(tmp_path):
    path = torch_file_of(tmp_path / "f.pth", {"a": COUNT})
    data = path.read_bytes()
    length = COUNT.nbytes.to_bytes(4, "little")
    at = data.rindex(length * 2)  # in the directory: packed and unpacked
    path.write_bytes(data[: at + 4] + (2**31).to_bytes(4, "little") + data[at + 8 :])
    assert peak_memory(lambda: refused(path)) < 20 * MB


def test_two_entries_of_one_name_are_refused(tmp_path):
    def file(name, first):
        def with_number(record, data):
            return data.replace(b"X\x01\x00\x00\x00b", b"K\x01") if record.endswith("data.pkl") else data

        whole = torch_file_of(tmp_path / "whole.pth", {first: COUNT[:1], "b": COUNT[1:2]})
        return packed_anew(whole, tmp_path / name, change=with_number)

    assert File(file("g.pth", "a.b")).shapes.keys() == {"a.b", "1"}
    assert refused(file("f.pth", "1")).startswith("f.pth has two entries named 1; ")
