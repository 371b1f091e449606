"""Token caches: what is read of a damaged one is what the undamaged one holds, or a sentence refuses it."""

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import ODD_VALUES, damaged, odd_json

from hmar_jax.data import tokens
from hmar_jax.data.tokens import HEADER, TokenSource, write_token_cache
from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

LADDER = ScaleLadder((1, 2))
CLASSES = ("a", "b", "é")
SHARD = "tokens-00001-of-00002.array_record"


def write(folder, seed=0):
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, 300, (2, 6, LADDER.length)), np.arange(6) % 3
    fields = {"ladder": LADDER, "codebook_size": 300, "crops": 2, "class_names": CLASSES}
    write_token_cache(folder, [batch], **fields, tokenizer="sha:1", source="glyphs", shard_size=3)
    return folder


def read(folder):
    """Everything that a cache says, or None where a sentence refuses it."""
    try:
        source = TokenSource(folder)
        examples = [(example["tokens"].tolist(), int(example["label"])) for example in source]
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 500
        return None
    names = ("ladder", "codebook_size", "crops", "class_names", "tokenizer", "source", "dtype")
    return examples, [getattr(source, name) for name in names]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def whole(cache):
    return read(cache)


@contextlib.contextmanager
def replaced(file: Path, content: bytes):
    """The file with other content for the block."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


HEADER_OF_TESTS = json.loads(
    '{"sides": [1, 2], "codebook_size": 300, "crops": 2, "count": 6, "class_names": ["a", "b", "\\u00e9"], '
    '"tokenizer": "sha:1", "source": "glyphs", "shards": 2, "dtype": "float32", "format": 1}'
)


@given(st.data())
def test_a_header_that_was_changed_says_the_same_or_is_told_or_refused(cache, whole, data):
    content = (cache / HEADER).read_bytes()
    odd = data.draw(damaged(content) | odd_json(json.loads(content)))
    with replaced(cache / HEADER, odd), mock.patch.object(tokens.logger, "warning") as told:
        tokens._tell_of_change.cache_clear()
        assert read(cache) in (None, whole) or told.called or "digest" not in json.loads(odd)


@given(odd_json(HEADER_OF_TESTS))
@example(json.dumps(HEADER_OF_TESTS | {"shards": 10**9}).encode())
@example(json.dumps(HEADER_OF_TESTS | {"shards": 10**9, "count": 10**18}).encode())
@example(json.dumps(HEADER_OF_TESTS | {"class_names": ["a", "b"]}).encode())
@example(json.dumps(HEADER_OF_TESTS | {"sides": [1, 10**9]}).encode())
def test_a_header_without_digests_is_refused_or_fits_the_records(cache, whole, content):
    with replaced(cache / HEADER, content):
        found = read(cache)
    if found is not None:  # names and words may be others; numbers may not
        header = json.loads(content)
        assert found[0] == whole[0]
        assert header["codebook_size"] > max(max(map(max, tokens)) for tokens, _ in found[0])
        assert len(set(header["class_names"])) == len(header["class_names"]) != 1 != 2
        assert (header["crops"], header["count"], header["shards"]) == (2, 6, 2)


def check_shard(cache, whole, content, *, digests=True):
    """What is read of a cache whose second shard has another content, with the digests of shards or without."""
    header = (cache / HEADER).read_bytes() if digests else json.dumps(HEADER_OF_TESTS).encode()
    with replaced(cache / SHARD, content), replaced(cache / HEADER, header):
        assert read(cache) in (None, whole)


@given(st.data(), st.booleans())
def test_a_damaged_shard_gives_the_same_or_is_refused(cache, whole, data, digests):
    check_shard(cache, whole, data.draw(damaged((cache / SHARD).read_bytes())), digests=digests)


@given(st.data())
def test_a_flipped_bit_of_what_a_shard_says_is_told(cache, whole, data):
    """Most of a small shard is padding; these bits are in the rest, where array_record has checksums of its own."""
    content = bytearray((cache / SHARD).read_bytes())
    used = np.flatnonzero(np.frombuffer(content, np.uint8)).tolist()
    for at in data.draw(st.lists(st.sampled_from(used), min_size=1, max_size=4)):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    check_shard(cache, whole, bytes(content), digests=False)


@given(st.sampled_from(ODD_VALUES), st.sampled_from(["count", "crops", "shards", "codebook_size"]))
def test_an_odd_number_is_refused(cache, value, name):
    if value == HEADER_OF_TESTS[name]:
        return
    with replaced(cache / HEADER, json.dumps(HEADER_OF_TESTS | {name: value}).encode()):
        found = read(cache)
    assert found is None or (name == "codebook_size" and isinstance(value, int) and 300 <= value <= 2**16)


def test_a_shard_of_another_cache_is_refused(cache, tmp_path):
    other = write(tmp_path / "other", seed=1)
    shutil.copytree(cache, tmp_path / "cache")
    shutil.copy(other / SHARD, tmp_path / "cache" / SHARD)
    assert read(tmp_path / "cache") is None
