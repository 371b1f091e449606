"""Schedules as data: checked when made, equal after JSON, named by what they do."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.sampling.orders import ORDERS
from hmar_jax.sampling.schedule import SCALARS, Schedule
from hmar_jax.scales import ScaleLadder

COUNTS = [[1], [1, 3], [2, 3, 4]]
CUSTOM = {
    "cfg": [[0.0], [0.5, 0.1], [1.0, 0.0, 2.0]],
    "temperature": [[1.0], [0.9, 0.8], [0.7, 0.6, 0.5]],
    "top_k": [[0], [10, 5], [4, 3, 2]],
    "top_p": [[1.0], [0.9, 0.9], [0.8, 0.7, 0.6]],
    "noise": [[0.0], [1.0, 2.0], [3.0, 4.0, 5.0]],
}


def test_official_guidance_is_a_ramp_on_next_scale_passes():
    schedule = Schedule.from_counts(COUNTS)
    assert schedule.cfg == ((0.0,), (0.85, 0.0), (1.7, 0.0, 0.0))
    assert schedule.plan.guided == ((False,), (True, False), (True, False, False))
    assert schedule.temperature == ((1.0,), (1.0, 1.0), (1.0, 1.0, 1.0))
    assert (schedule.top_k[2][0], schedule.top_p[2][0], schedule.noise[2][0]) == (1000, 0.99, 0)


def test_nested_scalars_are_taken_as_they_are():
    schedule = Schedule.from_counts(COUNTS, **CUSTOM)
    for name in SCALARS:
        assert [list(steps) for steps in getattr(schedule, name)] == CUSTOM[name]
    assert schedule.plan.guided == ((False,), (True, True), (True, False, True))


def test_passes_count_down_what_is_open():
    plan = Schedule.from_counts(COUNTS).plan
    passes = [tuple(at)[:4] for scale in range(3) for at in plan.passes(scale)]
    assert passes == [(0, 0, 0, 0), (1, 0, 1, 3), (1, 1, 2, 0), (2, 0, 3, 7), (2, 1, 4, 4), (2, 2, 5, 0)]


def test_controls_are_flat_arrays_in_the_order_of_passes():
    controls = Schedule.from_counts(COUNTS, **CUSTOM).controls
    for name in SCALARS:
        flat = [value for steps in CUSTOM[name] for value in steps]
        np.testing.assert_allclose(getattr(controls, name), flat, rtol=1e-6)
        assert getattr(controls, name).dtype == (jnp.int32 if name == "top_k" else jnp.float32)


def test_a_schedule_is_a_value():
    assert Schedule.from_counts(COUNTS) == Schedule.from_counts(tuple(map(tuple, COUNTS)))
    assert hash(Schedule.from_counts(COUNTS)) == hash(Schedule.from_counts(COUNTS))
    assert Schedule.from_counts(COUNTS).plan == Schedule.from_counts(COUNTS, cfg=3, top_p=0.5).plan


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ([[1], [1, 2]], ("[1, 2]", "scale 2", "sum to 3", "p²")),
        ([[1], []], ("[]", "scale 2", "sum to 0")),
        ([[1], [0, 4]], ("[0, 4]", "positive")),
        ([[1], [5, -1]], ("[5, -1]", "positive")),
        ([[2], [4]], ("[2]", "scale 1", "sum to 2")),
        ([[1, 3], [9]], ("[1, 3]", "scale 1", "one step")),
        ([], ("[]",)),
        ([1, 4], ("[1, 4]",)),
        (5, ("5",)),
        ([[1], ["a"]], ("'a'",)),
        ([[1], [1.5, 2.5]], ("1.5",)),
    ],
)
def test_counts_that_are_no_schedule_are_refused(counts, names):
    with pytest.raises(InputError) as error:
        Schedule.from_counts(counts)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"temperature": 0}, "temperature is 0.0; expected above 0"),
        ({"temperature": -1}, "temperature is -1.0"),
        ({"top_p": 0}, "top_p is 0.0; expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1; expected a whole number"),
        ({"top_k": 2.5}, r"top_k is 2\.5; expected a whole number, 0 \(off\) or more"),
        ({"top_k": 3e9}, "top_k is 3000000000; expected a whole number"),
        ({"top_k": math.nan}, "top_k is nan; expected a whole number"),
        ({"top_k": math.inf}, "top_k is inf; expected a whole number"),
        ({"noise": -0.5}, "noise is -0.5; expected 0 or more"),
        ({"cfg": math.nan}, "cfg is nan; expected a finite number"),
        ({"cfg": math.inf}, "^cfg is inf; expected a finite number"),
        ({"cfg": -math.inf}, "^cfg is -inf; expected a finite number"),
        ({"cfg": 1e39}, r"^cfg is 1e\+39; expected a finite number"),
        ({"refine_cfg": math.inf}, "^refine_cfg is inf; expected a finite number"),
        ({"temperature": math.inf}, "^temperature is inf; expected above 0, and finite"),
        ({"noise": math.inf}, "^noise is inf; expected 0 or more, and finite"),
        ({"top_p": math.nan}, "^top_p is nan; expected above 0"),
        ({"cfg": [[0], [1e39, 0], [0, 0, 0]]}, r"cfg is 1e\+39; expected a finite number"),
        ({"refine_cfg": math.nan}, "cfg is nan; expected a finite number"),
        ({"refine_cfg": [[0], [1, 1], [1, 1, 1]]}, r"refine_cfg is \[\[0\].*; expected a number"),
        ({"order": "spiral"}, "order is 'spiral'; expected confidence, random or halton"),
        ({"cfg": [[0], [1], [1, 1, 1]]}, r"cfg is .*; expected a number, or numbers nested like the counts"),
        ({"cfg": [0, 1, 2]}, "cfg is .* nested like"),
        ({"top_k": "many"}, "top_k is 'many'"),
        ({"noise": [[0], [1, 1], [1, 1, 1], [1]]}, "noise is .* nested like"),
    ],
)
def test_scalars_of_another_shape_or_range_are_refused(scalars, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_counts(COUNTS, **scalars)
    with pytest.raises(InputError, match=message):
        Schedule.from_counts(COUNTS).replace(**scalars)


@pytest.mark.parametrize("scalars", [{}, CUSTOM, {"cfg": -1.0, "top_k": 7}], ids=["defaults", "nested", "some"])
def test_json_gives_the_schedule_back(scalars):
    schedule = Schedule.from_counts(COUNTS, **scalars)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert set(json.loads(schedule.to_json())) == {"counts", "order", *SCALARS}


@pytest.mark.parametrize("order", ORDERS)
def test_json_keeps_the_order(order):
    schedule = Schedule.from_counts(COUNTS, order=order)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.plan.order == order


def test_json_without_an_order_has_the_published_one():
    fields = json.loads(Schedule.from_counts(COUNTS, **CUSTOM).to_json())
    del fields["order"]
    assert Schedule.from_json(json.dumps(fields)) == Schedule.from_counts(COUNTS, **CUSTOM, order="confidence")


def test_json_by_hand_needs_only_counts():
    assert Schedule.from_json('{"counts": [[1], [4]]}') == Schedule.from_counts([[1], [4]])
    given = Schedule.from_json('{"counts": [[1], [4]], "cfg": 3, "noise": [[0], [1]]}')
    assert given == Schedule.from_counts([[1], [4]], cfg=3, noise=[[0], [1]])
    given = Schedule.from_json('{"counts": [[1], [1, 3]], "refine_cfg": 2, "order": "halton"}')
    assert given == Schedule.from_counts([[1], [1, 3]], refine_cfg=2, order="halton")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "has 'counts'"),
        ('{"cfg": 1}', "has 'counts'"),
        ('{"counts": [[1]], "steps": 3}', "has 'counts'"),
        ('{"counts": [[2]]}', "sum to 2"),
        ('{"counts": 3}', "3"),
        ('{"counts": [[1]], "cfg": null}', "cfg is None"),
        ('{"counts": [[1]], "order": "spiral"}', "order is 'spiral'; expected confidence, random or halton"),
        ('{"counts": [[1]], "order": ["random"]}', "order is .'random'.; expected confidence"),
    ],
)
def test_json_that_is_no_schedule_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_json(text)


# --- replace


def test_replace_changes_what_is_given_and_nothing_else():
    schedule = Schedule.from_counts(COUNTS, **CUSTOM)
    assert schedule.replace() == schedule
    assert schedule.replace(cfg=None, noise=None) == schedule
    changed = schedule.replace(top_k=7, noise=CUSTOM["temperature"])
    assert changed.top_k == ((7.0,), (7.0, 7.0), (7.0, 7.0, 7.0))
    assert changed.noise == schedule.temperature
    assert (changed.counts, changed.cfg, changed.top_p) == (schedule.counts, schedule.cfg, schedule.top_p)


def test_a_number_for_cfg_guides_next_scale_passes_and_refine_cfg_masked_ones():
    schedule = Schedule.from_counts(COUNTS, cfg=2)
    assert schedule.cfg == ((0.0,), (1.0, 0.0), (2.0, 0.0, 0.0))
    refined = schedule.replace(refine_cfg=3)
    assert refined == Schedule.from_counts(COUNTS, cfg=2, refine_cfg=3)
    assert refined.cfg == ((0.0,), (1.0, 1.5), (2.0, 3.0, 3.0))
    assert refined.plan.guided == ((False,), (True, True), (True, True, True))
    assert refined.replace(cfg=4).cfg == ((0.0,), (2.0, 1.5), (4.0, 3.0, 3.0))
    assert refined.replace(refine_cfg=0) == schedule


def test_nested_guidance_is_taken_as_it_is_but_for_what_refine_cfg_says():
    assert Schedule.from_counts(COUNTS, cfg=CUSTOM["cfg"], refine_cfg=4).cfg == ((0.0,), (0.5, 2.0), (1.0, 4.0, 4.0))
    assert Schedule.from_counts(COUNTS, refine_cfg=4).replace(cfg=CUSTOM["cfg"]) == Schedule.from_counts(
        COUNTS, cfg=CUSTOM["cfg"]
    )


def test_numbers_of_numpy_are_numbers():
    given = {"cfg": np.float32(0.5), "top_k": np.int64(7), "refine_cfg": np.float64(2), "top_p": np.float32(0.5)}
    assert Schedule.from_counts(COUNTS, **given) == Schedule.from_counts(
        COUNTS, cfg=0.5, top_k=7, refine_cfg=2, top_p=0.5
    )


def test_one_scale_is_guided_not_at_all():
    assert Schedule.from_counts([[9]]).cfg == ((0.0,),)


# --- digests

SAME = {
    "spaces and order of JSON": lambda s: Schedule.from_json(
        json.dumps(dict(reversed(json.loads(s.to_json()).items())), indent=3)
    ),
    "whole numbers in JSON": lambda s: Schedule.from_json(s.to_json().replace(".0,", ",").replace(".0]", "]")),
    "digits beyond float32": lambda s: s.replace(temperature=0.9 + 1e-12),
    "noise where nothing is left open": lambda s: s.replace(noise=[[5.0], [0.0, 6.0], [1.0, 0.0, 7.0]]),
    "minus zero": lambda s: s.replace(cfg=[[-0.0], [0.5, -0.0], [1.0, 0.0, 2.0]]),
}
OTHER = {
    "counts": lambda s: Schedule.from_counts([[1], [3, 1], [2, 3, 4]], **{n: getattr(s, n) for n in SCALARS}),
    "order": lambda s: s.replace(order="random"),
    "another order": lambda s: s.replace(order="halton"),
    "cfg": lambda s: s.replace(cfg=2),
    "refine_cfg": lambda s: s.replace(refine_cfg=2),
    "temperature": lambda s: s.replace(temperature=0.901),
    "top_k": lambda s: s.replace(top_k=16_777_217),
    "top_k of one more, beyond float32": lambda s: s.replace(top_k=16_777_216),
    "top_p": lambda s: s.replace(top_p=0.9),
    "noise": lambda s: s.replace(noise=[[0.0], [0.0, 0.0], [1.5, 0.0, 0.0]]),
}
NAMED = Schedule.from_counts(
    COUNTS, cfg=[[0.0], [0.5, 0.0], [1.0, 0.0, 2.0]], temperature=0.9, noise=[[0.0], [0.0, 0.0], [1.0, 0.0, 0.0]]
)


@pytest.mark.parametrize("case", SAME)
def test_schedules_that_sample_alike_have_one_digest(case):
    assert SAME[case](NAMED).digest == NAMED.digest


def test_schedules_that_sample_differently_have_different_digests():
    digests = {name: change(NAMED).digest for name, change in OTHER.items()} | {"": NAMED.digest}
    assert len(set(digests.values())) == len(digests)


def test_an_order_counts_only_where_it_orders():
    single = Schedule.from_counts([[1], [4]])
    assert {single.replace(order=order, noise=noise).digest for order in ORDERS for noise in (0, 1)} == {single.digest}
    assert {single.replace(order=order).plan for order in ORDERS} == {single.plan}
    stepped = Schedule.from_counts([[1], [1, 3]], order="halton")
    assert stepped.digest == stepped.replace(noise=3).digest


def test_a_digest_is_the_same_in_another_process_and_for_good():
    schedule = Schedule.preset("official-256", ScaleLadder.preset(256))
    assert schedule.digest == "ae749a0e7161"
    code = (
        "from hmar_jax import ScaleLadder, Schedule;"
        "print(Schedule.preset('official-256', ScaleLadder.preset(256)).digest)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == schedule.digest


LADDER = ScaleLadder((1, 2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule.from_json(None), "The schedule is None; expected JSON"),
        (lambda: Schedule.from_json({"counts": COUNTS}), "The schedule is {'counts'.*; expected JSON"),
        (lambda: Schedule.from_json(b"\xff{"), "The schedule is not JSON"),
        (lambda: Schedule.from_json("[" * 100_000), "The schedule is not JSON"),
        (lambda: Schedule.from_json('{"counts": [[1' + "0" * 5000 + "]]}"), "The schedule is not JSON"),
        (
            lambda: Schedule.from_json('{"counts": [[1' + "0" * 400 + "]]}"),
            r"not JSON \(the number 1000.*… does not fit into 64 bits",
        ),
        (lambda: Schedule.from_json('{"counts": 7}'), "Counts are 7; expected whole numbers"),
        (lambda: Schedule.from_json('{"counts": [[1]], "cfg": null}'), "cfg is None; expected a number"),
        (
            lambda: Schedule.from_json('{"counts": [[1]], "cfg": 1' + "0" * 400 + "}"),
            r"not JSON \(the number 1000.* does not fit",
        ),
        (lambda: Schedule.from_json('{"counts": [[1]], "top_p": [["1"]]}'), r"top_p is \[\['1'\]\]; expected a number"),
        (lambda: Schedule.from_json("x" * 10_000), "The schedule is not JSON"),
        (lambda: Schedule.from_json(f'["{"x" * 10_000}"]'), "A schedule's JSON has 'counts'"),
        (lambda: Schedule.parse(None, LADDER), "The schedule is None; expected a Schedule, the name of one"),
        (lambda: Schedule.parse(3.5, LADDER), "The schedule is 3.5;"),
        (lambda: Schedule.parse("a\0.json", LADDER), r"The schedule is 'a\\x00.json';"),
        (lambda: Schedule.parse("\0", LADDER), r"Schedule '\\x00' is unknown"),
        (lambda: Schedule.parse("", LADDER), "Schedule '' is unknown"),
        (lambda: Schedule.parse("small", (1, 2, 3)), r"The ladder is \(1, 2, 3\); expected a ScaleLadder"),
        (lambda: Schedule.parse("small", LADDER, "d16"), "The depth is 'd16'; expected"),
        (lambda: Schedule.preset(None, LADDER), "Schedule None is unknown"),
        (lambda: Schedule.preset(["small"], LADDER), r"Schedule \['small'\] is unknown"),
        (lambda: Schedule.preset("small", None), "The ladder is None"),
        (lambda: Schedule.generate(None), "The ladder is None"),
        (lambda: Schedule.generate(LADDER, []), r"Curve \[\] is unknown"),
        (lambda: Schedule.generate(LADDER, "equal", [2]), r"The steps of curve 'equal' are \[2\]"),
        (lambda: Schedule.generate(LADDER, "equal", 2, 3), "Scales are 3; expected the first and the last"),
        (lambda: Schedule.generate(LADDER, "power", 2, exponent="2"), "The exponent of curve 'power' is '2'"),
        (lambda: Schedule.from_counts(None), "Counts are None"),
        (lambda: Schedule.from_counts([b"\1", b"\1\3"]), r"Counts are \[b'\\x01', b'\\x01\\x03'\]; expected"),
        (lambda: Schedule.from_counts([[1], {1, 3}]), r"Counts are \[\[1\], \{1, 3\}\]; expected"),
        (
            lambda: Schedule.from_counts([[1], [1, 3]], noise=[{0: 1}, b"\0\1"]),
            r"noise is \[\{0: 1\}, b'.*expected a number",
        ),
        (lambda: Schedule.from_counts([["1"]]), r"Counts are \[\['1'\]\]"),
        (lambda: Schedule.from_counts([[10**5000]]), r"Counts \(list\) of scale 1 sum to \(int\); expected one step"),
        (lambda: Schedule.from_counts(COUNTS, cfg="1"), "cfg is '1'; expected a number"),
        (lambda: Schedule.from_counts(COUNTS, order=None), "order is None; expected confidence, random or halton"),
        (lambda: Schedule.from_counts(COUNTS).check_ladder("256"), "The ladder is '256'"),
        (lambda: Schedule.from_counts(COUNTS).replace(noise={}), r"noise is \{\}; expected a number"),
    ],
)
def test_odd_arguments_get_one_sentence(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
