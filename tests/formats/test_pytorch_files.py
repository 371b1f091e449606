"""PyTorch's files, read without PyTorch: what PyTorch wrote, what damage and malice make of it, and what is written."""

import collections
import os
import pickle
import re
import sys
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from official_files import (
    LADDER,
    assert_bit_equal,
    old_torch_file_of,
    packed_anew,
    peak_memory,
    random_state,
    refusal,
    stored,
    torch_file_of,
)

from hmar_jax.formats import pytorch_files
from hmar_jax.formats.convert import convert, export_torch
from hmar_jax.formats.pytorch_files import File
from hmar_jax.formats.safetensors_files import Tensor

MADE = Path(__file__).with_name("pytorch_files")  # by PyTorch: see make.py there
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


@pytest.fixture(params=["zip", "protocol4", "old", "deflated"])
def made(request, tmp_path):
    if request.param == "deflated":
        return packed_anew(MADE / "zip.pth", tmp_path / "packed.pth")
    return MADE / f"{request.param}.pth"


def test_every_tensor_that_pytorch_wrote_is_read(made):
    file = File(made)
    unreadable = {name: dtype for name, dtype in UNREADABLE.items() if name in file.shapes}
    assert len(unreadable) == (4 if made.name == "old.pth" else 6)
    assert file.dtypes == {name: array.dtype.name for name, array in READABLE.items()} | unreadable
    assert {name: file.shapes[name] for name in READABLE} == {name: array.shape for name, array in READABLE.items()}
    assert_bit_equal({name: file.read(name) for name in READABLE}, READABLE)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_beside_tensors_do_not_matter(tmp_path, protocol):
    """Such as the settings, counts and losses of a training."""
    counts = collections.Counter("abc"), collections.defaultdict(int, a=1), collections.OrderedDict(b=2)
    lists = collections.deque([1], 5), frozenset({1}), {2}, bytearray(b"x"), 1 + 2j, float("inf"), [None, (True,)]
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("any/data.pkl", pickle.dumps({"model": {}, "beside": [*counts, *lists]}, protocol))
    assert File(tmp_path / "f.pth").shapes == {}


def test_no_pytorch_is_loaded(made):
    assert File(made).shapes
    assert "torch" not in sys.modules


# --- whole models

FORMATS = {
    "zip": torch_file_of,
    "old": old_torch_file_of,
    "deflated": lambda path, state: torch_file_of(path, state, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("ending", pytorch_files.SUFFIXES)
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


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool", "complex64"])
def test_weights_that_are_no_floats_are_refused_by_name(tmp_path, dtype):
    state = random_state("vae")
    state["quant_conv.bias"] = np.ones_like(state["quant_conv.bias"], dtype)
    file = torch_file_of(tmp_path / "vae.pth", state)
    said = refusal(tmp_path, lambda: convert("vae", file, LADDER, tmp_path / "out"))
    expected = f"vae.pth has quant_conv.bias as {dtype}; expected float32, bfloat16, float16 or float64, so"
    assert said.startswith(expected)


# --- writing


def test_an_exported_model_comes_back_bit_for_bit(tmp_path, small_tokenizer):
    assert export_torch(small_tokenizer, tmp_path / "vae.pth") == "vae"
    export_torch(small_tokenizer, tmp_path / "again.pth")
    assert (tmp_path / "vae.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()
    assert_bit_equal(stored(convert("vae", tmp_path / "vae.pth", LADDER, tmp_path / "vae")), stored(small_tokenizer))


def written(path, arrays):
    pytorch_files.write(
        path, {n: Tensor(x.shape, np.dtype(np.float32), lambda x=x: [x]) for n, x in arrays.items()}, "x"
    )
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


MB = 2**20


@pytest.mark.parametrize("file_format", FORMATS)
def test_memory_holds_one_tensor(tmp_path, file_format):
    arrays = {f"{number}": np.full(MB, number, np.float32) for number in range(8)}
    path = FORMATS[file_format](tmp_path / "file.pth", arrays)
    file = File(path)
    assert peak_memory(lambda: File(path)) < MB
    assert peak_memory(lambda: [file.read(name).sum() for name in arrays]) < 15 * MB
    assert peak_memory(lambda: written(tmp_path / "again.pth", arrays)) < 10 * MB
