"""Seeing a sample come about: frames of its passes, and their pictures."""

import io

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY, random_tokens

from hmar_jax import InputError, Sample, plots
from hmar_jax.bulk import traces
from hmar_jax.commands.main import main
from hmar_jax.images import to_uint8
from hmar_jax.model import DrawRecord
from hmar_jax.networks import networks

LABELS, SCHEDULE = [0, 3, 4], "cosine:2"
SLICES, SIDES = TINY.ladder.slices, TINY.ladder.sides
PASSES = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
COMMITTED = [1, 1, 3, 3, 6]


@pytest.fixture(scope="module")
def sample(model):
    return model.sample(LABELS, SCHEDULE, seed=2, record=True)


@pytest.fixture(scope="module")
def frames(model, sample):
    return traces.frames(model, sample, 1)


# --- frames


def test_there_is_a_frame_for_each_pass(frames):
    assert [(frame.scale, frame.step) for frame in frames] == PASSES
    assert [frame.steps for frame in frames] == [1, 2, 2, 2, 2]


def test_tokens_are_committed_in_the_plans_numbers_and_stand_from_then_on(frames):
    assert [frame.now.sum() for frame in frames] == COMMITTED
    stand = {}
    for frame in frames:
        before = stand.get(frame.scale, np.zeros((SIDES[frame.scale],) * 2, bool))
        np.testing.assert_array_equal(frame.earlier, before)
        assert not (frame.now & frame.earlier).any()
        stand[frame.scale] = frame.earlier | frame.now
    assert all(of_scale.all() for of_scale in stand.values())


def test_pictures_are_of_the_tokens_as_they_were_drawn(model, sample, frames):
    tokenizer = networks(model.config, model.params).tokenizer
    lift, decode = jax.jit(tokenizer.quantizer.lift, static_argnums=1), jax.jit(tokenizer.decode_latents)
    state, latents, seen = None, 0, 0
    for frame, draw in zip(frames, sample.draws, strict=True):
        drawn, masked = draw.tokens[1:2], draw.masked[1:2]
        state = drawn if draw.step == 0 else np.where(masked, drawn, state)
        whole = latents + np.asarray(lift(state, draw.scale))
        np.testing.assert_allclose(frame.image, (np.asarray(decode(whole))[0] + 1) / 2, atol=1e-5)
        if draw.step + 1 == frame.steps:
            np.testing.assert_array_equal(state, sample.tokens[1:2, SLICES[draw.scale]])
            latents, seen = whole, seen + 1
    assert seen == len(SIDES)
    np.testing.assert_allclose(frames[-1].image, sample.images[1], atol=1e-5)


