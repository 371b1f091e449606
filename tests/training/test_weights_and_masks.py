"""What a token's loss weighs, and which tokens stage 2 hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder
from hmar_jax.training.weights_and_masks import Mean, joined, per_scale, random_masks, scale_weights

L256 = ScaleLadder.preset(256)
PUBLISHED = [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709]
LADDERS = [L256, ScaleLadder.preset(1024), ScaleLadder((1, 2)), ScaleLadder((1,)), ScaleLadder((4,))]


def of_scales(weights, ladder):
    return np.array([weights[where].sum() for where in ladder.slices])


def test_log_normal_weights_are_the_published_ones():
    np.testing.assert_allclose(of_scales(scale_weights(L256, "log_normal"), L256), PUBLISHED, atol=5e-5)


def test_uniform_weighs_all_tokens_alike():
    np.testing.assert_allclose(scale_weights(L256, "uniform"), np.full(680, 1 / 680), rtol=1e-6)


def test_equal_weighs_all_scales_alike():
    np.testing.assert_allclose(of_scales(scale_weights(L256, "equal"), L256), np.full(10, 0.1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["log_normal", "uniform", "equal"])
@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: "-".join(map(str, ladder.sides)))
def test_weights_sum_to_one_and_are_the_same_inside_a_scale(kind, ladder):
    weights = scale_weights(ladder, kind)
    assert (weights.dtype, weights.shape) == (np.float32, (ladder.length,))
    assert weights.min() > 0
    np.testing.assert_allclose(weights.sum(dtype=np.float64), 1, rtol=1e-5)
    assert all(np.ptp(weights[where]) == 0 for where in ladder.slices)


def test_unknown_weights_are_a_sentence():
    with pytest.raises(InputError, match=r"'lognormal'.*'log_normal', 'uniform' or 'equal'"):
        scale_weights(L256, "lognormal")


@pytest.fixture(scope="module")
def masks():
    """(2000, L) masks of a small ladder and the ratio that each was drawn with."""
    ladder, keys = ScaleLadder((1, 2, 3, 5)), jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: random_masks(key, ladder)))(keys))
    ratios = np.asarray(jax.vmap(lambda key: jax.random.uniform(jax.random.split(key)[0]))(keys))
    return ladder, drawn, ratios


def test_every_scale_but_the_first_hides_the_ceiling_of_one_ratio(masks):
    ladder, drawn, ratios = masks
    counts = np.stack([drawn[:, where].sum(axis=1) for where in ladder.slices], axis=1)
    assert not counts[:, 0].any()
    for scale, length in list(enumerate(ladder.lengths))[1:]:
        np.testing.assert_array_equal(counts[:, scale], np.ceil(ratios * np.float32(length)))


def test_the_ratio_is_uniform(masks):
    ladder, drawn, _ = masks
    shares = drawn[:, ladder.slices[-1]].mean(axis=1)
    histogram, _ = np.histogram(shares, bins=5, range=(0, 1.0001))
    assert np.abs(histogram - 400).max() < 100  # a fifth each; 5.6 standard deviations


def test_every_position_of_a_scale_is_hidden_as_often(masks):
    ladder, drawn, _ = masks
    for where in ladder.slices[1:]:
        often = drawn[:, where].mean(axis=0)
        assert np.abs(often - often.mean()).max() < 0.06  # 5 standard deviations
        # Not the same positions whenever the number is the same.
        assert len(np.unique(drawn[:, where], axis=0)) > 2 * (where.stop - where.start)


def test_means_of_parts_join_to_the_mean_of_the_whole():
    rng = np.random.default_rng(0)
    ladder = ScaleLadder((1, 2, 3))
    values, weights = rng.normal(size=(6, 14)), (rng.random((6, 14)) < 0.3).astype(np.float64)
    weights[:, 0] = 0  # a scale that nothing counts in
    weights[2:4] = 0  # and a part
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]

    def metrics(where):
        v, w = jnp.float32(values[where]), jnp.float32(weights[where])
        return {"all": Mean.of(v, w), "scales": per_scale(v, w, ladder), "plain": jnp.mean(v)}

    stacked = jax.tree.map(lambda *of_parts: jnp.stack(of_parts), *map(metrics, parts))
    got = joined(stacked)
    np.testing.assert_allclose(got["all"], np.average(values, weights=weights), rtol=1e-5)
    expected = [np.average(values[:, s], weights=weights[:, s]) for s in ladder.slices[1:]]
    np.testing.assert_allclose(got["scales"], [0, *expected], rtol=1e-5)
    np.testing.assert_allclose(got["plain"], values.mean(), rtol=1e-5)
