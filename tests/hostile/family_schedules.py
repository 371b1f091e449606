"""Schedules as JSON: what is accepted is the schedule that the JSON describes, read in another way."""

import json
import math

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import ODD_JSON, damaged, odd_json

from hmar_jax.errors import InputError
from hmar_jax.sampling.schedule import SCALARS, Schedule
from hmar_jax.scales import ScaleLadder

LADDER = ScaleLadder((1, 2, 3, 4))
REAL = Schedule.generate(LADDER, "cosine", 3, (2, 4), cfg=2.0, refine_cfg=0.5, top_k=50, temperature=0.9, noise=1.0)
BY_HAND = {"counts": [[1], [1, 3], [2, 3, 4]], "cfg": 1.5, "refine_cfg": 0.5, "top_p": 0.9, "order": "halton"}
CONTENTS = [json.loads(REAL.to_json()), BY_HAND]
DEFAULTS = {"cfg": 1.7, "temperature": 1.0, "top_k": 1000, "top_p": 0.99, "noise": 0.0}


def described(fields):
    """Counts, scalars and order that a JSON describes, by the rules that the class documents."""
    counts = fields["counts"]
    found = {}
    for name in SCALARS:
        value = fields.get(name, DEFAULTS[name])
        if name == "cfg" and not isinstance(value, list):  # ramped over the scales, none on masked passes
            last = max(len(counts) - 1, 1)
            value = [[value * k / last if step == 0 else 0 for step in range(len(c))] for k, c in enumerate(counts)]
        elif not isinstance(value, list):
            value = [[value] * len(steps) for steps in counts]
        found[name] = value
    if fields.get("refine_cfg") is not None:
        last = max(len(counts) - 1, 1)
        for k, steps in enumerate(found["cfg"]):
            steps[1:] = [fields["refine_cfg"] * k / last] * (len(steps) - 1)
    return counts, found, fields.get("order", "confidence")


def check(content):
    try:
        made = Schedule.from_json(content)
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300, str(error)
        return
    counts, scalars, order = described(json.loads(content))
    assert [list(steps) for steps in made.counts] == counts
    assert all(math.isqrt(sum(steps)) ** 2 == sum(steps) > 0 for steps in counts)
    for name, value in scalars.items():
        assert [list(steps) for steps in getattr(made, name)] == [list(map(float, steps)) for steps in value]
        assert not any(isinstance(number, bool) for steps in value for number in steps)
    assert made.order == order
    assert Schedule.from_json(made.to_json()) == made
    assert len(made.digest) == 12


more = hypothesis.settings(max_examples=20 * hypothesis.settings().max_examples)


@more
@given(st.sampled_from(CONTENTS).flatmap(odd_json))
@example(b'{"counts": [[true], [4]]}')
@example(b'{"counts": [[1], [4]], "top_p": true}')
@example(b'{"counts": [[1], [4]], "cfg": null}')
@example(b'{"counts": [[1.0], [4]]}')
@example(b'{"counts": [[1], [4]], "counts": [[1], [9]]}')
@example(json.dumps({"counts": [[1], *([[1] * 10_000]) * 10]}).encode())
@example(json.dumps({"counts": [[1], [4]], "order": "x\n\x1b[2J" * 5000}).encode())
def test_a_schedule_of_odd_values_is_what_it_says_or_refused(content):
    check(content)


@more
@given(st.sampled_from(CONTENTS).flatmap(lambda content: damaged(json.dumps(content).encode())))
def test_a_damaged_schedule_is_what_it_says_or_refused(content):
    check(content)


@pytest.mark.parametrize("content", ODD_JSON)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    file = tmp_path / "s.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"^Schedule file .*s\.json"):
        Schedule.parse(file, LADDER)


CURVES = ["single", "equal", "cosine", "arccos", "power", "Power", ""]
NUMBERS = ["", "0", "1", "4", "2.5", "1e308", "-1", "9" * 9, "9" * 400, "0." + "0" * 400 + "1", "٣", "nan"]


@more
@given(
    curve=st.sampled_from(CURVES),
    exponent=st.sampled_from(NUMBERS),
    steps=st.sampled_from(NUMBERS),
    scales=st.tuples(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS)),
)
def test_a_line_is_the_curve_that_it_names_or_refused(curve, exponent, steps, scales):
    line = f"{curve}{exponent}:{steps}@{'-'.join(scales)}"
    try:
        made = Schedule.parse(line, LADDER)
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300, str(error)
        return
    assert made.sides == LADDER.sides
    for scale, counts in enumerate(made.counts, 1):
        expected = int(steps) if int(scales[0]) <= scale <= int(scales[1] or scales[0]) and scale > 1 else 1
        assert len(counts) == min(expected, scale**2)


def test_passes_are_bounded_before_they_are_made():
    with pytest.raises(InputError, match="make 250001 passes; expected 16384 at most"):
        Schedule.generate(ScaleLadder((1, 500)), "equal", 10**9)


def test_every_token_of_the_largest_ladder_may_have_a_pass_of_its_own():
    ladder = ScaleLadder.preset(1024)
    assert sum(map(len, Schedule.generate(ladder, "equal", 10**9).counts)) == ladder.length
