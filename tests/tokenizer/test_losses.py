"""Losses against numpy by hand, and LPIPS against a plain numpy VGG16 on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from hmar_jax.config import TokenizerLossConfig
from hmar_jax.errors import InputError
from hmar_jax.formats import lpips_files
from hmar_jax.tokenizer import losses, perceptual


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# --- discriminator


def make_discriminator(layers=2, channels=8):
    return losses.Discriminator(channels, layers, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def discriminate():
    """A small float32 discriminator as a pure function; parameters from numpy spare compilations."""
    rng = np.random.default_rng(2)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: losses.Discriminator(8, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), shapes)
    return jax.jit(lambda images: nnx.merge(graph, state)(images))


@pytest.mark.parametrize(("layers", "size", "side"), [(1, 6, 1), (2, 16, 2), (2, 19, 2), (3, 24, 1), (3, 32, 2)])
def test_logits_are_float32_patches_of_the_documented_side(layers, size, side):
    discriminator = nnx.eval_shape(lambda: make_discriminator(layers))
    logits = nnx.eval_shape(
        lambda module, x: module(x), discriminator, jax.ShapeDtypeStruct((2, size, size, 3), "float32")
    )
    assert logits.shape == (2, side, side, 1)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(discriminator)))


def test_widths_double_up_to_eight_times():
    abstract = nnx.eval_shape(lambda: make_discriminator(5, channels=64))
    assert [conv.out_features for conv in abstract.convs] == [128, 256, 512, 512, 512]
    assert abstract.norms[0].num_groups == 32


@pytest.mark.parametrize("channels", [1, 3, 10, 48])
def test_groups_divide_any_width_and_hold_two_channels_or_more(channels):
    for norm in nnx.eval_shape(lambda: make_discriminator(3, channels)).norms:
        (width,) = norm.scale.shape
        assert width % norm.num_groups == 0
        assert width >= 2 * norm.num_groups


def test_a_pictures_logits_do_not_depend_on_its_batch(rng, discriminate):
    images = normal(rng, 3, 12, 12, 3)
    np.testing.assert_allclose(discriminate(images)[1:2], discriminate(images[1:2]), rtol=1e-4)


def test_even_a_single_logit_depends_on_the_picture(rng, discriminate):
    logits = discriminate(normal(rng, 3, 12, 12, 3))
    assert logits.shape == (3, 1, 1, 1)
    assert len(np.unique(logits)) == 3


def test_the_discriminators_norms_see_the_spread_of_maps_whose_mean_is_large(rng):
    norm = nnx.GroupNorm(8, 2, use_fast_variance=False, rngs=nnx.Rngs(0))
    built = nnx.eval_shape(lambda: make_discriminator(2)).norms[0]
    assert built.use_fast_variance == norm.use_fast_variance
    maps = np.asarray(3000 + rng.normal(size=(1, 6, 6, 8)), np.float32)
    groups = maps.astype(np.float64).reshape(1, 6, 6, 2, 4)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean((1, 2, 4), keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(maps), expected.reshape(maps.shape), atol=2e-3)  # 3000 rounds to 1.2e-4


def test_pictures_too_small_for_the_layers_are_refused():
    with pytest.raises(InputError, match="at least 24"):
        nnx.eval_shape(lambda: make_discriminator(3)(jnp.zeros((1, 23, 23, 3))))
    with pytest.raises(InputError, match="at least 1"):
        make_discriminator(0)


# --- scalar losses


def test_hinge_losses_match_numpy(rng):
    real, fake = (2 * rng.normal(size=(2, 4, 4, 1)) for _ in range(2))
    expected = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2
    np.testing.assert_allclose(
        losses.hinge_discriminator_loss(jnp.asarray(real), jnp.asarray(fake)), expected, rtol=1e-6
    )
    np.testing.assert_allclose(losses.generator_loss(jnp.asarray(fake)), -fake.mean(), rtol=1e-6)


@pytest.mark.parametrize(("ramp", "expected"), [(0, [0, 0, 0.25, 0.25, 0.25]), (3, [0, 0, 1 / 16, 1 / 8, 0.25])])
def test_the_adversarial_factor_is_off_before_its_start_and_rises_from_there(ramp, expected):
    config = TokenizerLossConfig(adversarial=0.25, adversarial_start=10, adversarial_ramp=ramp)
    factor = jax.jit(lambda step: losses.adversarial_factor(step, config))
    np.testing.assert_allclose([factor(step) for step in (0, 9, 10, 11, 100)], expected)


def test_pixel_loss_matches_numpy(rng):
    a, b = normal(rng, 2, 4, 4, 3), normal(rng, 2, 4, 4, 3)
    d = np.asarray(a) - np.asarray(b)
    expected = 0.5 * np.abs(d).mean() + 2 * (d**2).mean()
    np.testing.assert_allclose(losses.pixel_loss(a, b, l1=0.5, l2=2.0), expected, rtol=1e-6)
    assert losses.pixel_loss(a.astype(jnp.bfloat16), b, l1=1.0, l2=1.0).dtype == jnp.float32


def test_pixel_loss_refuses_to_broadcast():
    with pytest.raises(InputError, match="cannot be compared"):
        losses.pixel_loss(jnp.zeros((1, 4, 4, 3)), jnp.zeros((2, 4, 4, 3)), l1=0.0, l2=1.0)


@pytest.mark.parametrize("as_list", [False, True])
def test_vq_loss_and_its_two_gradients_match_numpy(rng, as_list):
    f, fhats = normal(rng, 2, 3, 3, 4), normal(rng, 5, 2, 3, 3, 4)

    def loss(f, fhats):
        return losses.vq_loss(f, list(fhats) if as_list else fhats, 0.25)

    d = np.asarray(f) - np.asarray(fhats)
    np.testing.assert_allclose(loss(f, fhats), 1.25 * (d**2).mean(), rtol=1e-5)
    to_f, to_fhats = jax.jit(jax.grad(loss, (0, 1)))(f, fhats)
    np.testing.assert_allclose(to_f, 0.25 * 2 * d.mean(0) / f.size, atol=1e-7)
    np.testing.assert_allclose(to_fhats, -2 * d / fhats.size, atol=1e-7)


def test_vq_loss_refuses_no_scales_and_other_shapes():
    f = jnp.zeros((2, 3, 3, 4))
    for fhats in ([], [jnp.zeros((2, 1, 1, 4))]):
        with pytest.raises(InputError, match="vq_loss got"):
            losses.vq_loss(f, fhats, 0.25)


# --- adaptive weight


def test_adaptive_weight_is_the_ratio_of_gradient_norms(rng):
    a, b = normal(rng, 3, 3, 4), normal(rng, 3, 3, 4)
    expected = np.linalg.norm(np.ravel(a)) / (np.linalg.norm(np.ravel(b)) + 1e-4)
    np.testing.assert_allclose(losses.adaptive_weight(a, b), expected, rtol=1e-5)
    assert losses.adaptive_weight(a.astype(jnp.bfloat16), b).dtype == jnp.float32


def test_adaptive_weight_stays_between_0_and_10000():
    assert losses.adaptive_weight(1e6 * jnp.ones(3), jnp.zeros(3)) == 1e4
    assert losses.adaptive_weight(jnp.zeros(3), jnp.ones(3)) == 0


# --- all together


@pytest.fixture
def case(rng):
    """`generator_terms` on a decoder that is one matrix and a discriminator that is a vector; their parts by hand."""
    config = TokenizerLossConfig(
        l1=0.3, vq=0.5, perceptual=0.7, adversarial=0.2, adversarial_start=10, adversarial_ramp=3
    )
    hidden, kernel, images = normal(rng, 2, 4, 4, 5), normal(rng, 5, 3), normal(rng, 2, 4, 4, 3)
    latents, fhats, judge = normal(rng, 2, 2, 2, 4), normal(rng, 3, 2, 2, 2, 4), normal(rng, 3)

    def judged(judge, picture):
        return jnp.tanh(picture @ judge)

    @functools.partial(jax.jit, static_argnames="config")
    def run(kernel, judge, step, config=config):
        def loss(kernel, judge):
            adversary = losses.Adversary(
                judged, judge, lambda gradient: jnp.einsum("bijc,bijd->cd", hidden, gradient), step
            )
            return losses.generator_terms(
                config, hidden @ kernel, images, latents, fhats, adversary=adversary,
                perceptual=lambda a, b: jnp.mean((a - b) ** 4, axis=(1, 2, 3)),
            )  # fmt: skip

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(kernel, judge)

    def reconstruction(kernel):
        d = hidden @ kernel - images
        return 0.3 * jnp.mean(jnp.abs(d)) + jnp.mean(d**2) + 0.7 * jnp.mean(d**4)

    def adversarial(kernel):
        return -jnp.mean(judged(judge, hidden @ kernel))

    def own(judge):
        return losses.hinge_discriminator_loss(judged(judge, images), judged(judge, hidden @ kernel))

    codes = 0.5 * 1.25 * jnp.mean((latents - fhats) ** 2)
    return run, kernel, judge, reconstruction, adversarial, own, codes


@pytest.mark.parametrize(("step", "factor"), [(10, 0.05), (12, 0.15), (99, 0.2)])
def test_each_network_learns_from_its_own_terms_and_the_weight_is_no_path_for_gradients(case, step, factor):
    run, kernel, judge, reconstruction, adversarial, own, codes = case
    (value, metrics), gradients = run(kernel, judge, step)
    to_picture, to_adversary = jax.grad(reconstruction)(kernel), jax.grad(adversarial)(kernel)
    weight = jnp.linalg.norm(to_picture) / (jnp.linalg.norm(to_adversary) + 1e-4)

    assert set(metrics) == {"pixel", "perceptual", "vq", "generator", "discriminator", "adaptive_weight"}
    np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["discriminator"], own(judge), rtol=1e-5)
    np.testing.assert_allclose(value, reconstruction(kernel) + codes + factor * weight * adversarial(kernel), rtol=1e-4)
    np.testing.assert_allclose(gradients[0], to_picture + factor * weight * to_adversary, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradients[1], jax.grad(own)(judge), rtol=1e-4, atol=1e-6)


def test_before_the_start_nothing_is_computed_of_the_discriminator(case):
    """NaN parameters would be in whatever is computed from them, were it multiplied by 0."""
    run, kernel, judge, reconstruction, _, _, codes = case
    (value, metrics), gradients = run(kernel, jnp.nan * judge, 9)
    np.testing.assert_allclose(value, reconstruction(kernel) + codes, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], jax.grad(reconstruction)(kernel), rtol=1e-5)
    np.testing.assert_array_equal(gradients[1], 0)
    assert metrics["generator"] == metrics["discriminator"] == metrics["adaptive_weight"] == 0


def test_terms_that_are_off_are_left_out(rng):
    images, f = normal(rng, 1, 4, 4, 3), normal(rng, 1, 2, 2, 4)
    loss, metrics = losses.generator_terms(TokenizerLossConfig(), images, images, f, [f])
    assert loss == 0
    assert set(metrics) == {"pixel", "vq"}


# --- perceptual


@pytest.fixture(scope="module")
def entries():
    """A weights file's entries at random: He-scaled convolutions, so that every stage has features, and heads ≥ 0."""
    rng = np.random.default_rng(1)
    scales = {4: lambda shape: np.sqrt(2 / np.prod(shape[1:])), 1: lambda shape: 0.1}
    return {
        name: np.abs(rng.standard_normal(shape, np.float32))
        if name.startswith("lin")
        else rng.standard_normal(shape, np.float32) * np.float32(scales[len(shape)](shape))
        for name, shape in perceptual.file_shapes().items()
    }


