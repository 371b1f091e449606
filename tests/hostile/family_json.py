"""JSON texts: what is accepted is what the undamaged text says, written another way."""

import json
import math

from hypothesis import example, given
from hypothesis import strategies as st
from mutations import ODD_JSON, damaged, odd_json

from hmar_jax.errors import InputError
from hmar_jax.files import json_files

CONTENT = {"format": 1, "names": ["a", "é", ""], "size": 1.5, "nested": {"empty": {}, "none": None, "yes": [True, -3]}}


def check(content):
    try:
        value = json_files.parse(content, "The file", "write it again")
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300
        return
    assert json.loads(json.dumps(value, allow_nan=False).encode()) == value == json.loads(content.decode("utf-8-sig"))


@given(odd_json(CONTENT) | damaged(json.dumps(CONTENT).encode()))
def test_a_json_text_is_read_or_refused(content):
    check(content)


@given(st.sampled_from(ODD_JSON))
@example(b'{"a": 1, "a": 2}')
@example(b'"\\ud800"')
@example(b"[" + b"[]," * 100_000 + b"[]]")
def test_odd_texts_are_read_or_refused(content):
    check(content)


def test_what_every_json_file_of_ours_has_is_read():
    assert json_files.parse(b"\xef\xbb\xbf" + json.dumps(CONTENT).encode(), "The file", "write it") == CONTENT
    assert json_files.parse(str(2**63), "The file", "write it") == 2**63
    assert math.isclose(json_files.parse("1e-300", "The file", "write it"), 1e-300)
