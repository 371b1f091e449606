"""Streamed .safetensors files: the library reads what was written; memory holds a part, or what is asked for."""

import functools
import gc
import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tqdm
from hypothesis import example, given
from hypothesis import strategies as st

from hmar_jax import InputError
from hmar_jax.formats import pytorch_files, safetensors_files
from hmar_jax.formats.safetensors_files import File, Tensor

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
TQDM = tqdm.tqdm
MB = 2**20
MAPS = Path("/proc/self/maps")


def whole(array, dtype=None):
    return Tensor(array.shape, array.dtype if dtype is None else np.dtype(dtype), lambda: [array])


def write(path, arrays):
    return safetensors_files.write(path, {name: whole(array) for name, array in arrays.items()}, "test")


def header_of(path):
    """The header, its length in bytes and the bytes after it, read by hand."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), length, data[8 + length :]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("tensors")


@pytest.fixture(scope="module")
def mixed():
    rng = np.random.default_rng(0)
    return {
        "b.kernel": rng.standard_normal((3, 5, 7)).astype(BFLOAT16),
        "a.kernel": rng.standard_normal((4, 2, 3)).astype(np.float32),
        "c.scale": np.float32(0.25).reshape(()),
    }


# --- writing

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def contents(draw):
    """name → (array, dtype to store, sizes of its parts along the first axis, dtype of the parts)."""
    content = {}
    for name in draw(st.lists(names, unique=True, max_size=5)):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        array = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape).astype(np.float32)
        cuts = draw(st.lists(st.integers(0, shape[0]), max_size=3)) if shape else []
        dtypes = st.sampled_from([FLOAT32, BFLOAT16])
        content[name] = (array, draw(dtypes), sorted(cuts), draw(st.sampled_from([FLOAT32, np.dtype(np.float64)])))
    return content


def parts_of(array, cuts):
    return np.split(array, cuts) if array.ndim else [array]


@given(contents())
@example({})
@example(
    {"x": (np.zeros((0, 3), np.float32), BFLOAT16, [], FLOAT32), "y": (np.ones(1, np.float32), FLOAT32, [], FLOAT32)}
)
def test_what_is_written_is_what_the_library_reads(shared, content):
    path = shared / "any.safetensors"
    streamed = {
        name: Tensor(array.shape, dtype, functools.partial(parts_of, array.astype(of_parts), cuts))
        for name, (array, dtype, cuts, of_parts) in content.items()
    }
    digests = safetensors_files.write(path, streamed, "test")
    expected = {name: array.astype(dtype) for name, (array, dtype, _, _) in content.items()}
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == digests.tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()
        assert digests.tensors[name] == safetensors_files.digest(array) == hashlib.sha256(array.tobytes()).hexdigest()
    assert digests.file == hashlib.sha256(path.read_bytes()).hexdigest()
    header, length, data = header_of(path)
    assert length % 8 == 0
    assert len(data) == sum(array.nbytes for array in expected.values())
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert data[begin:end] == expected[name].tobytes()
        assert begin % expected[name].dtype.itemsize == 0


def test_the_order_in_which_tensors_are_given_leaves_no_trace(mixed, tmp_path):
    first = write(tmp_path / "first", mixed)
    again = write(tmp_path / "again", dict(reversed(mixed.items())))
    assert first == again
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(24, dtype=np.float32)[::-3],
        np.broadcast_to(np.float32(3), (2, 2)),
    ],
    ids=["transposed", "strided", "repeated"],
)
def test_the_layout_in_memory_does_not_matter(array, tmp_path):
    digests = write(tmp_path / "file", {"x": array})
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "file")["x"], array)
    assert digests.tensors["x"] == safetensors_files.digest(array) == safetensors_files.digest(array.copy())


@pytest.mark.parametrize("parts", [[], [1, 1], [1, 1, 1, 1], [4]], ids=str)
def test_parts_of_a_wrong_total_are_caught(parts, tmp_path):
    wrong = Tensor((3, 2), FLOAT32, lambda: [np.zeros((rows, 2), np.float32) for rows in parts])
    with pytest.raises(AssertionError, match=rf"layers\.7 has {8 * sum(parts)} bytes in its parts, not 24"):
        safetensors_files.write(tmp_path / "file", {"layers.7": wrong}, "test")


def test_writing_is_quiet_where_there_is_no_terminal(mixed, tmp_path, capsys):
    write(tmp_path / "file", mixed)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("module", [safetensors_files, pytorch_files])
def test_what_a_terminal_is_shown_as_it_is_written_has_no_control_characters(module, monkeypatch, tmp_path):
    described = []
    shown = lambda *args, desc, **options: described.append(desc) or TQDM(*args, **options)  # noqa: E731
    monkeypatch.setattr(module.tqdm, "tqdm", shown)
    module.write(tmp_path / "file", {"x": Tensor((1,), FLOAT32, lambda: [np.ones(1, np.float32)])}, "\x1b[2J\n" * 500)
    assert all(map(str.isprintable, described))
    assert 0 < len(described[0]) < 200


def traced_peak(work):
    """The most memory that Python and NumPy held at once during `work`, beyond what they held before, in bytes."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_writing_holds_a_part_at_a_time(tmp_path):
    path = tmp_path / "large"
    parts = Tensor((200, MB // 4), FLOAT32, lambda: (np.full((1, MB // 4), i, np.float32) for i in range(200)))
    peak = traced_peak(lambda: safetensors_files.write(path, {"x": parts}, "test"))
    assert path.stat().st_size > 200 * MB
    assert peak < 5 * MB
    path.unlink()


# --- reading


def test_a_file_gives_whole_arrays_and_single_layers(mixed, tmp_path):
    write(tmp_path / "file.safetensors", mixed)
    file = File(tmp_path / "file.safetensors")
    assert file.shapes == {name: array.shape for name, array in mixed.items()}
    for name, array in mixed.items():
        read = file.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    for name in ("a.kernel", "b.kernel"):
        for layer, expected in enumerate(mixed[name]):
            read = file.read(name, layer)
            assert (read.dtype, read.shape, read.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def test_a_file_of_the_library_is_read_whatever_else_it_holds(tmp_path):
    arrays = {"step": np.array(7), "half": np.ones(3, np.float16), "x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    safetensors.numpy.save_file(arrays, tmp_path / "file.safetensors", metadata={"format": "pt"})
    file = File(tmp_path / "file.safetensors")
    assert file.shapes == {"step": (), "half": (3,), "x": (2, 3)}
    np.testing.assert_array_equal(file.read("x", 1), [3, 4, 5])


def test_reading_holds_no_more_than_is_asked_for(tmp_path):
    path = tmp_path / "file.safetensors"
    write(path, {"x": np.ones((32, MB // 4), np.float32), "y": np.ones((8, MB // 4), np.float32)})
    file = File(path)
    assert traced_peak(lambda: File(path)) < MB / 8
    assert MB <= traced_peak(lambda: file.read("x", 31)) < 1.5 * MB
    assert 8 * MB <= traced_peak(lambda: file.read("y")) < 9 * MB


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list what is mapped")
def test_no_map_of_the_file_outlives_a_read(mixed, tmp_path):
    path = tmp_path / "file.safetensors"
    write(path, mixed)
    with safetensors.safe_open(path, framework="np"):
        assert str(path) in MAPS.read_text()
    file = File(path)
    arrays = [file.read("a.kernel"), file.read("b.kernel", 1)]
    assert str(path) not in MAPS.read_text()
    np.testing.assert_array_equal(arrays[0], mixed["a.kernel"])


def not_whole(path):
    return rf"^{path} is not a whole \.safetensors file \(.+\); copy or write it again\.$"


DAMAGE = {
    "cut in the data": lambda data: data[:-1],
    "cut in the header": lambda data: data[:40],
    "cut in the length": lambda data: data[:4],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "no header": lambda data: data[:8] + b"?" * (len(data) - 8),
    "a length beyond the file": lambda data: (2**40).to_bytes(8, "little") + data[8:],
    "another kind of file": lambda data: b"PK\x03\x04" + data,
    "text": lambda data: b"a text of some words, and not of weights\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_gets_one_sentence(mixed, tmp_path, damage):
    path = tmp_path / "file.safetensors"
    write(path, mixed)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=not_whole(path)) as error:
        File(path)
    assert "\n" not in str(error.value)


def test_what_is_no_file_gets_one_sentence(tmp_path):
    missing = tmp_path / "nowhere" / "file.safetensors"
    with pytest.raises(InputError, match=rf"^{missing} does not exist; give a \.safetensors file\.$"):
        File(missing)
    with pytest.raises(InputError, match=rf"^File {tmp_path} is a folder; give a file\.$"):
        File(tmp_path)


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match=rf"^File {tmp_path}/pipe\.safetensors is a named pipe; give a file\.$"):
        File(tmp_path / "pipe.safetensors")


def file_of_entries(path, text, data=b"\0" * 8):
    """A file of a header that is written as it stands."""
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


ENTRY = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "a name twice": (b'{"x":%s,"x":%s}' % (ENTRY, ENTRY), r"is not JSON \(an object has the name 'x' twice\)"),
    "no object": (b"[1]", "is not a whole"),
    "deep": (b"[" * 50_000, "is not a whole"),
    "overlapping": (b'{"x":%s,"y":%s}' % (ENTRY, ENTRY), "is not a whole"),
    "a shape of another size": (ENTRY.replace(b"[2]", b"[3]").join([b'{"x":', b"}"]), "is not a whole"),
    "a shape beyond 64 bits": (ENTRY.replace(b"[2]", b"[%d]" % 2**63).join([b'{"x":', b"}"]), "is not a whole"),
    "a negative shape": (ENTRY.replace(b"[2]", b"[-2]").join([b'{"x":', b"}"]), "is not a whole"),
    "offsets that run backwards": (ENTRY.replace(b"[0,8]", b"[8,0]").join([b'{"x":', b"}"]), "is not a whole"),
    "an unknown dtype": (ENTRY.replace(b"F32", b"X" * 9999).join([b'{"x":', b"}"]), "is not a whole"),
    "a field of kilobytes": (b'{"x":{"%s":1}}' % (b"\\u001b[2J" * 999), "is not a whole"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_gets_one_short_sentence(tmp_path, case):
    text, expected = HEADERS[case]
    path = file_of_entries(tmp_path / "file.safetensors", text)
    with pytest.raises(InputError, match=expected) as error:
        File(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300 + len(str(path))


def test_a_header_as_large_as_no_model_has_is_not_read(tmp_path):
    path = tmp_path / "file.safetensors"
    with path.open("wb") as file:
        file.write((90 * MB).to_bytes(8, "little"))
        file.truncate(200 * MB)
    with pytest.raises(InputError, match=r"\(its header would have 94371840 bytes, and 16777216 is the most\); copy"):
        File(path)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "C64", "BOOL", "U8", "I32", "F64"])
def test_an_entry_that_is_no_float_is_named_with_its_dtype(tmp_path, code):
    size = {"F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1, "U8": 1, "I32": 4, "F64": 8}[code]
    header = json.dumps({"x\x1b" * 99: {"dtype": code, "shape": [1], "data_offsets": [0, size]}}).encode()
    file = File(file_of_entries(tmp_path / "file.safetensors", header, bytes(size)))
    with pytest.raises(InputError, match=r"^it has x\\x1bx.* as \w+; expected float32 or float16, so") as error:
        safetensors_files.check_floats(file.dtypes, ("float32", "float16"), "it")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


# --- numbers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1234, 2**18 - 1, 2**18, 2**18 + 76])  # arrays are looked at in parts of 2¹⁸
def test_a_number_that_is_not_finite_is_found_wherever_it_is(dtype, value, place):
    array = np.ones(2**18 + 77, np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16)
    assert safetensors_files.cast(array, array.dtype, "x") is array
    array[place] = value
    with pytest.raises(InputError, match=rf"^x has the value {value}; weights must be finite, so"):
        safetensors_files.cast(array, array.dtype, "x")


LARGEST = {"float16": 65504, "bfloat16": float.fromhex("0x1.fep127"), "float32": float.fromhex("0x1.fffffep127")}


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_number_of_a_dtype_is_kept_and_what_is_beyond_is_named(dtype):
    narrow = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    largest = np.array([[1, LARGEST[dtype]], [-LARGEST[dtype], 0]])
    np.testing.assert_array_equal(safetensors_files.cast(largest, narrow, "x").astype(np.float64), largest)
    largest[1, 0] *= 1.01
    with pytest.raises(
        InputError, match=rf"^x has the value -\S+, which is too large for {dtype}; use a wider dtype\.$"
    ):
        safetensors_files.cast(largest, narrow, "x")


def test_looking_at_numbers_takes_no_memory():
    for dtype in (FLOAT32, BFLOAT16):
        array = np.ones(MB * 8, dtype)
        assert traced_peak(lambda array=array: safetensors_files.cast(array, array.dtype, "x")) < 2 * MB
