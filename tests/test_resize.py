"""The resize matrices against definitions written another way."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax import resize

# (source, target): dividing, overlapping bins, equal, up by whole and broken factors, from one pixel.
SIZES = [(4, 2), (16, 13), (5, 3), (7, 1), (6, 6), (3, 16), (2, 4), (1, 5), (13, 16), (9, 10), (48, 64)]


def area_by_overlap(source, target):
    """Bin i averages every pixel that the interval [i, i+1)·source/target touches."""
    matrix = np.zeros((target, source))
    for i in range(target):
        low, high = Fraction(i * source, target), Fraction((i + 1) * source, target)
        touched = [j for j in range(source) if j < high and j + 1 > low]
        matrix[i, touched] = 1 / len(touched)
    return matrix


def keys_kernel(t, a=-0.75):
    """Keys' cubic convolution kernel."""
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def bicubic_of(signal, target):
    """Convolution of a signal whose ends go on for ever with the kernel, sampled at half-pixel centres."""
    source, margin = len(signal), 8
    padded = np.concatenate([np.full(margin, signal[0]), signal, np.full(margin, signal[-1])])
    at = np.arange(-margin, source + margin)
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    return keys_kernel(centres[:, None] - at) @ padded


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_area_averages_every_touched_pixel(source, target):
    np.testing.assert_allclose(resize.area_matrix(source, target), area_by_overlap(source, target), rtol=1e-7)


def test_area_bins_overlap_where_sizes_do_not_divide():
    bins = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(resize.area_matrix(4, 3), bins / 2)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_bicubic_is_a_convolution_with_keys_kernel_and_repeated_edges(source, target):
    signals = np.eye(source)
    expected = np.stack([bicubic_of(signal, target) for signal in signals], axis=1)
    np.testing.assert_allclose(resize.bicubic_matrix(source, target), expected, atol=2e-7)


def test_bicubic_of_a_step_by_hand():
    # Sharpness -0.75, overshoot included: w(1.25) = -0.10546875, w(0.75) = 0.26171875, w(1.75) = -0.03515625.
    steps = resize.bicubic_matrix(2, 4) @ np.array([0.0, 1.0])
    np.testing.assert_allclose(steps, [-0.10546875, 0.2265625, 0.7734375, 1.10546875], rtol=1e-6)


@pytest.mark.parametrize("kind", [resize.area_matrix, resize.bicubic_matrix])
class TestBothKinds:
    @pytest.mark.parametrize(("source", "target"), SIZES)
    def test_rows_sum_to_one(self, kind, source, target):
        matrix = kind(source, target)
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)

    @pytest.mark.parametrize("size", [1, 4, 13])
    def test_equal_sizes_give_the_identity(self, kind, size):
        np.testing.assert_array_equal(kind(size, size), np.eye(size))

    # The last two are too large for one product.
    @pytest.mark.parametrize(("source", "target"), [(5, 3), (3, 5), (1, 4), (4, 1), (4, 4), (18, 21), (21, 18)])
    def test_apply_resizes_rows_and_columns_of_every_map(self, kind, source, target):
        maps = np.random.default_rng(0).normal(size=(2, source, source, 3))
        matrix = kind(source, target).astype(np.float64)
        expected = np.empty((2, target, target, 3))
        for b in range(2):
            for z in range(3):
                expected[b, :, :, z] = matrix @ maps[b, :, :, z] @ matrix.T
        assert (kind(source, target).size ** 2 > resize._AT_ONCE) == (source > 5)
        resized = resize.apply(kind(source, target), jnp.asarray(maps, jnp.float32))
        np.testing.assert_allclose(resized, expected, atol=2e-6)
