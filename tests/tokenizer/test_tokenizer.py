"""image ⇄ tokens: equal to the official outputs, and to the definition of residual quantization written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.weights import make_image
from tiny_models import TINY, lively_params, random_tokens

from hmar_jax import resize
from hmar_jax.config import TokenizerConfig
from hmar_jax.networks import networks
from hmar_jax.scales import ScaleLadder
from hmar_jax.tokenizer.quantizer import Quantizer, phi_of_scale
from hmar_jax.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("scales", "number", "phis"),
    [
        (4, 4, (0, 1, 2, 3)),
        (10, 4, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        (14, 4, (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)),
        (1, 4, (0,)),
        (10, 3, (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)),
        (10, 6, (0, 0, 1, 1, 2, 3, 3, 4, 5, 5)),
        (10, 8, (0, 0, 1, 2, 3, 4, 5, 6, 7, 7)),
        (10, 9, (0, 0, 1, 2, 3, 4, 5, 7, 7, 8)),
    ],
)
def test_each_scale_uses_the_published_phi(scales, number, phis):
    assert phi_of_scale(scales, number) == phis


@pytest.mark.parametrize("scales", range(1, 15))
def test_every_number_of_phis_follows_the_rule(scales):
    assert phi_of_scale(scales, 1) == (0,) * scales
    assert phi_of_scale(scales, scales) == tuple(range(scales))
    for number in range(1, scales + 1):
        first = 1 / (3 * number) if number == 4 else 1 / (2 * number)
        ticks = [first + i * (1 - 2 * first) / (number - 1) for i in range(number)] if number > 1 else [0.5]
        for scale, phi in enumerate(phi_of_scale(scales, number)):
            distances = [abs(tick - scale / max(scales - 1, 1)) for tick in ticks]
            assert distances[phi] <= min(distances) + 1e-12, (number, scale)  # equal ones are told apart by rounding


@pytest.mark.parametrize("mapping", [(), (2, 0, 1)], ids=["by the rule", "as recorded"])
def test_a_scale_is_lifted_by_its_own_phi(mapping):
    ladder = ScaleLadder((1, 2, 3))
    config = dataclasses.replace(TINY.tokenizer, phis=3, phi_of_scale=mapping)
    quantizer = Quantizer(config, ladder, rngs=nnx.Rngs(0))
    for number, conv in enumerate(quantizer.phis):  # phi(h) = 0.5 h + 0.5 number
        conv.kernel[...] = jnp.zeros_like(conv.kernel[...])
        conv.bias[...] = jnp.full_like(conv.bias[...], number)
    quantizer.codebook[...] = jnp.zeros_like(quantizer.codebook[...])
    lifted = [
        quantizer.lift(jnp.zeros((1, side**2), int), scale)[0, 0, 0, 0] for scale, side in enumerate(ladder.sides)
    ]
    assert [2 * float(value) for value in lifted] == list(mapping or (0, 1, 2))


# --- against the official code


@pytest.fixture(scope="module")
def golden_tokenizer(golden_model):
    return golden_model("vae")


def test_official_tokens(golden, golden_tokenizer):
    tokens = golden_tokenizer.tokenizer.encode(make_image(3, 64).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(tokens, golden["tokens"])


def test_official_picture(golden, golden_tokenizer):
    decoded = golden_tokenizer.tokenizer.decode(golden["tokens"])
    np.testing.assert_allclose(decoded.transpose(0, 3, 1, 2), golden["recon"], rtol=0, atol=3e-5)


def test_official_latents(golden, golden_tokenizer):
    module = networks(golden_tokenizer.config, golden_tokenizer.params).tokenizer.quantizer
    latents = np.transpose(jax.jit(module.reconstruct)(golden["tokens"])[-1], (0, 3, 1, 2))
    assert np.linalg.norm(latents - golden["fhat_last"]) < 2e-6 * np.linalg.norm(golden["fhat_last"])


# --- the quantizer, on its own


def phi(quantizer, scale, maps):
    """0.5 h + 0.5 conv3x3(h) with zeros around, as nine shifted matrix products, float64."""
    conv = quantizer.phis[quantizer.phi_of_scale[scale]]
    kernel, side = np.asarray(conv.kernel[...], np.float64), maps.shape[1]
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (padded[:, i : i + side, j : j + side] @ kernel[i, j] for i in range(3) for j in range(3))
    return 0.5 * maps + 0.5 * (sum(shifted) + np.asarray(conv.bias[...], np.float64))


def resized(matrix, maps):
    return np.einsum("th,uw,bhwz->btuz", np.float64(matrix), np.float64(matrix), maps)


def quantized_by_definition(quantizer, latents):
    """The residual quantizer in float64: tokens, and the running reconstruction after each scale."""
    codebook, full = np.asarray(quantizer.codebook[...], np.float64), quantizer.ladder.sides[-1]
    rest, tokens, sums = np.float64(latents), [], []
    for scale, side in enumerate(quantizer.ladder.sides):
        z = resized(resize.area_matrix(full, side), rest)
        nearest = ((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
        lifted = phi(quantizer, scale, resized(resize.bicubic_matrix(side, full), codebook[nearest]))
        rest = rest - lifted
        tokens.append(nearest.reshape(len(z), -1))
        sums.append(lifted + (sums[-1] if sums else 0))
    return np.concatenate(tokens, 1), np.stack(sums)


@pytest.fixture(scope="module", params=[(1, 2, 3), (2, 3, 5, 6), (4,)], ids=str)
def ladder_quantizer(request):
    ladder = ScaleLadder(request.param)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Quantizer(TINY.tokenizer, ladder, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    for path, parameter in nnx.to_flat_state(state):
        spread = 1 / 6 if path[-1] == "kernel" else 1.0  # of 3x3 kernels over four channels
        parameter.set_value(jnp.asarray(spread * rng.normal(size=parameter.shape), jnp.float32))
    return nnx.merge(graphdef, state)


def test_quantize_follows_the_definition(ladder_quantizer):
    side = ladder_quantizer.ladder.sides[-1]
    latents = 2 * np.random.default_rng(0).normal(size=(3, side, side, 4)).astype(np.float32)
    tokens, sums = quantized_by_definition(ladder_quantizer, latents)
    quantized = jax.jit(ladder_quantizer.quantize)(latents)
    np.testing.assert_array_equal(quantized.tokens, tokens)
    assert quantized.tokens.dtype == jnp.int32
    assert quantized.queries.shape == (3, ladder_quantizer.ladder.length, 4)
    np.testing.assert_allclose(np.cumsum(quantized.lifts, axis=0), sums, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ladder_quantizer.reconstruct)(quantized.tokens), sums, atol=1e-5)


def test_the_nearest_code_wins_and_the_first_among_equals(quantizer):
    codebook = quantizer.codebook[...]
    np.testing.assert_array_equal(quantizer.nearest(codebook + 1e-3), np.arange(16))
    doubled = Quantizer(TINY.tokenizer, TINY.ladder, rngs=nnx.Rngs(0))
    doubled.codebook[...] = codebook.at[9].set(codebook[2])
    assert doubled.nearest(codebook[2]) == 2


def test_tokens_left_out_lift_nothing(ladder_quantizer):
    scale = ladder_quantizer.ladder.num_scales - 1
    tokens = random_scale_tokens(ladder_quantizer, scale)
    keep = np.zeros(tokens.shape, bool)
    keep[:, ::3] = True
    other = np.where(keep, tokens, (tokens + 1) % 16)
    lift = jax.jit(ladder_quantizer.lift, static_argnums=1)
    lifted = lift(tokens, scale, keep)
    np.testing.assert_array_equal(lifted, lift(other, scale, keep))
    nothing = lift(tokens, scale, np.zeros(tokens.shape, bool))
    np.testing.assert_allclose(nothing, phi(ladder_quantizer, scale, np.zeros(nothing.shape)), atol=1e-6)
    everything = lift(tokens, scale, np.ones(tokens.shape, bool))
    np.testing.assert_array_equal(everything, lift(tokens, scale))


def random_scale_tokens(quantizer, scale):
    return np.random.default_rng(3).integers(0, 16, (2, quantizer.ladder.lengths[scale]), np.int32)


# --- the networks around it


@pytest.mark.parametrize(
    ("fields", "sides", "size"),
    [
        ({"multipliers": (1,), "downsampling": 1}, (1, 3), 3),
        ({"multipliers": (1, 2, 1), "downsampling": 2}, (1, 2), 4),
        ({"multipliers": (1, 1, 2), "downsampling": 4, "encoder_blocks": 2, "decoder_blocks": 1}, (2, 3), 12),
        ({"latent_channels": 6, "codebook_size": 5, "phis": 2, "channels": 12}, (1, 2, 4), 8),
    ],
)
def test_channels_levels_latents_codes_and_downsampling_are_free(fields, sides, size):
    base = {"channels": 8, "multipliers": (1, 2), "encoder_blocks": 1, "decoder_blocks": 2, "norm_groups": 4}
    config = TokenizerConfig(**base | {"latent_channels": 4, "codebook_size": 16, "downsampling": 2} | fields)
    ladder = ScaleLadder(sides)

    def there_and_back(images):
        tokenizer = Tokenizer(config, ladder, rngs=nnx.Rngs(0))
        return tokenizer.latents(images), tokenizer.encode(images), tokenizer.decode(tokenizer.encode(images))

    latents, tokens, pictures = jax.eval_shape(there_and_back, jnp.zeros((2, size, size, 3)))
    assert latents.shape == (2, sides[-1], sides[-1], config.latent_channels)
    assert (tokens.shape, tokens.dtype) == ((2, ladder.length), jnp.int32)
    assert (pictures.shape, pictures.dtype) == ((2, size, size, 3), jnp.float32)


def test_the_last_convolution_can_be_given_another_kernel():
    tokenizer = networks(TINY, lively_params(TINY)).tokenizer
    features, convolution = jax.random.normal(jax.random.key(0), (2, 6, 6, 8)), tokenizer.decoder.conv_out

    @jax.jit
    def run(features):
        doubled = tokenizer.render(features, 2 * convolution.kernel[...])
        return tokenizer.render(features), nnx.Conv.__call__(convolution, features), doubled

    rendered, own, doubled = map(np.asarray, run(features))
    np.testing.assert_allclose(rendered, own, atol=1e-6)
    np.testing.assert_allclose(doubled, 2 * own - np.asarray(convolution.bias[...]), atol=1e-5)


def test_growth_ends_in_the_decoded_picture(model):
    tokens = random_tokens(model.config, 2)
    growth = model.tokenizer.growth(tokens)
    assert growth.shape == (3, 2, 6, 6, 3)
    np.testing.assert_allclose(growth[-1], model.tokenizer.decode(tokens), atol=1e-6)
    coarse = model.tokenizer.growth(np.concatenate([tokens[:, :5], (tokens[:, 5:] + 1) % 16], 1))
    np.testing.assert_array_equal(coarse[:2], growth[:2])
    assert np.abs(coarse[2] - growth[2]).max() > 1e-2
