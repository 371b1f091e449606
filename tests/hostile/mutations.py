"""Hypothesis strategies of damaged bytes and odd JSON, for the families of this folder."""

import copy
import json
import math

from hypothesis import strategies as st

ODD_TEXTS = ["", " ", "\0", "\n", "\x1b[2J", "..", "/", "~", "A" * 5000, "‮", "é", "nan", "-1", "gs://a/b"]
ODD_NUMBERS = [-1, 0, 1, 2**31, 2**32, 2**63, 10**9, -(10**18), 0.5, -0.0, 1e39, 1e308, math.nan, math.inf]
ODD_VALUES = [*ODD_TEXTS, *ODD_NUMBERS, None, True, False, [], {}, [[]], [None], {"": 0}, [[1], [2, 3]]]
ODD_JSON = [
    b"",
    b"7",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"1" * 5000,
    b"[1e999]",
    b"\xff\xfe",
]


@st.composite
def damaged(draw, content):
    """Bytes with one to three faults: bits flipped, parts overwritten, cut out, repeated or put in, the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([1, 2, 4, 8, 64, 512])))
        match draw(st.sampled_from(["flip", "overwrite", "remove", "repeat", "insert", "cut"])):
            case "flip" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                data[start:stop] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"9", b"A"])) * (stop - start)
            case "remove":
                del data[start:stop]
            case "repeat":
                data[start:start] = data[start:stop] * draw(st.sampled_from([1, 3]))
            case "insert":
                data[start:start] = draw(st.binary(min_size=1, max_size=16))
            case _:
                del data[start:]
    return bytes(data)


@st.composite
def odd_json(draw, content):
    """The bytes of a JSON text whose value is `content` but for one or two places, or of none at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(ODD_JSON))
    holder = [copy.deepcopy(content)]
    for _ in range(draw(st.integers(1, 2))):
        parent, key = holder, 0
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 5)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"])):
            case "remove" if parent is not holder:
                del parent[key]
            case "repeat" if isinstance(parent, list) and parent is not holder:
                parent.insert(key, copy.deepcopy(parent[key]))
            case _:
                parent[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))  # the second place may be inside it
    return json.dumps(holder[0]).encode()
