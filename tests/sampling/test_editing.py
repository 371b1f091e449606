"""Editing: what is kept stays bit for bit, for any mask; drawn is the rest, by passes that see what is kept."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY

from hmar_jax import InputError, ScaleLadder, Schedule
from hmar_jax.model import Model
from hmar_jax.sampling import editing, program, regions
from hmar_jax.sampling.sampler import Kept

IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 6, 6, 3)).astype(np.float32)
LABELS = [4, 0, 2]
NULL = 5
FULL, EMPTY = np.ones((3, 6, 6), bool), np.zeros((3, 6, 6), bool)
PIXEL = np.arange(36).reshape(6, 6) == 15

MASK = regions.box_mask([1, 2, 5, 6], 6, 6)

MASKS = hnp.arrays(bool, (3, 6, 6))
LADDERS = st.sets(st.integers(1, 9), min_size=1, max_size=5).map(lambda sides: ScaleLadder(tuple(sorted(sides))))


@st.composite
def geometries(draw):
    """A ladder, and a mask of one picture for it."""
    ladder, patch = draw(LADDERS), draw(st.integers(1, 3))
    return ladder, draw(hnp.arrays(bool, (1, ladder.sides[-1] * patch, ladder.sides[-1] * patch)))


def edit(network, images=IMAGES, mask=MASK, labels=LABELS, schedule=None, **settings):
    """An edit with filters off, that all tokens can be drawn; it records always, so that one program serves many."""
    return network.edit(images, mask, labels, schedule, **{"top_k": 0, "top_p": 1.0, "record": True} | settings)


def maps(keep, ladder):
    """Joined (B,L) → K arrays (B,p,p)."""
    return [keep[:, where].reshape(-1, side, side) for where, side in zip(ladder.slices, ladder.sides, strict=True)]


# --- which tokens are kept


@hypothesis.given(geometries())
def test_at_the_last_scale_a_token_is_kept_where_no_pixel_of_its_patch_is_masked(geometry):
    ladder, mask = geometry
    finest = maps(editing.keep_tokens(mask, ladder), ladder)[-1][0]
    patch = mask.shape[1] // ladder.sides[-1]
    for (row, column), kept in np.ndenumerate(finest):
        touched = mask[0, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].any()
        assert kept == (not touched or ladder.sides == (1,))


def interpolated(rows, side):
    """Each row of (n,m) read at `side` half-pixel centres: (n,side)."""
    places = np.arange(rows.shape[1])
    centres = (np.arange(side) + 0.5) * len(places) / side - 0.5
    return np.stack([np.interp(centres, places, row) for row in rows])


@hypothesis.given(geometries())
def test_at_coarser_scales_the_resized_mask_decides(geometry):
    """Bilinear at half-pixel centres, not antialiased, kept from one half on."""
    ladder, mask = geometry
    *coarser, finest = maps(editing.keep_tokens(mask, ladder), ladder)
    for kept, side in zip(coarser, ladder.sides, strict=False):
        if side == 1:
            assert kept.all()
            continue
        share = interpolated(interpolated(finest[0].astype(float), side).T, side).T[None]
        clear = np.abs(share - 0.5) > 1e-5
        np.testing.assert_array_equal(kept[clear], (share > 0.5)[clear])
        assert kept[~clear].all()


@hypothesis.given(geometries())
def test_turned_masks_keep_turned_tokens(geometry):
    ladder, mask = geometry
    kept = maps(editing.keep_tokens(mask, ladder), ladder)
    for turn in (lambda x: x[:, ::-1], lambda x: x[:, :, ::-1], lambda x: x.swapaxes(1, 2)):
        for before, after in zip(kept, maps(editing.keep_tokens(turn(mask), ladder), ladder), strict=True):
            np.testing.assert_array_equal(turn(before), after)


@hypothesis.given(geometries(), st.data())
def test_a_larger_mask_keeps_no_more(geometry, data):
    ladder, mask = geometry
    larger = mask | data.draw(hnp.arrays(bool, mask.shape))
    assert not (editing.keep_tokens(larger, ladder) & ~editing.keep_tokens(mask, ladder)).any()


@pytest.mark.parametrize("resolution", [64, 256, 512, 1024])
def test_an_empty_mask_keeps_all_and_a_full_one_the_mean_colour_alone(resolution):
    ladder = ScaleLadder.preset(resolution)
    size = 2 * ladder.sides[-1]
    assert editing.keep_tokens(np.zeros((2, size, size), bool), ladder).all()
    np.testing.assert_array_equal(
        editing.keep_tokens(np.ones((2, size, size), bool), ladder), np.arange(ladder.length) < np.ones((2, 1))
    )


def test_half_of_a_picture_of_256_pixels_by_hand():
    ladder = ScaleLadder.preset(256)
    mask = regions.box_mask([0, 0, 120, 256], 256, 256)[None]  # up to the middle of the eighth column of tokens
    columns = [(~kept).all(axis=1).sum() for kept in maps(editing.keep_tokens(mask, ladder), ladder)]
    # Columns of p have their middles at (i + 1/2)·16/p - 1/2; from 7.5 on, at least half is kept.
    assert columns == [sum((i + 0.5) * 16 / p - 0.5 < 7.5 for i in range(p)) * (p > 1) for p in ladder.sides]
    assert columns == [0, 1, 1, 2, 2, 3, 4, 5, 6, 8]


# --- what passes draw


def check_draws(out, kept, keep, counts, ladder=TINY.ladder):
    """Replays the recorded draws: kept tokens never move, each other one is committed once, in its share of steps."""
    np.testing.assert_array_equal(out.tokens[keep], kept[keep])
    draws = iter(out.draws)
    for where, steps in zip(ladder.slices, counts, strict=True):
        state, still_open = kept[:, where], ~keep[:, where]
        to_draw, number = still_open.sum(1), sum(steps)
        for step in range(len(steps)):
            draw = next(draws)
            np.testing.assert_array_equal(draw.masked.sum(1), -(-to_draw * sum(steps[step:]) // number))
            assert not (draw.masked & ~still_open).any()
            state, still_open = np.where(draw.masked, draw.tokens, state), draw.masked
        np.testing.assert_array_equal(out.tokens[:, where], state)
    assert next(draws, None) is None


COUNTS = {"model": [[1], [1, 3], [1, 1, 2, 5]], "var_model": [[1], [4], [9]]}
DEFAULT = {"model": "small", "stage1_model": "next-scale", "var_model": "var"}


@pytest.mark.parametrize("kind", COUNTS)
def test_kept_tokens_stay_bit_for_bit_for_any_mask(request, kind):
    network = request.getfixturevalue(kind)
    tokens = np.asarray(network.tokenizer.encode(2 * IMAGES - 1))
    seeds = iter(range(1000))

    @hypothesis.settings(max_examples=15)
    @hypothesis.example(FULL)
    @hypothesis.example(EMPTY)
    @hypothesis.example(np.stack([PIXEL] * 3))
    @hypothesis.given(MASKS)
    def check(mask):
        out = edit(network, mask=mask, seed=next(seeds))
        check_draws(out, tokens, editing.keep_tokens(mask, TINY.ladder), COUNTS[kind])
        decoded = np.asarray(network.tokenizer.decode(out.tokens)) / 2 + 0.5
        np.testing.assert_allclose(out.images, decoded, atol=1e-5)

    check()


def keeping(network, tokens, keep, schedule, seed=0, greedy=False):
    """A sample in which `keep` (B,L) is any, not made from a mask."""
    kept = Kept(jnp.asarray(tokens), jnp.asarray(keep))
    options = {"seed": seed, "numbers": None, "greedy": greedy, "record": True, "decode": True, "kept": kept}
    return network._draw(network._request(np.array(LABELS), schedule, **options), None)


@pytest.mark.parametrize("kind", COUNTS)
def test_nothing_kept_is_plain_sampling_and_all_kept_the_input_bit_for_bit(request, kind):
    network = request.getfixturevalue(kind)
    schedule = Schedule.preset(DEFAULT[kind], TINY.ladder).replace(noise=1.0)
    tokens = np.asarray(network.tokenizer.encode(2 * IMAGES - 1))
    plain = network.sample(LABELS, schedule, seed=3, record=True)
    nothing, everything = (
        keeping(network, tokens, np.full(tokens.shape, keep), schedule, seed=3) for keep in (False, True)
    )
    np.testing.assert_array_equal(nothing.tokens, plain.tokens)
    np.testing.assert_array_equal(nothing.images, plain.images)
    np.testing.assert_array_equal(everything.tokens, tokens)
    assert (everything.tokens != plain.tokens).any()


@pytest.mark.parametrize("kind", ["model", "leak_free_model"])
def test_masked_passes_see_the_kept_tokens(request, kind):
    """Greedy draws are the argmax of teacher forcing on exactly what is kept or drawn so far."""
    network, rng = request.getfixturevalue(kind), np.random.default_rng(1)
    tokens = rng.integers(0, 16, (3, 14), dtype=np.int32)
    keep = rng.random((3, 14)) < 0.5
    schedule = Schedule.from_counts(COUNTS["model"], cfg=0)
    out = keeping(network, tokens, keep, schedule, greedy=True)
    final, draws, masked_passes = out.tokens, iter(out.draws), 0
    for where, steps in zip(TINY.ladder.slices, schedule.counts, strict=True):
        state = tokens[:, where]
        for step in range(len(steps)):
            draw = next(draws)
            if step:
                given, masked = final.copy(), np.zeros(final.shape, bool)
                given[:, where], masked[:, where] = state, draw.masked
                logits = network.masked_logits(LABELS, given, masked)[:, where]
                masked_passes += 1
            else:
                logits = network.next_scale_logits(LABELS, final)[:, where]
            np.testing.assert_array_equal(np.argmax(logits, -1), draw.tokens)
            state = np.where(draw.masked, draw.tokens, state)
    assert masked_passes == 4
    np.testing.assert_array_equal(final[keep], tokens[keep])


# --- the door


def test_a_box_is_the_mask_of_its_pixels_and_one_picture_a_batch_of_one(model):
    by_mask = edit(model, IMAGES[:1], MASK[None], [4], variants=3)
    assert len({tokens.tobytes() for tokens in by_mask.tokens}) == 3
    for images, mask, labels in [(IMAGES[0], (1, 2, 5, 6), 4), (IMAGES[:1], np.array([1, 2, 5, 6]), [4])]:
        same = edit(model, images, mask, labels, variants=3)
        np.testing.assert_array_equal(same.tokens, by_mask.tokens)
        np.testing.assert_array_equal(same.images, by_mask.images)


@pytest.mark.parametrize("composite", [False, True])
def test_whole_numbers_to_255_are_pictures_from_0_to_1(model, composite):
    stored = (IMAGES * 255).astype(np.uint8)
    floats = stored.astype(np.float32) / 255
    of_stored, of_floats = (edit(model, images, composite=composite) for images in (stored, floats))
    np.testing.assert_array_equal(of_stored.images, of_floats.images)


def test_an_edit_is_a_function_of_picture_mask_label_seed_and_number(model):
    masks = np.stack([MASK, ~MASK, PIXEL])
    together = edit(model, mask=masks, seed=7)
    for i in range(3):
        among_others = edit(model, IMAGES[i], masks[i], LABELS[i], seed=7, variants=3, numbers=[8, i, 9])
        np.testing.assert_array_equal(among_others.tokens[1], together.tokens[i])
        np.testing.assert_allclose(among_others.images[1], together.images[i], atol=1e-5)


def test_every_control_changes_the_result_and_one_program_serves_them(model):
    # The seed is one of those, about half, by which guidance changes any of the few tokens that are drawn here.
    settings = {"seed": 6, "cfg": 1.0, "noise": 0.5, "temperature": 1.0}
    base = edit(model, **settings)
    compiled = program.sample._cache_size()
    for name, value in [
        ("cfg", 6.0), ("temperature", 0.2), ("top_k", 2), ("top_p", 0.3), ("noise", 20.0), ("seed", 1),
        ("numbers", [5, 6, 7]), ("images", IMAGES[::-1]), ("labels", [1, 1, 1]), ("mask", ~MASK),
        ("mask", np.stack([MASK, ~MASK, PIXEL])),
    ]:  # fmt: skip
        assert (edit(model, **settings | {name: value}).tokens != base.tokens).any(), name
    assert program.sample._cache_size() == compiled


@pytest.fixture
def requests(monkeypatch):
    """What the program is asked for from here on; it draws nothing but grey."""
    asked = []

    def draw_grey(request):
        asked.append(request)
        return jnp.full((len(request.labels), 6, 6, 3), 0.5), request.kept.tokens, []

    monkeypatch.setattr(program, "sample", draw_grey)
    return asked


def test_variants_of_a_picture_follow_each_other(model, requests):
    masks = np.stack([MASK, ~MASK, PIXEL])
    out = model.edit(IMAGES, masks, LABELS, variants=2, composite=True, feather=0)
    request, by_hand = requests[0], [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(request.numbers, range(6))
    np.testing.assert_array_equal(request.labels, np.array(LABELS)[by_hand])
    np.testing.assert_array_equal(request.kept.tokens, model.tokenizer.encode(2 * IMAGES - 1)[jnp.array(by_hand)])
    np.testing.assert_array_equal(request.kept.keep, editing.keep_tokens(masks[by_hand], TINY.ladder))
    np.testing.assert_array_equal(out.images, np.where(masks[..., None], 0.5, IMAGES)[by_hand])


@pytest.mark.parametrize("labels", [None, NULL, [NULL] * 3], ids=str)
def test_without_a_label_it_is_the_null_class_without_its_half(model, requests, labels):
    model.edit(IMAGES, MASK, labels, cfg=3.0, refine_cfg=2.0)
    model.edit(IMAGES, MASK, [NULL, 2, NULL], cfg=3.0)
    np.testing.assert_array_equal(requests[0].labels, [NULL] * 3)
    assert [any(map(any, request.plan.guided)) for request in requests] == [False, True]


@pytest.mark.parametrize("kind", DEFAULT)
def test_the_schedule_is_by_default_what_the_model_can_best_do(request, requests, kind):
    request.getfixturevalue(kind).edit(IMAGES, MASK, LABELS)
    expected = Schedule.preset(DEFAULT[kind], TINY.ladder)
    assert requests[0].plan == expected.plan
    np.testing.assert_array_equal(requests[0].controls.top_p, expected.controls.top_p)


def test_schedules_and_what_changes_them_go_through(model, requests):
    changes = {"refine_cfg": 6.0, "order": "halton", "noise": 0.5, "temperature": 0.2, "top_p": 0.9, "top_k": 3}
    model.edit(IMAGES, MASK, LABELS, "cosine:3@3", cfg=2.0, greedy=True, seed=9, **changes)
    expected = Schedule.parse("cosine:3@3", TINY.ladder).replace(cfg=2.0, **changes)
    asked = requests[0]
    assert (asked.config, asked.dtype, asked.plan) == (TINY, "float32", expected.plan)
    assert (asked.greedy, asked.record, asked.decode) == (True, False, True)
    assert requests[0].seed == 9
    np.testing.assert_array_equal(np.stack(requests[0].controls), np.stack(expected.controls))


# --- compositing


ORIGINALS = hnp.arrays(np.float32, (2, 7, 7, 3), elements=st.floats(0, 1, width=32))


@hypothesis.given(ORIGINALS, ORIGINALS, hnp.arrays(bool, (2, 7, 7)), st.integers(0, 9))
def test_untouched_pixels_are_untouched_and_the_seam_lies_inside(edited, originals, mask, feather):
    result = editing.composite(edited, originals, mask, feather)
    assert result.dtype == np.float32
    assert result[~mask].tobytes() == originals[~mask].tobytes()
    assert 0 <= result.min() <= result.max() <= 1
    for at in np.argwhere(mask):
        across = [np.abs(other - at)[1:].max() for other in np.argwhere(~mask) if other[0] == at[0]]
        depth = min(across, default=np.inf)  # 1 at the rim
        weight = min(depth / (feather + 1), 1)
        pixel = tuple(at)
        if weight == 1:
            assert result[pixel].tobytes() == edited[pixel].tobytes()
        else:
            blend = weight * edited[pixel] + (1 - weight) * originals[pixel]
            np.testing.assert_allclose(result[pixel], blend, atol=1e-6)


@hypothesis.settings(max_examples=10)
@hypothesis.example(FULL)
@hypothesis.example(EMPTY)
@hypothesis.given(MASKS)
def test_composited_edits_leave_the_pixels_outside_bit_for_bit(model, mask):
    plain, composited, hard = (
        edit(model, mask=mask, **fields) for fields in ({}, {"composite": True}, {"composite": True, "feather": 0})
    )
    for out in (composited, hard):
        assert out.images[~mask].tobytes() == IMAGES[~mask].tobytes()
        np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert hard.images[mask].tobytes() == plain.images[mask].tobytes()
    if mask.all(axis=(1, 2)).any():
        assert composited.images[mask.all(axis=(1, 2))].tobytes() == plain.images[mask.all(axis=(1, 2))].tobytes()


def test_the_feather_is_half_a_token_unless_it_is_given(model):
    by_default, one, three = (
        edit(model, composite=True, **fields).images for fields in ({}, {"feather": 1}, {"feather": 3})
    )
    np.testing.assert_array_equal(by_default, one)
    assert (one != three).any()


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda edit: edit(IMAGES[:, :5], MASK), r"Images are \(3, 5, 6, 3\); this model edits \(B, 6, 6, 3\) or one"),
        (lambda edit: edit(IMAGES[:0], MASK), r"Images are \(0, 6, 6, 3\)"),
        (lambda edit: edit(IMAGES[..., 0], MASK), r"Images are \(3, 6, 6\)"),
        (lambda edit: edit(2 * IMAGES - 1, MASK), r"Images are float32 from -.*; expected uint8, or floats from 0"),
        (lambda edit: edit(IMAGES * 255, MASK), r"Images are float32 from .* to 25.*; expected uint8, or floats"),
        (lambda edit: edit(np.full_like(IMAGES, np.nan), MASK), r"Images are float32 from nan to nan"),
        (lambda edit: edit((IMAGES * 255).astype(int), MASK), r"Images are int64 from"),
        (lambda edit: edit(IMAGES, MASK * 1), r"The mask is int64 \(6, 6\); expected bool \(6, 6\) or \(3, 6, 6\)"),
        (lambda edit: edit(IMAGES, MASK[:5]), r"The mask is bool \(5, 6\); expected bool"),
        (lambda edit: edit(IMAGES, np.stack([MASK] * 2)), r"The mask is bool \(2, 6, 6\); expected bool"),
        (lambda edit: edit(IMAGES, (1.0, 2.0, 3.0, 4.0)), r"The mask is float64 \(4,\); .* a box .* of whole numbers"),
        (lambda edit: edit(IMAGES, (1, 2, 3)), r"The mask is int64 \(3,\)"),
        (lambda edit: edit(IMAGES, (3, 2, 3, 4)), r"Box 3,2,3,4 is not left < right, top < bottom inside 0,0,6,6"),
        (lambda edit: edit(IMAGES, (0, 0, 7, 4)), r"Box 0,0,7,4 is not"),
        (lambda edit: edit(IMAGES, (-1, 0, 3, 4)), r"Box -1,0,3,4 is not"),
        (lambda edit: edit(IMAGES, MASK, 6), r"Label 6 is out of range; this model has classes 0 to 4\."),
        (lambda edit: edit(IMAGES, MASK, -1), r"Label -1 is out of range"),
        (lambda edit: edit(IMAGES, MASK, "A"), r"Label 'A' is not a class .* its name, such as 'a'\."),
        (lambda edit: edit(IMAGES, MASK, [1, 2]), r"There are 2 labels for 3 pictures; give one each, or one\."),
        (lambda edit: edit(IMAGES, MASK, variants=0), r"variants is 0; expected a whole number, 1 to 10000\."),
        (lambda edit: edit(IMAGES, MASK, variants=1.5), r"variants is 1\.5; expected a whole number"),
        (lambda edit: edit(IMAGES, MASK, feather=-1), r"feather is -1; expected a whole number, 0 or more\."),
        (lambda edit: edit(IMAGES, MASK, composite=True, feather=0.5), r"feather is 0\.5; expected a whole number"),
        (lambda edit: edit(IMAGES, MASK, numbers=[1, 2]), r"numbers are \[1, 2\]; expected 3 integers"),
        (lambda edit: edit(IMAGES, MASK, schedule="official-256"), r"official-256 is for the sides 1,2,3,4,5"),
        (lambda edit: edit(IMAGES, MASK, seed=-1), r"seed is -1; expected a whole number, 0 to"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(model, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(model.edit)
    assert "\n" not in str(error.value)


def test_models_without_what_an_edit_needs_say_so(model, stage1_model):
    config = dataclasses.replace(TINY, transformer=None)
    with pytest.raises(InputError, match="tokenizer alone"):
        Model(config, {"tokenizer": model.params["tokenizer"]}).edit(IMAGES, MASK)
    with pytest.raises(InputError, match=r"masked steps needs a mask branch.*'next-scale'"):
        stage1_model.edit(IMAGES, MASK, schedule="small")
