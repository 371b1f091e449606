"""A directory of bulk samples, damaged: what is there still is what was written, the rest counts as not there."""

import io
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import ODD_JSON, damaged, odd_json
from tiny_models import TINY

from hmar_jax.bulk import samples
from hmar_jax.errors import HmarError
from hmar_jax.sampling.schedule import Schedule

KINDS = ("png", "array_record")
SETTINGS = {
    kind: samples.Settings("a test's", TINY, "float32", Schedule.from_counts([[1], [4], [9]]), pictures=kind)
    for kind in KINDS
}
SIDE, LENGTH = TINY.image_size, TINY.ladder.length
FILES = {  # of the second of two parts of two samples
    "png": ("tokens/0000000005.npz", "pictures/0/00001.png"),
    "array_record": ("tokens/0000000005.npz", "pictures/0000000005.array_record"),
}


def part(first, seed):
    rng = np.random.default_rng(seed)
    labels, indices = np.arange(2, dtype=np.int32), np.full(2, first // 5, np.int32)
    tokens = rng.integers(0, TINY.tokenizer.codebook_size, (2, LENGTH), np.uint16)
    return samples.Part(labels, indices, tokens, rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8))


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


GOOD = {"labels": part(5, 1).labels, "indices": part(5, 1).indices, "tokens": part(5, 1).tokens}


def changed(**arrays):
    return npz(**{**GOOD, **arrays})


def compressed():
    content = io.BytesIO()
    np.savez_compressed(content, **GOOD | {"tokens": np.zeros((2, 10**7), np.uint16)})
    return content.getvalue()


def claiming(shape):
    """Tokens whose header claims a shape that they do not have."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<u2", "fortran_order": False, "shape": shape})
    packed = io.BytesIO(changed())
    made = io.BytesIO()
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(made, "w") as new:
        for name in ("labels.npy", "indices.npy"):
            new.writestr(name, old.read(name))
        new.writestr("tokens.npy", content.getvalue() + bytes(100))
    return made.getvalue()


ODD_PARTS = {
    "negative labels": changed(labels=np.array([0, -1], np.int32)),
    "labels beyond the classes": changed(labels=np.array([0, 5], np.int32)),
    "negative indices": changed(indices=np.array([1, -1], np.int32)),
    "huge indices": changed(indices=np.array([1, 2**31 - 1], np.int32)),
    "a sample twice": changed(labels=np.zeros(2, np.int32)),
    "labels of another dtype": changed(labels=np.arange(2, dtype=np.int64)),
    "float labels": changed(labels=np.arange(2, dtype=np.float32)),
    "objects": changed(labels=np.array([0, "x"], object)),
    "labels of another shape": changed(labels=np.zeros((2, 1), np.int32)),
    "a scalar": changed(labels=np.int32(0)),
    "tokens beyond the codebook": changed(tokens=np.full((2, LENGTH), TINY.tokenizer.codebook_size, np.uint16)),
    "signed tokens": changed(tokens=np.zeros((2, LENGTH), np.int16)),
    "tokens of another length": changed(tokens=np.zeros((2, LENGTH + 1), np.uint16)),
    "no samples": npz(**{name: array[:0] for name, array in GOOD.items()}),
    "another array": changed(more=np.zeros(3)),
    "no tokens": npz(labels=GOOD["labels"], indices=GOOD["indices"]),
    "another part's": npz(**{**GOOD, "indices": np.full(2, 2, np.int32)}),
    "compressed": compressed(),
    "a claim of 2^50": claiming((2**25, 2**25)),
    "a negative claim": claiming((-2, LENGTH)),
    "no zip": b"7",
    "empty": b"",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """kind → a directory of four samples in two parts."""
    folders = {}
    for kind in KINDS:
        folder = samples._Folder(tmp_path_factory.mktemp("bulk") / kind, SETTINGS[kind])
        folder.open()
        with samples.ThreadPoolExecutor(2) as pool:
            for first, seed in ((0, 0), (5, 1)):
                folder.write(part(first, seed), pool)
        folders[kind] = folder.path
    return folders


def there(kind, whole, name, content):
    """The numbers that are there once a file of a copy of the directory has other content; InputErrors are raised."""
    with tempfile.TemporaryDirectory() as parent:
        path = Path(shutil.copytree(whole, Path(parent) / "copy"))
        (path / name).unlink(missing_ok=True)
        (path / name).write_bytes(content)
        folder = samples._Folder(path, SETTINGS[kind])
        folder.check()
        numbers = folder.open().tolist()
        # What was removed is drawn again; what is left is all of it.
        assert folder.look()[0].tolist() == numbers
        return numbers


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_directory_is_whole(written, kind):
    name = FILES[kind][0]
    assert there(kind, written[kind], name, (written[kind] / name).read_bytes()) == [0, 1, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ODD_PARTS)
def test_a_part_that_the_settings_do_not_make_is_not_there(written, kind, case):
    assert there(kind, written[kind], FILES[kind][0], ODD_PARTS[case]) == [0, 1]


@settings(max_examples=settings().max_examples * 4)
@given(data=st.data(), kind=st.sampled_from(KINDS), which=st.integers(0, 1))
def test_a_damaged_file_has_its_part_drawn_again(written, data, kind, which):
    name = FILES[kind][which]
    whole = (written[kind] / name).read_bytes()
    content = data.draw(damaged(whole))
    found = there(kind, written[kind], name, content)
    assert found in ([0, 1], [0, 1, 5, 6])
    if found == [0, 1, 5, 6]:
        assert same(name, content, whole)


def same(name, content, whole):
    """Whether two files hold the same, by an independent reading."""
    if name.endswith(".npz"):
        with np.load(io.BytesIO(content)) as one, np.load(io.BytesIO(whole)) as other:
            return all(np.array_equal(one[array], other[array]) for array in other.files)
    return content == whole or (name.endswith("array_record") and records(content) == records(whole))


def records(content):
    """All records of an array_record file; between them are bytes that mean nothing."""
    with tempfile.NamedTemporaryFile(suffix=".array_record") as file:
        file.write(content)
        file.flush()
        source = ArrayRecordDataSource([file.name])
        found = [source[i] for i in range(len(source))]
        source.__exit__(None, None, None)
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(written, kind):
    """At places all over a picture file and a part."""
    for name in FILES[kind]:
        whole = (written[kind] / name).read_bytes()
        used = len(whole.rstrip(b"\0"))  # array_record fills blocks of 64 KiB
        for at in range(0, used, max(used // 60, 1)):
            content = bytearray(whole)
            content[at] ^= 1
            found = there(kind, written[kind], name, bytes(content))
            assert found == [0, 1] or same(name, bytes(content), whole), (name, at)


MANIFEST = json.loads(json.dumps(samples.to_plain(SETTINGS["png"])))


@settings(max_examples=settings().max_examples * 4)
@given(content=odd_json(MANIFEST) | damaged(json.dumps(MANIFEST).encode()) | st.sampled_from(ODD_JSON))
@example(json.dumps(MANIFEST | {"seed": 0.0}).encode())
@example(json.dumps(MANIFEST | {"seed": False}).encode())
@example(json.dumps(MANIFEST | {"\x1b[2J" * 100: 1}).encode())
def test_settings_are_the_same_or_refused(written, content):
    try:
        found = there("png", written["png"], samples.MANIFEST, content)
    except HmarError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 600
    else:
        assert found == [0, 1, 5, 6]
        assert json.dumps(json.loads(content), sort_keys=True) == json.dumps(MANIFEST, sort_keys=True)
