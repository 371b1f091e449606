"""Pickles of any operations: they give plain data or an InputError, import nothing and start nothing."""

import io
import pickle
import pickletools
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import ODD_NUMBERS, damaged

from hmar_jax.errors import InputError
from hmar_jax.formats import pickles, pytorch_pickles

MORE = settings(max_examples=settings().max_examples * 4)  # of a millisecond each
WATCHED = ("import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "ctypes.", "pickle.", "code.")
happened = []
watching = False


def watch(event, arguments):
    if watching and event.startswith(WATCHED):
        happened.append((event, arguments))


sys.addaudithook(watch)
for codec in ("ascii", "latin-1", "raw_unicode_escape", "unicode_escape"):
    "".encode(codec)  # which imports Python's own module for it, once


def interpreted(content):
    """What a pickle of a PyTorch file and one of arrays alone give; None where they are refused."""
    global watching
    made = []
    modules = set(sys.modules)
    for read in (
        lambda: pytorch_pickles.collect(
            pytorch_pickles.load(io.BytesIO(content), "F", pytorch_pickles.Storages()), "F"
        ),
        lambda: pickles.load(io.BytesIO(content), pickles.PLAIN.get, "F"),
    ):
        watching = True
        try:
            made.append(read())
        except InputError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 400
            made.append(None)
        finally:
            watching = False
    assert happened == []
    assert set(sys.modules) == modules
    return made


# --- operations

NAMES = [
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_qtensor", "torch._tensor _rebuild_from_type_v2", "torch FloatStorage", "torch Size",
    "torch.storage UntypedStorage", "collections OrderedDict", "collections defaultdict", "numpy dtype",
    "numpy ndarray", "numpy._core.multiarray _reconstruct", "numpy.core.numeric _frombuffer", "_codecs encode",
    "__builtin__ set", "builtins bytearray", "os system", "this s", "builtins getattr", "torch._utils _rebuild.x",
    "ｔorch Size", "torch FloatStorage\u202e",
]  # fmt: skip
TEXTS = ["", "a", "storage", "0", "f4", "O8", "f4,f4", "(2,", "é", "\ud800", "a.b", "a\n\x1b[2J", "x" * 3000, "nan"]
TEXT_ARGUMENTS = {
    "decimalnl_short": ["0", "01", "-1", "9" * 5000, "x", "٣"],
    "decimalnl_long": ["0L", "-1", "9" * 5000 + "L", "x"],
    "floatnl": ["1.5", "nan", "1e999", "x"],
    "stringnl": ["''", "'a'", '"\\x1b"', "'\\777'", "'", "x"],
    "stringnl_noescape": ["", "a", "('storage',)"],
    "unicodestringnl": TEXTS[:7],
}
FIXED = {"uint1": "<B", "uint2": "<H", "uint4": "<I", "uint8": "<Q", "int4": "<i", "float8": ">d"}
COUNTED = {"1": "<B", "4": "<I", "8": "<Q"}


@st.composite
def operations(draw):
    """One operation with an argument, mostly of the form it should have."""
    operation = draw(st.sampled_from(pickletools.opcodes))
    code, argument = operation.code.encode("latin-1"), operation.arg
    if argument is None:
        return code
    if argument.name in FIXED:
        size = struct.calcsize(FIXED[argument.name])
        small = st.integers(0, 5) if argument.name != "float8" else st.sampled_from([0.0, 1.5, float("nan")])
        return code + draw(st.builds(struct.pack, st.just(FIXED[argument.name]), small) | st.binary(min_size=size))
    if argument.name == "stringnl_noescape_pair":
        return code + draw(st.sampled_from(NAMES)).replace(" ", "\n").encode("utf-8", "surrogatepass") + b"\n"
    if argument.name in TEXT_ARGUMENTS:
        return code + draw(st.sampled_from(TEXT_ARGUMENTS[argument.name])).encode("utf-8", "surrogatepass") + b"\n"
    text = draw(st.sampled_from(TEXTS)).encode("utf-8", "surrogatepass")[:200]
    form = COUNTED[argument.name[-1]]
    length = draw(st.just(len(text)) | st.sampled_from([2**7, 2**31 - 1, 2**31, 2**62]))
    return code + struct.pack(form, length % 2 ** (8 * struct.calcsize(form))) + text


@st.composite
def calls(draw):
    """A call of something that is known, with arguments that it may have."""
    values = st.sampled_from([*TEXTS, *ODD_NUMBERS, None, (), [], {}, (2, 3), [1] * 40, (-1,), (2**70,), b"ab", "<f4"])
    named = b"c" + draw(st.sampled_from(NAMES)).replace(" ", "\n").encode("utf-8", "surrogatepass") + b"\n"
    arguments = draw(st.lists(values.map(lambda value: pickle.dumps(value, 2)[2:-1]) | st.just(named), max_size=7))
    storage = b"((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + draw(st.sampled_from([b"0", b"1"]))
    storage += b"X\3\0\0\0cpu" + draw(st.sampled_from([b"K\4", b"J\xff\xff\xff\xff", b"N"])) + b"tQ"
    if draw(st.booleans()):
        arguments = [storage[1:], *arguments]
    return (
        named + b"(" + b"".join(arguments) + b"t" + draw(st.sampled_from([b"R", b"\x81", b"Rq\0", b"Rh\0b", b"\x92"]))
    )


@MORE
@given(st.lists(operations() | calls(), max_size=40), st.booleans())
@example([b"}", b"X\1\0\0\0aios\nsystem\n", b"("], True)  # INST
@example([b"(cos\nsystem\nX\1\0\0\0xo"], True)  # OBJ
@example([b"\x82\1"], True)  # EXT1
@example([b"cos\nsystem\n)}\x92"], True)  # NEWOBJ_EX
@example([b"ccollections\nOrderedDict\n)R}X\x0c\0\0\0__setstate__cos\nsystem\nsb"], True)  # BUILD
@example([b"Pos.system\n"], True)
@example([b"ctorch._tensor\n_rebuild_from_type_v2\nq\0(h\0N](h\0Nh\1etR"], True)
@example([b"ctorch\nFloatStorage.__reduce__\n)R"], True)
def test_any_operations_are_harmless(parts, whole):
    interpreted(b"\x80\x02" + b"".join(parts) + b"." * whole)


def real(name):
    with zipfile.ZipFile(Path(__file__).parent.parent / "formats" / "pytorch_files" / f"{name}.pth") as archive:
        return archive.read(f"{name}/data.pkl")


REAL = [real("zip"), real("protocol4")] + [
    pickle.dumps({"a": {"b": {"kernel": np.ones((2, 3), np.float32)}}, "c": [np.float64(1), {1}]}, protocol)
    for protocol in (0, 2, 5)
]


@MORE
@given(st.sampled_from(REAL).flatmap(damaged))
def test_damaged_pickles_are_harmless(content):
    interpreted(content)


def test_real_pickles_are_read():
    for content in REAL[:2]:
        assert len(interpreted(content)[0]) > 20
    for content in REAL[2:]:
        arrays, plain = interpreted(content)
        assert list(arrays) == ["a.b.kernel"]
        np.testing.assert_array_equal(plain["a"]["b"]["kernel"].read(), np.ones((2, 3)))


# --- what would take hours or all memory, were it built

SHARED = b"(" + b"K\1" * 50_000 + b"tq\0"  # a tuple in the memo
LONG_TEXT = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"q\1"
LARGE = b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20 + b"q\2"
BOMBS = {
    "a large tuple as arguments": SHARED + b"0" + b"ctorch\ndevice\nq\3" + b"0h\3h\0R" * 100_000 + b".",
    "a large tuple as shape": SHARED + b"0" + b"ctorch\nSize\nq\3" + b"0h\3h\0\x85R" * 100_000 + b".",
    "a text as shape": LONG_TEXT + b"0" + b"ctorch\nSize\nq\3" + b"h\3h\1\x85R" * 100_000 + b".",
    "a large tuple as a storage": SHARED + b"0" + b"h\0Q" * 100_000 + b".",
    "pairs again and again": b"](" + b"K\1K\2\x86" * 50_000 + b"eq\0" + b"ccollections\nOrderedDict\nq\3"
    + b"0h\3h\0\x85R" * 50_000 + b".",
    "a key that takes long to hash": LARGE + b"0}" + b"h\2K\1s" * 100_000 + b".",
    "a text that takes long to compare": LONG_TEXT + b"0}" + b"h\1K\1s" * 100_000 + b".",
    "digits": b"I" + b"9" * 2**21 + b"\n.",
    "long digits": b"L" + b"9" * 2**21 + b"L\n.",
    "lists doubled": b"]q\0" + b"(h\0h\0lq\0" * 100_000 + b".",
    "tuples doubled": b")q\0" + b"0h\0h\0\x86q\0" * 100_000 + b".",
    "dictionaries doubled": b"}q\0" + b"0}(X\1\0\0\0ah\0X\1\0\0\0bh\0uq\0" * 60 + b".",
    "long names of many": b"}X\xe8\3\0\0" + b"n" * 1000 + b"}" + b"".join(
        b"I%d\nctorch._utils\n_rebuild_sparse_tensor\n)Rs" % number for number in range(30_000)
    ) + b"s.",
    "a frame longer than the file": b"\x95" + b"\xff" * 8 + b"}.",
    "deep": b"}q\0" + b"X\1\0\0\0a}" * 100_000 + b"s" * 100_000 + b".",
    "duplicates": b"]" + b"2" * 300_000 + b".",
    "marks": b"(" * 300_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_pickle_takes_no_more_than_its_file(case):
    made = interpreted(b"\x80\x04" + BOMBS[case])
    assert made[0] in (None, {})


def test_its_own_text_never_becomes_a_module():
    """A name is looked up in a table: dots in it lead nowhere."""
    for name in ("torch.serialization", "torch._utils._rebuild_tensor_v2.__globals__", "collections.OrderedDict.x"):
        module, _, inner = name.rpartition(".")
        assert interpreted(f"c{module}\n{inner}\n)R.".encode()) == [None, None]