def test_confidence_is_the_probability_of_what_was_drawn(model):
    out = model.sample(LABELS, SCHEDULE, cfg=2.0, top_k=0, top_p=1.0, seed=2, record=True)
    cond, null = (np.asarray(model.next_scale_logits(labels, out.tokens)) for labels in (LABELS, [5] * 3))
    first = [draw for draw in out.draws if draw.step == 0]
    for draw, cfg in zip(first, (0.0, 1.0, 2.0), strict=True):
        where = SLICES[draw.scale]
        probabilities = jax.nn.softmax((1 + cfg) * cond[:, where] - cfg * null[:, where], axis=-1)
        of_drawn = np.take_along_axis(np.asarray(probabilities), draw.tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(draw.confidence, of_drawn, atol=1e-5)
    last = traces.frames(model, out, 2)[-1]
    np.testing.assert_array_equal(last.confidence.reshape(-1), out.draws[-1].confidence[2])


def test_what_editing_keeps_stands_from_the_start(model):
    tokens, masked = random_tokens(TINY, 1), np.array([[True, False, False, True]])
    drawn = np.array([[7, 7, 7, 7]], np.int32)
    tokens[0, 1:5] = np.where(masked[0], 7, tokens[0, 1:5])
    edited = Sample(np.zeros((1, 6, 6, 3)), tokens, [DrawRecord(1, 0, drawn, masked, np.ones((1, 4), np.float32))])
    (frame,) = traces.frames(model, edited)
    np.testing.assert_array_equal(frame.earlier, [[False, True], [True, False]])
    np.testing.assert_array_equal(frame.now, ~frame.earlier)
    np.testing.assert_allclose(frame.image, model.tokenizer.decode_until([tokens], [1])[0, 0] / 2 + 0.5, atol=1e-6)


def test_decode_until_is_blind_to_finer_scales(model):
    tokens, others = (random_tokens(TINY, 2, seed) for seed in (0, 1))
    others[:, :5] = tokens[:, :5]
    grown = model.tokenizer.growth(tokens)
    until = model.tokenizer.decode_until([tokens, others, others], [1, 1, 2])
    np.testing.assert_array_equal(until[0], until[1])
    np.testing.assert_array_equal(until[0], grown[1])
    assert np.abs(until[2] - grown[2]).max() > 1e-2
    np.testing.assert_allclose(grown[2], model.tokenizer.decode(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, out: traces.frames(m, Sample(out.images, out.tokens)), r"no draws; .*record=True\)\.$"),
        (lambda m, out: traces.frames(m, out, 3), r"Picture 3 is not in this sample; it has 0 to 2\."),
        (lambda m, out: m.tokenizer.decode_until(out.tokens, [0]), r"\(3, 14\) and scales \[0\]; expected \(T, B, L\)"),
        (lambda m, out: m.tokenizer.decode_until([out.tokens], [3]), r"scales \[3\]; expected .* T of 0 to 2\."),
        (lambda m, out: m.tokenizer.decode_until([out.tokens], [0, 1]), r"scales \[0, 1\]; expected"),
        (lambda m, out: m.tokenizer.decode_until([out.tokens + 16], [0]), r"the codebook has 0 to 15\."),
    ],
)
def test_a_wrong_argument_gets_one_sentence(model, sample, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(model, sample)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("draw", [plots.trace, plots.animation])
@pytest.mark.parametrize("frames", [[], None, "x", [None], np.zeros((0, 3))], ids=repr)
def test_pictures_of_no_frames_are_a_sentence(draw, frames):
    with pytest.raises(InputError, match=r"^Frames are .*; expected a list of those that bulk.traces.frames returns"):
        draw(frames)


# --- pictures


ORANGE, BLUE, GREY = (240, 120, 20), (60, 110, 180), (222, 222, 222)
YELLOW = (253, 231, 37)  # of probability 1, in the legend too


def made_up(passes=1, side=8, seed=0):
    """Frames of one scale of 2x2 tokens: one committed before, two now, one open; pictures of one colour each."""
    rng = np.random.default_rng(seed)
    earlier, now = np.array([[True, False], [False, False]]), np.array([[False, True], [True, False]])
    colours = rng.uniform(0.2, 0.8, (passes, 3)).astype(np.float32)
    images = [np.broadcast_to(colour, (side, side, 3)) for colour in colours]
    return [
        traces.Frame(0, i, passes, image, earlier, now, np.full((2, 2), 0.25, np.float32))
        for i, image in enumerate(images)
    ]


def count(picture, colour):
    return (np.asarray(picture) == colour).all(-1).sum()


def test_the_figure_shows_which_tokens_stand():
    one, two = (plots.trace(made_up(passes)) for passes in (1, 2))
    assert two.height == one.height
    for colour, tokens in ((ORANGE, 2), (BLUE, 1), (GREY, 1)):
        added = count(two, colour) - count(one, colour)  # the legend has these colours too
        assert added == pytest.approx(tokens * 80 * 80, rel=0.05)


def test_the_figure_shows_the_picture_and_how_sure_the_model_was():
    (frame,) = made_up()
    figure = plots.trace([frame])
    assert count(figure, to_uint8(frame.image)[0, 0]) == 160 * 160
    surer = frame._replace(confidence=np.full((2, 2), 1.0, np.float32))
    assert count(plots.trace([surer]), YELLOW) - count(figure, YELLOW) == pytest.approx(3 * 80 * 80, rel=0.05)


def test_the_legend_is_whole_however_few_the_passes():
    one, many = (np.asarray(plots.trace(made_up(passes)))[-32:] for passes in (1, 14))
    np.testing.assert_array_equal(one, many[:, : one.shape[1]])
    assert (one == YELLOW).all(-1).any()  # the end of the ramp
    assert (many[:, one.shape[1] :] == 255).all()


@pytest.mark.parametrize(("passes", "bands"), [(14, 1), (15, 2), (28, 2), (29, 3)])
def test_a_long_trace_is_broken_into_bands(passes, bands):
    short, long = plots.trace(made_up()), plots.trace(made_up(passes))
    assert long.height == pytest.approx(bands * short.height, rel=0.1)
    assert long.width < 2600


@pytest.mark.parametrize("side", [8, 24, 300])
def test_the_animation_has_a_frame_a_pass_and_rests_on_the_last(side):
    frames = made_up(5, side)
    animation = Image.open(io.BytesIO(plots.animation(frames)))
    assert (animation.n_frames, animation.info["loop"]) == (5, 0)
    durations = []
    for i, frame in enumerate(frames):
        animation.seek(i)
        durations.append(animation.info["duration"])
        shown = np.asarray(animation.convert("RGB"), int)
        assert np.abs(shown[20:200, 20:200] - to_uint8(frame.image)[0, 0]).max() <= 4
        assert np.abs(shown[20:60, -30] - ORANGE).max() <= 4  # a token committed by this pass
    assert durations == [400, 400, 400, 400, 3000]


def test_the_command_writes_a_figure_and_an_animation_beside_each_picture(model, tmp_path, capsys):
    path = model.save(tmp_path / "model", source="a test")
    command = [
        "sample",
        f"--model={path}",
        "--labels=a,d,e",
        f"--schedule={SCHEDULE}",
        "--seed=2",
        f"--output={tmp_path}",
    ]
    assert main([*command, "--trace"]) == 0, capsys.readouterr().err
    for i, label in enumerate("ade"):
        name = tmp_path / f"{i:05d}-class{label}-seed2"
        with Image.open(f"{name}.png") as picture, Image.open(f"{name}-trace.png") as figure:
            pixels = np.asarray(picture, int)
            assert figure.width > 5 * 160
        with Image.open(f"{name}-trace.gif") as animation:
            assert animation.n_frames == len(PASSES)
            animation.seek(len(PASSES) - 1)
            enlarged = np.asarray(animation.convert("RGB"), int)[8:-8, 8:266]
        each = enlarged.shape[0] // 6
        assert np.abs(enlarged[each // 2 :: each, each // 2 :: each][:6, :6] - pixels).max() <= 8  # of the palette
