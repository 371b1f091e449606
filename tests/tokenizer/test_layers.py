"""The CNN's layers, equal to Flax's and to their definitions; and large batches decoded in slices."""

import functools

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


def lively(kind, *sizes, **options):
    """A layer with random parameters, those of scales around 1."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(*sizes, **options, rngs=nnx.Rngs(0))))
    for seed, (path, parameter) in enumerate(nnx.to_flat_state(state)):
        parameter.set_value(0.3 * normal(parameter.shape, seed) + (path[-1] == "scale"))
    return nnx.merge(graphdef, state)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, weights, *inputs):
    """What a function gives, and the gradients of its sum with the weights."""
    value, pull = jax.vjp(function, *inputs)
    return value, pull(weights)


def normed(layer, maps):
    """The definition, float64."""
    batch, height, width, _ = maps.shape
    grouped = np.asarray(maps, np.float64).reshape(batch, height, width, layer.num_groups, -1)
    mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    scaled = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(maps.shape)
    return scaled * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize("shape", [(2, 6, 6, 8), (1, 1, 1, 8), (2, 64, 48, 8), (1, 3, 1100, 8), (3, 7, 5, 12)])
def test_group_norm_is_its_definition(shape):
    layer = lively(GroupNorm, shape[-1], 4, epsilon=1e-6)
    spread = 10.0 ** np.arange(shape[-1])[::-1] / 1e3  # channels of a group far apart
    maps = spread * np.random.default_rng(0).normal(size=shape) + spread
    np.testing.assert_allclose(jax.jit(layer)(np.float32(maps)), normed(layer, np.float32(maps)), atol=2e-5)


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
    layer = lively(GroupNorm, 8, 4, epsilon=1e-6)
    maps = np.float32(300 + np.random.default_rng(0).normal(size=(2, 32, 32, 8)))
    maps[:, 16, ::2] += 4  # what squares are summed about is not the mean
    expected = normed(layer, maps)
    given = np.asarray(layer(maps))
    np.testing.assert_allclose(given, expected, atol=2e-4)  # 300's own rounding is 1.5e-5
    naive = np.var(maps[0, ..., :2]), np.mean(np.square(maps[0, ..., :2])) - np.square(np.mean(maps[0, ..., :2]))
    assert abs(naive[1] / naive[0] - 1) > 1e-3  # as sums about zero would have it
    assert abs(np.var(given[0, ..., 0]) / np.var(expected[0, ..., 0]) - 1) < 1e-5


def test_an_outlier_that_squares_are_summed_about_costs_a_flat_map_little():
    layer = lively(GroupNorm, 8, 4, epsilon=1e-6)
    maps = np.float32(1e-3 * np.random.default_rng(0).normal(size=(1, 64, 64, 8)))
    maps[:, 32, 32] += 50
    np.testing.assert_allclose(layer(maps), normed(layer, maps), rtol=1e-3, atol=1e-4)


def test_gradients_of_group_norm_are_exact_on_maps_far_from_zero():
    """Sums of gradient·x less the mean times sums of gradients lose as many digits as the mean exceeds the spread."""
    layer = lively(GroupNorm, 8, 4, epsilon=1e-6)
    maps, dy = np.float64(normal((2, 16, 16, 8))), np.float64(normal((2, 16, 16, 8), 1))
    maps = np.float64(np.float32(maps + 300))
    groups = maps.reshape(2, 16, 16, 4, 2)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    deviation = np.sqrt(np.square(centred).mean((1, 2, 4), keepdims=True) + 1e-6)
    n, dn = centred / deviation, (dy * np.asarray(layer.scale[...], np.float64)).reshape(groups.shape)
    means = [of_pixel.mean((1, 2, 4), keepdims=True) for of_pixel in (dn, n * dn)]
    expected = ((dn - means[0] - n * means[1]) / deviation).reshape(maps.shape)
    _, pull = jax.vjp(jax.jit(lambda x: layer(x)), jnp.float32(maps))
    (given,) = pull(jnp.float32(dy))
    assert np.linalg.norm(given - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_constant_map_is_normalised_to_the_bias():
    layer = lively(GroupNorm, 8, 4, epsilon=1e-6)
    given = layer(jnp.full((1, 5, 5, 8), 7.0))
    np.testing.assert_allclose(
        given, jnp.broadcast_to(layer.bias[...], given.shape), atol=2e-3
    )  # 7 rounds to 1/2000 of sqrt(1e-6)


def test_group_norm_and_its_gradients_are_those_of_flax():
    ours = lively(GroupNorm, 12, 4, epsilon=1e-6)
    theirs = nnx.eval_shape(lambda: nnx.GroupNorm(12, 4, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0)))
    nnx.update(theirs, nnx.state(ours))
    maps, weights = normal((2, 3, 9, 7, 12)) + 2

    def run(layer, function):
        graphdef, state = nnx.split(layer)
        value, gradients = value_and_gradients(
            lambda state, x: function(nnx.merge(graphdef, state), x), weights, state, maps
        )
        return value, nnx.to_pure_dict(gradients[0]), gradients[1]

    ours, theirs = run(ours, lambda layer, x: layer(x, nnx.silu)), run(theirs, lambda layer, x: nnx.silu(layer(x)))
    np.testing.assert_allclose(ours[0], theirs[0], atol=3e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5), ours[1:], theirs[1:])


def test_group_norm_rounds_once():
    layer = GroupNorm(8, 4, epsilon=1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    maps = normal((2, 8, 8, 8)).astype(jnp.bfloat16)
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
    folded = lively(UpsampleConv, inputs, outputs, (3, 3))
    plain = nnx.eval_shape(lambda: nnx.Conv(inputs, outputs, (3, 3), padding=1, rngs=nnx.Rngs(0)))
    nnx.update(plain, nnx.state(folded))
    maps, weights = normal((2, height, width, inputs)), normal((2, 2 * height, 2 * width, outputs), 1)

    def repeated(maps):
        return plain(maps.repeat(2, axis=1).repeat(2, axis=2))

    ours, theirs = (value_and_gradients(function, weights, maps) for function in (folded, repeated))
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-6)
    np.testing.assert_allclose(ours[1], theirs[1], atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (2, 1)])
def test_a_thin_convolution_is_one_and_has_its_gradients(height, width):
    maps, kernel, weights = (
        normal(shape, i) for i, shape in enumerate([(2, height, width, 6), (3, 3, 6, 3), (2, height, width, 3)])
    )

    def plain(maps, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(maps, kernel, (1, 1), "SAME", dimension_numbers=layout, precision="highest")

    ours, theirs = (value_and_gradients(function, weights, maps, kernel) for function in (thin_conv, plain))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours[1], theirs[1])
    narrow = [values.astype(jnp.bfloat16) for values in (maps, kernel)]
    given = jax.jit(thin_conv)(narrow[0], kernel)
    expected = np.asarray(jax.jit(plain)(*(values.astype(jnp.float32) for values in narrow)))
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, expected, atol=9 * 2**-9 * np.abs(expected).max())  # nine roundings


@pytest.mark.parametrize("features", [3, 6])
def test_a_thin_convolution_with_its_bias_is_a_plain_one(features):
    layer = lively(ThinConv, 6, features, (3, 3), padding=1)
    maps = normal((2, 5, 7, 6))

    @jax.jit
    def run(maps):
        kernel = layer.kernel[...]
        return layer(maps), nnx.Conv.__call__(layer, maps), layer(maps, 2 * kernel), 2 * layer(maps) - layer.bias[...]

    ours, theirs, ours_doubled, doubled = run(maps)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(ours_doubled, doubled, atol=1e-5)


def test_a_pointwise_convolution_is_one():
    product = lively(PointwiseConv, 4, 6, (1, 1))
    plain = nnx.eval_shape(lambda: nnx.Conv(4, 6, (1, 1), rngs=nnx.Rngs(0)))
    nnx.update(plain, nnx.state(product))
    maps = normal((2, 3, 5, 4))
    np.testing.assert_allclose(jax.jit(product)(maps), jax.jit(plain)(maps), atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_a_batch_in_slices_decodes_as_in_one(monkeypatch, at_once):
    decoder = networks(TINY, lively_params(TINY)).tokenizer
    latents = normal((5, 3, 3, TINY.tokenizer.latent_channels))
    whole = decode(decoder, latents, 10**6)
    assert whole.shape == (5, 6, 6, 3)
    pixels = 36 * at_once
    monkeypatch.setattr(tokenizer_module, "_PIXELS_AT_ONCE", pixels)
    jaxpr = jax.make_jaxpr(decoder.decode_latents)(latents)
    slices = [equation.params["length"] for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "scan"]
    assert slices == [-(-5 // at_once)]
    np.testing.assert_allclose(decode(decoder, latents, pixels), whole, atol=1e-5)


@functools.partial(jax.jit, static_argnums=2)
def decode(decoder, latents, _):
    """Compiled once for each number of pixels at once, which the decoder reads when it is traced."""
    return decoder.decode_latents(latents)
