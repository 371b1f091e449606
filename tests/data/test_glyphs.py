"""What the rendered default promises: pure, balanced, whole, readable."""

import importlib.util
import pickle

import numpy as np
import pytest

from hmar_jax.data import glyphs
from hmar_jax.data.glyphs import CONTRAST, Glyphs
from hmar_jax.errors import InputError


def heights(characters, size=64, count=12):
    """Height of each rendering's ink, in S: (count, characters)."""
    source = Glyphs(characters, size)
    rows = [np.flatnonzero(source.render(i)[1].max(1) > 0.3) for i in range(count * len(characters))]
    return np.array([np.ptp(r) + 1 for r in rows]).reshape(count, -1) / size


def test_an_example_is_a_function_of_seed_and_index_alone():
    one, other = Glyphs(size=32, seed=5), pickle.loads(pickle.dumps(Glyphs(size=32, seed=5)))
    forward = [one[i]["image"] for i in range(40)]
    backward = [other[i]["image"] for i in reversed(range(40))][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert len({image.tobytes() for image in forward}) == 40
    assert not np.array_equal(Glyphs(size=32, seed=6)[0]["image"], forward[0])


@pytest.mark.parametrize("size", [16, 17, 32, 100, 256, 384])
def test_an_example_has_the_asked_size_and_types(size):
    example = Glyphs(size=size)[2**31 - 2]
    assert example["image"].shape == (size, size, 3)
    assert example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32


def test_labels_follow_the_order_of_the_classes_and_are_balanced():
    source = Glyphs("xyz", 16)
    assert source.class_names == ("x", "y", "z")
    assert [int(source[i]["label"]) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert len(source) == 2**31 - 1


@pytest.mark.parametrize("size", [40, 64, 128])
def test_no_glyph_is_cut_by_the_edge(size):
    source = Glyphs(size=size)
    for i in range(4 * 62):
        mask = source.render(i)[1]
        assert mask.max() > 0.9
        assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0, source.class_names[i % 62]


def test_every_letter_and_digit_fills_most_of_the_height():
    assert heights("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZbdfghijklpqty").min() > 0.7
    assert heights("acemnorsuvwxz").min() > 0.5


@pytest.mark.parametrize("letter", "cosuvwxz")
def test_a_small_letter_is_always_smaller_than_its_capital(letter):
    small, capital = heights(letter + letter.upper(), count=40).T
    assert small.max() < capital.min()


def test_zero_never_looks_like_the_letter_o():
    source = Glyphs("0O", 64)
    for i in range(0, 60, 2):
        centre = [source.render(i + k)[1][28:36, 29:35].max() for k in range(2)]
        assert centre[0] > 0.5 > centre[1]


def test_ink_stands_out_from_all_of_the_texture():
    source = Glyphs(size=32)
    for i in range(300):
        image, mask = source.render(i)
        assert 0 <= image.min() <= image.max() <= 1.0001
        luma = image @ np.array([0.299, 0.587, 0.114])
        ink, texture = luma[mask == mask.max()], luma[mask == 0]
        gap = ink.mean() - texture
        assert np.abs(gap).min() > CONTRAST
        assert len(set(np.sign(gap))) == 1


def test_pictures_tell_the_classes_apart():
    source = Glyphs(size=32)
    masks = np.array([source.render(i)[1].ravel() for i in range(62 * 24)])
    known, asked = masks[: 62 * 20], masks[62 * 20 :]
    nearest = ((asked**2).sum(1)[:, None] + (known**2).sum(1) - 2 * asked @ known.T).argmin(1)
    assert (nearest % 62 == np.arange(len(asked)) % 62).mean() > 0.8


@pytest.mark.parametrize("character", ["-", ".", "|", "@", "Å", "Ω", "♥", "%"])
def test_other_characters_can_be_classes_and_show(character):
    mask = Glyphs(character, 64).render(0)[1]
    rows, columns = np.nonzero(mask > 0.5)
    assert max(np.ptp(rows), np.ptp(columns)) > 0.3 * 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ""}, "no character"),
        ({"classes": "abca"}, "'a' more than once"),
        ({"classes": "a b"}, "cannot draw"),
        ({"classes": "a中"}, "'中'"),
        ({"size": 15}, "15 pixels"),
        ({"seed": -1}, "-1"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Glyphs(**arguments)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    glyphs._font.cache_clear()
    with pytest.raises(InputError, match="`pip install matplotlib`"):
        Glyphs()
