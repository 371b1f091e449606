"""PyTorch's files, read without PyTorch: what PyTorch wrote, what damage and malice make of it, and what is written."""

import os
import pickle
import re
import shutil
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from official_files import (
    LADDER,
    assert_bit_equal,
    assert_one_sentence,
    old_torch_file_of,
    random_state,
    refusal,
    stored,
    torch_file_of,
    torch_pickle,
)

from hmar_jax import InputError, torch_files
from hmar_jax.convert import convert, export_torch
from hmar_jax.tensors import Tensor
from hmar_jax.torch_files import File

MADE = Path(__file__).with_name("torch_files")  # by PyTorch: see make.py there
COUNT = np.arange(24, dtype=np.float32)
READABLE = {
    "float32": COUNT[:6].reshape(2, 3),
    "float64": COUNT[:2].astype(np.float64),
    "float16": COUNT[:3].astype(np.float16),
    "bfloat16": COUNT[:3].astype(ml_dtypes.bfloat16),
    "int64": np.arange(3),
    "bool": np.array([True, False]),
    "parameter": COUNT[:2],
    "tagged": COUNT[:2],
    "buffer": COUNT[:3],
    "first": COUNT[:12].reshape(3, 4),
    "transposed": COUNT[12:].reshape(3, 4).T,
    "strided": COUNT[1::2],
    "scalar": np.float32(1.5).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
    "expanded": np.ones(4, np.float32),
    "nested.model.weight": COUNT[:6].reshape(3, 2),
    "nested.model.bias": COUNT[:3],
    "nested.7": COUNT[:1],
    "array": np.arange(6.0).reshape(2, 3),
}
UNREADABLE = {
    "complex": "complex64",
    "quantised": "quantised",
    "sparse": "sparse",
    "meta": "meta, without values",
    "float8": "float8_e4m3fn",
    "uint16": "uint16",
}


