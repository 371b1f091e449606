"""The ladder's geometry against plain loops over tokens."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.scales import MOST_TOKENS, ScaleLadder

ladders = st.sets(st.integers(1, 9), min_size=1, max_size=5).map(lambda sides: ScaleLadder(tuple(sorted(sides))))


@pytest.mark.parametrize(
    ("name", "sides", "length"),
    [
        ("64", (1, 2, 3, 4), 30),
        ("128", (1, 2, 3, 4, 5, 6, 8), 155),
        ("256", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 680),
        ("512", (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 2240),
        ("1024", (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), 9451),
    ],
)
def test_presets_are_the_published_sides(name, sides, length):
    ladder = ScaleLadder.preset(name)
    assert (ladder.sides, ladder.length) == (sides, length)
    assert ScaleLadder.preset(int(name)) == ladder
    assert ladder.sides[-1] * 16 == int(name)


def test_an_unknown_preset_is_named():
    with pytest.raises(InputError, match=r"No ladder is named \(int\); choose one of 64"):
        ScaleLadder.preset(10**5000)
    with pytest.raises(InputError, match=r"No ladder is named '300'; choose one of 64, 128, 256, 512, 1024\."):
        ScaleLadder.preset("300")


@hypothesis.given(ladders)
def test_parse_reads_sides_back(ladder):
    assert ScaleLadder.parse(",".join(map(str, ladder.sides))) == ladder


def test_parse_takes_the_pixels_of_a_published_ladder():
    assert ScaleLadder.parse("512") == ScaleLadder.preset("512")
    assert ScaleLadder.parse("16") == ScaleLadder((16,))
    with pytest.raises(InputError, match=r"Sides '1,x' are not a list of whole numbers.* those are 64, 128, 256, 512"):
        ScaleLadder.parse("1,x")
    with pytest.raises(InputError, match=r"Sides \(3, 2\) are not an increasing list"):
        ScaleLadder.parse("3,2")


@hypothesis.given(ladders)
def test_lengths_offsets_ids_and_slices_count_tokens_one_by_one(ladder):
    ids = [scale for scale, side in enumerate(ladder.sides) for _ in range(side * side)]
    assert ladder.num_scales == len(ladder.sides)
    assert ladder.length == len(ids)
    np.testing.assert_array_equal(ladder.scale_ids, ids)
    assert ladder.scale_ids.dtype == np.int32
    assert ladder.lengths == tuple(ids.count(scale) for scale in range(ladder.num_scales))
    assert ladder.offsets == (*(ids.index(scale) for scale in range(ladder.num_scales)), len(ids))
    for scale, where in enumerate(ladder.slices):
        assert set(ids[where]) == {scale}
    assert [scale for where in ladder.slices for scale in ids[where]] == ids


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
@hypothesis.given(ladder=ladders)
def test_key_ranges_hold_exactly_the_scales_a_token_may_see(pattern, ladder):
    ids = [scale for scale, side in enumerate(ladder.sides) for _ in range(side * side)]
    ranges = ladder.key_ranges(pattern)
    assert ranges.shape == (ladder.length, 2)
    assert ranges.dtype == np.int32
    for (start, end), own in zip(ranges, ids, strict=True):
        sees = [j for j, scale in enumerate(ids) if scale == own or (pattern == "block_causal" and scale < own)]
        assert list(range(start, end)) == sees


def test_an_unknown_pattern_is_named():
    with pytest.raises(InputError, match="The attention pattern is 'causal'; expected 'block_diag"):
        ScaleLadder((1, 2)).key_ranges("causal")


@pytest.mark.parametrize("sides", [(), (0, 1), (-2, 1), (2, 2), (1, 3, 2)])
def test_sides_that_do_not_increase_from_one_are_refused(sides):
    with pytest.raises(InputError, match="increasing list of positive integers") as error:
        ScaleLadder(sides)
    assert str(sides) in str(error.value)


@pytest.mark.parametrize("sides", [(1, 512), (1, 30_000), (2**62,), range(1, 10**6)], ids=lambda sides: str(sides)[:20])
def test_ladders_of_too_many_tokens_are_refused(sides):
    with pytest.raises(InputError, match=r"^Sides \(.* have \d+ tokens; expected 262144 at most\.$") as error:
        ScaleLadder(sides)
    assert len(str(error.value)) < 200


def test_ladders_of_as_many_tokens_as_a_picture_may_have_are_taken():
    assert ScaleLadder((512,)).length == MOST_TOKENS


def test_a_ladder_is_a_value():
    ladder = ScaleLadder([1, 2])
    assert ladder == ScaleLadder((1, 2))
    assert hash(ladder) == hash(ScaleLadder((1, 2)))
    assert ladder != ScaleLadder((1, 3))


@hypothesis.given(ladders)
def test_only_is_the_ladder_of_one_scale(ladder):
    assert [ladder.only(scale).sides for scale in range(ladder.num_scales)] == [(side,) for side in ladder.sides]


@pytest.mark.parametrize(
    "sides",
    [
        7,
        None,
        (1, 2.9),
        (1, 2.0),
        "12",
        b"\1\2",
        bytearray(b"\1\2"),
        {1, 2},
        {1: 2},
        ("1", "2"),
        [[1], [2]],
        (1, None),
        (True, 2),
    ],
    ids=repr,
)
def test_sides_that_are_no_list_of_whole_numbers_are_refused(sides):
    with pytest.raises(InputError, match=r"^Sides are .*; expected an increasing list of positive integers") as error:
        ScaleLadder(sides)
    assert "\n" not in str(error.value)


def test_sides_may_be_any_list_of_whole_numbers():
    assert ScaleLadder(np.array([1, 2, 5])) == ScaleLadder([1, 2, 5]) == ScaleLadder((1, 2, 5))
    assert all(type(side) is int for side in ScaleLadder(np.array([1, 2])).sides)