@pytest.fixture(scope="module")
def params(entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(entries | {"classifier.0.weight": np.zeros((2, 2), np.float32)}, path)
    return lpips_files.load_perceptual(path)


def numpy_lpips(entries, a, b):
    """(B,3,S,S) float64 pictures → (B,), written from the papers alone: loops over taps, NCHW as torchvision has it."""

    def conv(x, weight, bias):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        height, width = x.shape[2:]
        return bias[:, None, None] + sum(
            np.tensordot(weight[:, :, i, j], padded[:, :, i : i + height, j : j + width], (1, 1)).swapaxes(0, 1)
            for i in range(3)
            for j in range(3)
        )

    def stages(x):
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        index = 0
        for convs in (2, 2, 3, 3, 3):
            for _ in range(convs):
                x = np.maximum(conv(x, entries[f"features.{index}.weight"], entries[f"features.{index}.bias"]), 0)
                index += 2  # convolution, ReLU
            yield x
            index += 1  # max-pool
            even = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            x = np.maximum.reduce([even[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])

    total = 0
    for stage, (x, y) in enumerate(zip(stages(a), stages(b), strict=True)):
        x, y = (z / (np.sqrt((z**2).sum(1, keepdims=True)) + 1e-10) for z in (x, y))
        total = total + (entries[f"lin{stage}.model.1.weight"] * (x - y) ** 2).sum(1).mean((1, 2))
    return total


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(3).uniform(-1, 1, (2, 2, 17, 17, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def distance():
    return jax.jit(perceptual.perceptual_distance)


def test_perceptual_distance_matches_an_independent_numpy_implementation(entries, params, pictures, distance):
    expected = numpy_lpips(entries, *pictures.transpose(0, 1, 4, 2, 3))
    assert distance(params, *pictures).dtype == jnp.float32
    np.testing.assert_allclose(distance(params, *pictures), expected, rtol=1e-4)


def test_perceptual_distance_is_zero_for_equal_pictures_symmetric_and_positive(params, pictures, distance):
    a, b = pictures
    np.testing.assert_allclose(distance(params, a, a), 0, atol=1e-12)
    assert (np.asarray(distance(params, a, b)) > 1e-3).all()
    np.testing.assert_allclose(distance(params, a, b), distance(params, b, a), rtol=1e-6)


def test_unit_vectors_have_finite_gradients_where_all_features_are_zero():
    gradient = jax.jit(jax.grad(lambda x: perceptual._unit(jax.nn.relu(x)).sum()))
    np.testing.assert_array_equal(gradient(jnp.zeros((1, 1, 1, 4))), 0)


@pytest.mark.parametrize("shapes", [((1, 15, 15, 3),) * 2, ((1, 16, 16, 3), (2, 16, 16, 3)), ((1, 3, 16, 16),) * 2])
def test_perceptual_distance_refuses_other_shapes(shapes):
    with pytest.raises(InputError, match="at least 16"):
        perceptual.perceptual_distance({}, *map(jnp.zeros, shapes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.5.bias": None}, r"' of perceptual weights lacks features\.5\.bias; .* how to make one\."),
        ({"features.1.weight": np.zeros(1, np.float32)}, r"unexpected features\.1\.weight"),
        ({"lin2.model.1.weight": np.zeros((256,), np.float32)}, r"has lin2\.model\.1\.weight of shape \(256,\)"),
    ],
)
def test_a_weights_file_is_refused_by_the_names_at_fault(entries, tmp_path, change, message):
    path = tmp_path / "vgg.safetensors"
    save_file({name: value for name, value in (entries | change).items() if value is not None}, path)
    with pytest.raises(InputError, match=message):
        lpips_files.load_perceptual(path)


def test_a_missing_or_foreign_weights_file_is_refused_with_its_name(tmp_path):
    foreign = tmp_path / "vgg.pth"
    foreign.write_bytes(b"a pickle, perhaps; no safetensors header")
    for path in (tmp_path / "missing.safetensors", foreign):
        with pytest.raises(InputError, match=rf"{path.name}.*says how to make one"):
            lpips_files.load_perceptual(path)
