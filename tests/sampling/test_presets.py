"""Schedules by name and in one line: presets with their guidance, files, curves."""

import dataclasses

import pytest

from hmar_jax.config import TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.sampling import presets
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

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
    for name in presets.NAMES:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("depth", "nearest"), [(1, 16), (16, 16), (17, 16), (18, 16), (19, 20), (22, 20), (27, 24), (28, 30), (36, 30)]
)
def test_a_depth_without_guidance_of_its_own_has_that_of_the_nearest(depth, nearest):
    assert presets.guidance(depth) == presets.guidance(nearest)
    assert (
        presets.guidance(depth, "var") == presets.guidance(nearest, "var") == {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    )


@pytest.mark.parametrize("schedule", [None, "small", "equal:2"])
def test_it_is_said_once_whose_guidance_a_depth_has(caplog, schedule):
    ladder, published = ScaleLadder((1, 2, 3)), TransformerConfig.preset("d16")
    other = dataclasses.replace(published, depth=28, branch_depth=8)
    presets._note.cache_clear()
    with caplog.at_level("INFO", "hmar_jax"):
        Schedule.resolve(schedule, ladder, published)
        Schedule.resolve(schedule, ladder, other, cfg=2, top_k=5)
        Schedule.resolve("var", ladder, other)
        Schedule.resolve(Schedule.preset("small", ladder), ladder, other)
        assert caplog.messages == []
        Schedule.resolve(schedule, ladder, other, cfg=2)
        Schedule.resolve(schedule, ladder, other)
    (said,) = caplog.messages
    assert said.startswith("No guidance was published for depth 28; cfg 1.6 and top-k 650 are those of depth 30")


# --- one line of text


@pytest.mark.parametrize("name", ["small", "next-scale", "var", "official-256"])
def test_a_preset_in_one_line_is_the_preset(name):
    ladder = ScaleLadder.preset(256)
    assert Schedule.parse(name, ladder, 30) == Schedule.preset(name, ladder, 30)


def test_a_file_in_one_line_is_the_schedule_in_it(tmp_path):
    schedule = Schedule.from_counts([[1], [1, 3], [2, 3, 4]], top_k=[[0], [10, 5], [4, 3, 2]], order="random")
    (tmp_path / "s.json").write_text(schedule.to_json())
    assert Schedule.parse(str(tmp_path / "s.json"), ScaleLadder((1, 2, 3))) == schedule
    with pytest.raises(InputError, match=r"^Schedule file .*s\.json is for the sides 1,2,3, but the model .* 1,2,4;"):
        Schedule.parse(str(tmp_path / "s.json"), ScaleLadder((1, 2, 4)))
    (tmp_path / "u.json").write_text('{"counts": [[1], [2]]}')
    with pytest.raises(InputError, match=r"^Schedule file .*u\.json: Counts \[2\] of scale 2 sum to 2"):
        Schedule.parse(str(tmp_path / "u.json"), ScaleLadder((1, 2, 3)))
    with pytest.raises(InputError, match=r"^Schedule file .*t\.json cannot be read .*Schedule\.to_json"):
        Schedule.parse(str(tmp_path / "t.json"), ScaleLadder((1, 2, 3)))


@pytest.mark.parametrize(
    "text", ["quick", "", "cosin:4", "cosine:", "cosine:-1", "cosine:4@", "cosine:4@2-", "power..:2"]
)
def test_a_line_that_is_no_schedule_is_answered_with_all_there_are(text):
    with pytest.raises(InputError, match="such as cosine:4, equal:2@7 or power2:4@5-9") as error:
        Schedule.parse(text, ScaleLadder((1, 2, 3)))
    assert f"Schedule {text!r} is unknown; choose {', '.join(presets.NAMES)}, a .json file" in str(error.value)
