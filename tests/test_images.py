import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax import images

BYTES = np.arange(256, dtype=np.uint8)
# Every 2048th float32 from -1 to 1, those around the middle between two bytes, and numbers that halving rounds.
BITS = np.arange(0, np.float32(1).view(np.uint32) + 1, 2048, dtype=np.uint32).view(np.float32)
MIDDLES = ((np.arange(255, dtype=np.float32) + 0.5) / 255)[:, None] + np.arange(-8, 9, dtype=np.float32) * 2**-26
UNIT = np.concatenate([BITS, MIDDLES.ravel(), [2**-149, 1 - 2**-24]]).astype(np.float32)
SIGNED = np.concatenate([UNIT, -UNIT])


@pytest.fixture(params=[np.asarray, jnp.asarray], ids=["numpy", "jax"])
def kind(request):
    return request.param


def test_bytes_come_back_from_either_range(kind):
    array = kind(BYTES)
    for there, back in ((images.to_unit, lambda x: x), (images.to_signed, images.from_signed)):
        pictures = there(array)
        assert isinstance(pictures, type(array))
        assert pictures.dtype == np.float32
        np.testing.assert_array_equal(images.to_uint8(back(pictures)), BYTES)
    np.testing.assert_array_equal(images.to_uint8(array), BYTES)


def test_ranges_end_where_they_say(kind):
    assert images.to_unit(kind(BYTES))[::255].tolist() == [0, 1]
    assert images.to_signed(kind(BYTES))[::255].tolist() == [-1, 1]
    assert images.to_signed(kind(np.float32([0, 0.5, 1]))).tolist() == [-1, 0, 1]
    assert images.from_signed(kind(np.float32([-1, 0, 1]))).tolist() == [0, 0.5, 1]


def test_formulas_round_in_one_way(kind):
    """Pictures published before this module had been computed by several formulas; its own gives the same bits."""
    np.testing.assert_array_equal(images.from_signed(kind(SIGNED)), SIGNED / 2 + np.float32(0.5))
    np.testing.assert_array_equal(jax.jit(images.from_signed)(SIGNED), images.from_signed(SIGNED))
    np.testing.assert_array_equal(images.to_signed(kind(UNIT)), np.float32(2) * UNIT - np.float32(1))
    by_formula = jax.jit(lambda x: x.astype(np.float32) / 127.5 - 1)(BYTES)  # XLA multiplies by the inverse
    np.testing.assert_array_equal(jax.jit(images.to_signed)(BYTES), by_formula)
    np.testing.assert_array_equal(images.to_signed(BYTES), BYTES.astype(np.float32) / np.float32(127.5) - 1)


def test_pictures_are_clipped_and_rounded_as_their_kind_of_array_is():
    given = np.concatenate([UNIT, [-3.0, 1.7]]).astype(np.float32)
    np.testing.assert_array_equal(images.to_uint8(given), np.floor(np.clip(given, 0, 1) * np.float32(255) + 0.5))
    np.testing.assert_array_equal(images.to_uint8(jnp.asarray(given)), np.rint(np.clip(given, 0, 1) * np.float32(255)))


def test_a_png_is_of_pil_or_of_either_kind_of_pixels(tmp_path):
    bytes_ = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    made = [
        images.save_png(picture, tmp_path / f"{i}.png").read_bytes()
        for i, picture in enumerate((images.Image.fromarray(bytes_), bytes_, images.to_unit(bytes_)))
    ]
    assert made[0] == made[1] == made[2]
    np.testing.assert_array_equal(images.Image.open(tmp_path / "0.png"), bytes_)
