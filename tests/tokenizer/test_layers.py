"""The CNN's layers, equal to Flax's and to their definitions; and large batches decoded in slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY, lively_params

from hmar_jax.networks import networks
from hmar_jax.tokenizer import layers
from hmar_jax.tokenizer import tokenizer as tokenizer_module
from hmar_jax.tokenizer.layers import GroupNorm, PointwiseConv, ThinConv, UpsampleConv, thin_conv


def lively(layer):
    """The layer with biases and scales that are not 0 and 1."""
    for i, (_, parameter) in enumerate(nnx.iter_graph(layer)):
        if isinstance(parameter, nnx.Param):
            parameter[...] += 0.3 * jax.random.normal(jax.random.key(i), parameter.shape)
    return layer


def normed(layer, maps):
    """The definition, float64."""
    batch, height, width, _ = maps.shape
    grouped = np.asarray(maps, np.float64).reshape(batch, height, width, layer.num_groups, -1)
    mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    scaled = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(maps.shape)
    return scaled * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize("shape", [(2, 6, 6, 8), (1, 1, 1, 8), (2, 64, 48, 8), (1, 3, 1100, 8), (3, 7, 5, 12)])
def test_group_norm_is_its_definition(shape):
    layer = lively(GroupNorm(shape[-1], 4, epsilon=1e-6, rngs=nnx.Rngs(0)))
    spread = 10.0 ** np.arange(shape[-1])[::-1] / 1e3  # channels of a group far apart
    maps = spread * np.random.default_rng(0).normal(size=shape) + spread
    np.testing.assert_allclose(layer(jnp.float32(maps)), normed(layer, np.float32(maps)), atol=2e-5)


@pytest.mark.parametrize("lanes", [1, 128])
@pytest.mark.parametrize("stretch", [1, 24, 1024])
@pytest.mark.parametrize("shape", [(2, 12, 16, 8), (3, 7, 5, 12), (1, 1, 1, 640)])
def test_moments_are_those_about_the_middle_in_stretches_of_any_length(monkeypatch, shape, stretch, lanes):
    monkeypatch.setattr(layers, "_STRETCH", stretch)
    maps, middle = np.random.default_rng(0).normal(size=shape), np.random.default_rng(1).normal(size=shape[::3])
    distance = maps - middle[:, None, None]
    given = layers._moments(lanes, jnp.float32(maps), jnp.float32(middle))
    np.testing.assert_allclose(given, (distance.mean((1, 2)), np.square(distance).mean((1, 2))), rtol=1e-5, atol=1e-6)


def test_a_mean_far_from_zero_costs_the_variance_no_digits():
    layer = lively(GroupNorm(8, 4, epsilon=1e-6, rngs=nnx.Rngs(0)))
    maps = np.float32(300 + np.random.default_rng(0).normal(size=(2, 32, 32, 8)))
    maps[:, 16, ::2] += 4  # what squares are summed about is not the mean
    expected = normed(layer, maps)
    np.testing.assert_allclose(layer(jnp.asarray(maps)), expected, atol=2e-4)  # 300's own rounding is 1.5e-5
    naive = np.var(maps[0, ..., :2]), np.mean(np.square(maps[0, ..., :2])) - np.square(np.mean(maps[0, ..., :2]))
    assert abs(naive[1] / naive[0] - 1) > 1e-3  # as sums about zero would have it
    assert abs(float(jnp.var(layer(jnp.asarray(maps))[0, ..., 0])) / np.var(expected[0, ..., 0]) - 1) < 1e-5


def test_a_constant_map_is_normalised_to_the_bias():
    layer = lively(GroupNorm(8, 4, epsilon=1e-6, rngs=nnx.Rngs(0)))
    given = layer(jnp.full((1, 5, 5, 8), 7.0))
    np.testing.assert_allclose(
        given, jnp.broadcast_to(layer.bias[...], given.shape), atol=2e-3
    )  # 7 rounds to 1/2000 of sqrt(1e-6)


def test_group_norm_and_its_gradients_are_those_of_flax():
    ours = lively(GroupNorm(12, 4, epsilon=1e-6, rngs=nnx.Rngs(0)))
    theirs = nnx.GroupNorm(12, 4, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    nnx.update(theirs, nnx.state(ours))
    maps, weights = jax.random.normal(jax.random.key(0), (2, 3, 9, 7, 12)) + 2

    def gradients(layer):
        graphdef, state = nnx.split(layer)
        return jax.grad(lambda state, x: jnp.sum(weights * nnx.silu(nnx.merge(graphdef, state)(x))), (0, 1))(
            state, maps
        )

    np.testing.assert_allclose(ours(maps, nnx.silu), nnx.silu(theirs(maps)), atol=3e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5), *map(gradients, (ours, theirs)))


def test_group_norm_rounds_once():
    layer = GroupNorm(8, 4, epsilon=1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    maps = jax.random.normal(jax.random.key(0), (2, 8, 8, 8), jnp.bfloat16)
    expected = nnx.silu(jnp.float32(normed(layer, maps))).astype(jnp.bfloat16)
    given = layer(maps, nnx.silu)
    assert given.dtype == jnp.bfloat16
    np.testing.assert_allclose(given.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-8, atol=1e-6)


def test_bfloat16_in_pairs_is_computed_as_one_by_one():
    def scaled(x, factor):
        return nnx.silu(x * factor)

    maps = jax.random.normal(jax.random.key(0), (2, 3, 5, 6), jnp.bfloat16)
    maps = maps.at[0, 0, 0].set(jnp.array([0, -0.0, 1e-39, jnp.inf, 3e38, -1e30], jnp.bfloat16))
    factor = 1 + jax.random.uniform(jax.random.key(1), (2, 1, 1, 6))
    given = layers._pairwise(scaled, maps, factor)
    assert given.dtype == jnp.bfloat16
    np.testing.assert_array_equal(given, scaled(maps.astype(jnp.float32), factor).astype(jnp.bfloat16))


@pytest.mark.parametrize(("height", "width", "inputs", "outputs"), [(4, 4, 3, 5), (1, 1, 4, 4), (2, 5, 4, 2)])
def test_upsampling_equals_nearest_neighbours_and_a_convolution(height, width, inputs, outputs):
    folded = lively(UpsampleConv(inputs, outputs, (3, 3), rngs=nnx.Rngs(0)))
    plain = nnx.Conv(inputs, outputs, (3, 3), padding=1, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(folded))
    maps = jax.random.normal(jax.random.key(0), (2, height, width, inputs))

    def both(maps):
        return folded(maps), plain(maps.repeat(2, axis=1).repeat(2, axis=2))

    np.testing.assert_allclose(*both(maps), atol=2e-6)
    ours, theirs = (jax.grad(lambda x, i=i: jnp.sum(both(x)[i] ** 2))(maps) for i in range(2))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (2, 1)])
def test_a_thin_convolution_is_one_and_has_its_gradients(height, width):
    maps = jax.random.normal(jax.random.key(0), (2, height, width, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 6, 3))
    weights = jax.random.normal(jax.random.key(2), (2, height, width, 3))

    def plain(maps, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(maps, kernel, (1, 1), "SAME", dimension_numbers=layout, precision="highest")

    def gradients(convolve):
        return jax.grad(lambda *inputs: jnp.sum(weights * convolve(*inputs)), (0, 1))(maps, kernel)

    np.testing.assert_allclose(thin_conv(maps, kernel), plain(maps, kernel), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *map(gradients, (thin_conv, plain)))
    narrow = [values.astype(jnp.bfloat16) for values in (maps, kernel)]
    given, expected = thin_conv(narrow[0], kernel), plain(*(values.astype(jnp.float32) for values in narrow))
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, expected, atol=9 * 2**-9 * jnp.abs(expected).max())  # nine roundings


@pytest.mark.parametrize("features", [3, 6])
def test_a_thin_convolution_with_its_bias_is_a_plain_one(features):
    layer = lively(ThinConv(6, features, (3, 3), padding=1, rngs=nnx.Rngs(0)))
    maps = jax.random.normal(jax.random.key(0), (2, 5, 7, 6))
    np.testing.assert_allclose(layer(maps), nnx.Conv.__call__(layer, maps), atol=1e-5)
    np.testing.assert_allclose(layer(maps, 2 * layer.kernel[...]), 2 * layer(maps) - layer.bias[...], atol=1e-5)


def test_a_pointwise_convolution_is_one():
    product, plain = (kind(4, 6, (1, 1), rngs=nnx.Rngs(0)) for kind in (PointwiseConv, nnx.Conv))
    nnx.update(plain, nnx.state(lively(product)))
    maps = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    np.testing.assert_allclose(product(maps), plain(maps), atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_a_batch_in_slices_decodes_as_in_one(monkeypatch, at_once):
    decoder = networks(TINY, lively_params(TINY)).tokenizer
    latents = jax.random.normal(jax.random.key(0), (5, 3, 3, TINY.tokenizer.latent_channels))
    whole = decoder.decode_latents(latents)
    assert whole.shape == (5, 6, 6, 3)
    monkeypatch.setattr(tokenizer_module, "_PIXELS_AT_ONCE", 36 * at_once)
    jaxpr = jax.make_jaxpr(decoder.decode_latents)(latents)
    slices = [equation.params["length"] for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "scan"]
    assert slices == [-(-5 // at_once)]
    np.testing.assert_allclose(decoder.decode_latents(latents), whole, atol=1e-5)