def compressed(source, path, method=zipfile.ZIP_DEFLATED, change=lambda name, data: data):
    """The records of a zip archive packed anew."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(path, "w", method) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
    return path


@pytest.fixture(params=["zip", "protocol4", "old", "deflated", "bzip2", "lzma"])
def made(request, tmp_path):
    methods = {"deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    if request.param in methods:
        return compressed(MADE / "zip.pth", tmp_path / "packed.pth", methods[request.param])
    return MADE / f"{request.param}.pth"


def test_every_tensor_that_pytorch_wrote_is_read(made):
    file = File(made)
    unreadable = {name: dtype for name, dtype in UNREADABLE.items() if name in file.shapes}
    assert len(unreadable) == (4 if made.name == "old.pth" else 6)
    assert file.dtypes == {name: array.dtype.name for name, array in READABLE.items()} | unreadable
    assert {name: file.shapes[name] for name in READABLE} == {name: array.shape for name, array in READABLE.items()}
    assert_bit_equal({name: file.read(name) for name in READABLE}, READABLE)


def test_no_pytorch_is_loaded(made):
    assert File(made).shapes
    assert "torch" not in sys.modules


# --- whole models

FORMATS = {
    "zip": torch_file_of,
    "old": old_torch_file_of,
    "deflated": lambda path, state: torch_file_of(path, state, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("ending", torch_files.SUFFIXES)
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_model_is_converted_from_every_format(tmp_path, small_tokenizer, file_format, ending):
    file = FORMATS[file_format](tmp_path / f"vae{ending}", random_state("vae"))
    assert_bit_equal(stored(convert("vae", file, LADDER, tmp_path / "vae")), stored(small_tokenizer))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_other_floats_become_float32(tmp_path, dtype):
    state = {name: array.astype(dtype) for name, array in random_state("vae").items()}
    wide = {name: array.astype(np.float32) for name, array in state.items()}
    found = [
        stored(convert("vae", torch_file_of(tmp_path / f"{name}.pth", arrays), LADDER, tmp_path / name))
        for name, arrays in {"narrow": state, "wide": wide}.items()
    ]
    assert_bit_equal(*found)


def test_a_quantised_model_is_refused(tmp_path):
    state = random_state("vae")
    state["quant_conv.bias"] = state["quant_conv.bias"].astype(np.int8)
    file = torch_file_of(tmp_path / "vae.pth", state)
    said = refusal(tmp_path, lambda: convert("vae", file, LADDER, tmp_path / "out"))
    assert said.startswith("vae.pth has quant_conv.bias as int8; expected float32, bfloat16, float16 or float64, so")


# --- writing


def test_an_exported_model_comes_back_bit_for_bit(tmp_path, small_tokenizer):
    assert export_torch(small_tokenizer, tmp_path / "vae.pth") == "vae"
    export_torch(small_tokenizer, tmp_path / "again.pth")
    assert (tmp_path / "vae.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()
    assert_bit_equal(stored(convert("vae", tmp_path / "vae.pth", LADDER, tmp_path / "vae")), stored(small_tokenizer))


def written(path, arrays):
    torch_files.write(path, {n: Tensor(x.shape, np.dtype(np.float32), lambda x=x: [x]) for n, x in arrays.items()}, "x")
    return path


def test_pytorch_reads_what_is_written(tmp_path):
    """Without PyTorch here, the pickle is compared with the one that torch 2.13.0 read on 2026-11-30, mapped or not."""
    arrays = {
        "a.b": COUNT[:6].reshape(2, 3),
        "c": COUNT[3],
        "empty": COUNT[:0].reshape(0, 2),
        "ö": COUNT.reshape(2, 3, 4),
    }
    path = written(tmp_path / "file.pth", arrays)
    assert_bit_equal({name: File(path).read(name) for name in arrays}, {n: np.asarray(x) for n, x in arrays.items()})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        names = ["data.pkl", "byteorder", "data/0", "data/1", "data/2", "data/3", "version"]
        assert archive.namelist() == [f"archive/{name}" for name in names]
        assert zlib.crc32(archive.read("archive/data.pkl")) == 1451678470
    try:
        import torch
    except ImportError:
        return
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert_bit_equal({name: x.numpy() for name, x in found.items()}, {n: np.asarray(x) for n, x in arrays.items()})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_torch_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, small_tokenizer):
    monkeypatch.setattr(zipfile, "ZipFile", lambda path, mode, whole=zipfile.ZipFile: whole("/dev/full", mode))
    said = refusal(tmp_path, lambda: export_torch(small_tokenizer, tmp_path / "vae.pth"))
    assert re.fullmatch(r"Could not write vae\.pth \(.*No space left on device\); make room on that disk .*", said)


# --- memory


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


MB = 2**20


@pytest.mark.parametrize("file_format", FORMATS)
def test_memory_holds_one_tensor(tmp_path, file_format):
    arrays = {f"{number}": np.full(MB, number, np.float32) for number in range(8)}
    path = FORMATS[file_format](tmp_path / "file.pth", arrays)
    file = File(path)
    assert peak(lambda: File(path)) < MB
    assert peak(lambda: [file.read(name).sum() for name in arrays]) < 15 * MB
    assert peak(lambda: written(tmp_path / "again.pth", arrays)) < 10 * MB


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
        refused(path) == "f.pth is no whole PyTorch file (a: Bad CRC-32 for file 'any/data/0'); copy or save it again."
    )
    assert File(path).read("b").shape == (2, 300)


def test_a_flipped_byte_of_a_storage_that_tensors_share_is_found(tmp_path):
    path = tmp_path / "f.pth"
    shutil.copy(MADE / "zip.pth", path)
    flipped(path, COUNT.tobytes())
    assert "Bad CRC-32" in refused(path, "strided")


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
    path = compressed(whole, tmp_path / "f.pth", method, lambda name, x: x[: len(x) // 2] if "data/0" in name else x)
    said = "f.pth is no whole PyTorch file (a: its storage is shorter than its shape); copy or save it again."
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


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    assert refused(tmp_path / "f.pth") == "f.pth does not exist; give a .safetensors or .pth file."
    (tmp_path / "f.pth").mkdir()
    assert refused(tmp_path / "f.pth").startswith("f.pth is no whole PyTorch file (it is a folder or a device); ")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert refused(tmp_path / "f.pth").startswith("f.pth is a zip archive, but has no data.pkl as PyTorch writes it; ")


def test_a_file_in_another_byte_order_is_refused(tmp_path, arrays):
    with zipfile.ZipFile(torch_file_of(tmp_path / "f.pth", arrays), "a") as archive:
        archive.writestr("any/byteorder", "big")
    assert refused(tmp_path / "f.pth").startswith("f.pth was written by a machine of another byte order; ")


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
    for number, content in enumerate([tuples(1_000_000), b"\x80\x02Nr\xff\xff\xff\x7f."]):
        path = file_with(tmp_path / f"{number}.pth", content)
        assert peak(lambda path=path: File(path)) < 200 * MB
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
        compressed(path, tmp_path / "g.pth", change=lambda name, data: content if name.endswith(".pkl") else data)
        os.replace(tmp_path / "g.pth", path)
    assert re.match(r"f\.pth is (damaged|no whole PyTorch file) \(", refused(path))


def test_a_record_that_claims_to_be_huge_takes_no_memory(tmp_path):
    path = torch_file_of(tmp_path / "f.pth", {"a": COUNT})
    data = path.read_bytes()
    length = COUNT.nbytes.to_bytes(4, "little")
    at = data.rindex(length * 2)  # in the directory: packed and unpacked
    path.write_bytes(data[: at + 4] + (2**31).to_bytes(4, "little") + data[at + 8 :])
    assert peak(lambda: refused(path)) < 20 * MB


def test_two_entries_of_one_name_are_refused(tmp_path):
    content = torch_pickle({"a.b": COUNT[:1], "b": COUNT[1:2]}).replace(b"X\x01\x00\x00\x00b", b"K\x01")
    assert File(file_with(tmp_path / "g.pth", content)).shapes.keys() == {"a.b", "1"}
    twice = torch_pickle({"1": COUNT[:1], "b": COUNT[1:2]}).replace(b"X\x01\x00\x00\x00b", b"K\x01")
    assert refused(file_with(tmp_path / "f.pth", twice)).startswith("f.pth has two entries named 1; ")
