"""Schedules as data: checked when made, equal after JSON, the published presets."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.sampling.schedule import PRESETS, SCALARS, Schedule
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
        ({"top_k": -1}, "top_k is -1.0; expected a whole number"),
        ({"top_k": 2.5}, r"top_k is 2\.5; expected a whole number, 0 \(off\) or more"),
        ({"top_k": 3e9}, r"top_k is 3000000000\.0; expected a whole number"),
        ({"top_k": math.nan}, "top_k is nan; expected a whole number"),
        ({"top_k": math.inf}, "top_k is inf; expected a whole number"),
        ({"noise": -0.5}, "noise is -0.5; expected 0 or more"),
        ({"cfg": math.nan}, "cfg is nan; expected a finite number"),
        ({"cfg": math.inf}, "cfg is (inf|nan)"),
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
    assert set(json.loads(schedule.to_json())) == {"counts", *SCALARS}


def test_json_by_hand_needs_only_counts():
    assert Schedule.from_json('{"counts": [[1], [4]]}') == Schedule.from_counts([[1], [4]])
    given = Schedule.from_json('{"counts": [[1], [4]], "cfg": 3, "noise": [[0], [1]]}')
    assert given == Schedule.from_counts([[1], [4]], cfg=3, noise=[[0], [1]])


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
    ],
)
def test_json_that_is_no_schedule_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        Schedule.from_json(text)


# --- presets

OFFICIAL = [("official-256", "256", 14), ("official-512", "512", 15), ("official-1024", "1024", 20)]


@pytest.mark.parametrize(("name", "resolution", "passes"), OFFICIAL)
def test_official_presets_have_the_published_passes(name, resolution, passes):
    ladder = ScaleLadder.preset(resolution)
    schedule = Schedule.preset(name, ladder)
    assert sum(len(steps) for steps in schedule.counts) == passes
    assert tuple(sum(steps) for steps in schedule.counts) == ladder.lengths
    assert schedule.has_masked_steps
    # guided on the ramp, the first scale and all masked passes not: their null half would go unused
    last = ladder.num_scales - 1
    assert [steps[0] for steps in schedule.cfg] == pytest.approx([1.7 * k / last for k in range(last + 1)])
    assert not any(value for steps in schedule.cfg for value in steps[1:])


@pytest.mark.parametrize(("depth", "cfg", "top_k"), [(16, 1.7, 1000), (20, 1.9, 950), (24, 2.1, 900), (30, 1.6, 650)])
def test_official_guidance_goes_by_depth(depth, cfg, top_k):
    schedule = Schedule.preset("official-256", ScaleLadder.preset("256"), depth)
    assert schedule.cfg[-1][0] == pytest.approx(cfg)
    assert {value for steps in schedule.top_k for value in steps} == {top_k}
    assert {value for steps in schedule.top_p for value in steps} == {0.99}


@pytest.mark.parametrize(("name", "resolution", "_"), OFFICIAL)
def test_an_official_preset_for_another_ladder_is_refused(name, resolution, _):
    with pytest.raises(InputError, match=f"{name} is for the sides 1,2,3.*built for 1,2,3,4,5;.*'next-scale'"):
        Schedule.preset(name, ScaleLadder((1, 2, 3, 4, 5)))


@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (2, 5), (3,), (1, 4, 7), *[(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]])
def test_next_scale_and_small_fit_any_ladder(sides):
    ladder = ScaleLadder(sides)
    plain, small = Schedule.preset("next-scale", ladder), Schedule.preset("small", ladder)
    assert plain.counts == tuple((side * side,) for side in sides)
    assert not plain.has_masked_steps
    assert small.has_masked_steps == any(side in (2, 3, 4) for side in sides[1:])
    small.check_ladder(ladder)


def test_an_unknown_preset_is_named_with_all_there_are():
    with pytest.raises(InputError, match="'official'") as error:
        Schedule.preset("official", ScaleLadder((1, 2)))
    for name in PRESETS:
        assert name in str(error.value)


# --- replace


def test_replace_changes_what_is_given_and_nothing_else():
    schedule = Schedule.from_counts(COUNTS, **CUSTOM)
    assert schedule.replace() == schedule
    assert schedule.replace(cfg=None, noise=None) == schedule
    changed = schedule.replace(top_k=7, noise=CUSTOM["temperature"])
    assert changed.top_k == ((7.0,), (7.0, 7.0), (7.0, 7.0, 7.0))
    assert changed.noise == schedule.temperature
    assert (changed.counts, changed.cfg, changed.top_p) == (schedule.counts, schedule.cfg, schedule.top_p)


def test_a_number_for_cfg_is_ramped_again():
    assert Schedule.from_counts(COUNTS, **CUSTOM).replace(cfg=2).cfg == ((0.0,), (1.0, 0.0), (2.0, 0.0, 0.0))


def test_one_scale_is_guided_not_at_all():
    assert Schedule.from_counts([[9]]).cfg == ((0.0,),)
