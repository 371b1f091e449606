"""The transformer: equal to the official outputs, Markov in scales, blind to what is masked, free in size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY, lively_model, lively_params, random_tokens, tiny

from hmar_jax import params as trees
from hmar_jax.config import TransformerConfig
from hmar_jax.networks import Networks, networks
from hmar_jax.transformer import fused, teacher_forcing
from hmar_jax.transformer.blocks import drop_path, weight_init
from hmar_jax.transformer.hmar import HMAR

LADDER = TINY.ladder
LABELS = np.array([0, 3, 5])  # the last is the null class
TOKENS = random_tokens(TINY, 3)
SCALES = range(LADDER.num_scales)
MASKED = np.zeros(TOKENS.shape, bool)
MASKED[:, [2, 3, 5, 8, 9, 12]] = True

# Norm of the difference over norm of the truth.
TOLERANCE = {"official float32": 2e-6, "float32": 1e-5, "bfloat16": 3e-2}


def relative(result, truth):
    return np.linalg.norm(np.asarray(result, np.float64) - truth) / np.linalg.norm(truth)


def other_tokens(where):
    """`TOKENS` with other values at some places."""
    tokens = TOKENS.copy()
    tokens[:, where] = (tokens[:, where] + 1 + np.arange(tokens[:, where].shape[1])) % 16
    return tokens


# --- against the official code


def test_official_inputs(golden, golden_model):
    reference = golden_model("hmar-stage1")
    module = networks(reference.config, reference.params).tokenizer.quantizer
    inputs = jax.jit(lambda tokens: teacher_forcing.teacher_inputs(module, tokens))(golden["tokens"])
    assert relative(inputs.pooled, golden["ns_input"]) < TOLERANCE["official float32"]
    assert relative(inputs.current, golden["mask_tok_input"]) < TOLERANCE["official float32"]


def test_official_next_scale_logits(golden, golden_model):
    reference = golden_model("hmar-stage1")
    logits = reference.next_scale_logits(golden["labels"], golden["tokens"])
    assert logits.dtype == jnp.float32
    assert relative(logits, golden["nsp_logits"]) < TOLERANCE["official float32"]


def test_official_masked_logits(golden, golden_model):
    reference = golden_model("hmar-stage2")
    masked = np.zeros(golden["tokens"].shape, bool)
    masked[:, golden["mask_positions"]] = True
    logits = reference.masked_logits(golden["labels"], golden["tokens"], masked)
    assert relative(logits, golden["mp_logits"]) < TOLERANCE["official float32"]


def test_official_var_logits(golden_var, golden_model):
    reference = golden_model("var")
    logits = reference.next_scale_logits(golden_var["labels"], golden_var["tokens"])
    assert relative(logits, golden_var["var_logits"]) < TOLERANCE["official float32"]


# --- what a scale may know


@pytest.mark.parametrize("changed", SCALES)
@pytest.mark.parametrize("kind", ["model", "var_model"])
def test_a_scales_tokens_reach_only_finer_scales(request, kind, changed):
    network = request.getfixturevalue(kind)
    before = network.next_scale_logits(LABELS, TOKENS)
    after = network.next_scale_logits(LABELS, other_tokens(LADDER.slices[changed]))
    for scale, where in enumerate(LADDER.slices):
        if scale <= changed:
            np.testing.assert_array_equal(after[:, where], before[:, where])
        else:
            assert relative(after[:, where], before[:, where]) > 1e-2


@pytest.fixture(scope="module")
def whole(stage1_model):
    """One jitted function: parameters' pattern and inputs x → next-scale logits over a ladder."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(pattern, ladder, x):
        config = tiny(masked=False, pattern=pattern)
        transformer = networks(config, stage1_model.params).transformer
        cond = transformer.condition(jnp.asarray(LABELS))
        return transformer.predict("next_scale", x, cond, ladder, fused.logits)

    return run


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
@pytest.mark.parametrize("changed", SCALES)
def test_attention_carries_a_scales_input_as_far_as_its_pattern_says(whole, pattern, changed):
    x = np.random.default_rng(0).normal(size=(3, LADDER.length, 32)).astype(np.float32)
    moved = x.copy()
    moved[:, LADDER.slices[changed]] *= -1
    before, after = whole(pattern, LADDER, x), whole(pattern, LADDER, moved)
    for scale, where in enumerate(LADDER.slices):
        reached = scale == changed or (pattern == "block_causal" and scale > changed)
        if reached:
            assert relative(after[:, where], before[:, where]) > 1e-3
        else:
            np.testing.assert_array_equal(after[:, where], before[:, where])


def test_a_scale_alone_gives_the_logits_it_gives_among_all(whole):
    x = np.random.default_rng(0).normal(size=(3, LADDER.length, 32)).astype(np.float32)
    joined = whole("block_diagonal", LADDER, x)
    for scale, where in enumerate(LADDER.slices):
        alone = whole("block_diagonal", LADDER.only(scale), x[:, where])
        assert relative(alone, joined[:, where]) < TOLERANCE["float32"]


def test_the_coarser_scales_are_known_by_their_sum_alone(quantizer):
    """Other tokens with the same f_{k-1} are the same to scale k."""
    inputs = teacher_forcing.teacher_inputs(quantizer, jnp.asarray(TOKENS))
    sums = quantizer.reconstruct(jnp.asarray(TOKENS))
    offset = LADDER.lengths[0]
    for scale in SCALES[1:]:
        where = slice(LADDER.offsets[scale] - offset, LADDER.offsets[scale + 1] - offset)
        np.testing.assert_allclose(inputs.pooled[:, where], quantizer.pool(sums[scale - 1], scale), atol=1e-6)
        own = quantizer.lift(jnp.asarray(TOKENS[:, LADDER.slices[scale]]), scale)
        np.testing.assert_allclose(inputs.current[:, where], quantizer.pool(own, scale), atol=1e-6)


def test_the_class_reaches_every_scale(model):
    before, after = (model.next_scale_logits(np.full(3, label), TOKENS) for label in (0, 1))
    for where in LADDER.slices:
        assert relative(after[:, where], before[:, where]) > 1e-2


# --- what a masked token shows of itself


@pytest.mark.parametrize("scale", SCALES[1:])
class TestMaskedTokens:
    def places(self, scale, masked):
        where = np.zeros(LADDER.length, bool)
        where[LADDER.slices[scale]] = True
        return where & (MASKED[0] == masked)

    def test_leak_free_logits_never_see_them(self, leak_free_model, scale):
        before = leak_free_model.masked_logits(LABELS, TOKENS, MASKED)
        after = leak_free_model.masked_logits(LABELS, other_tokens(self.places(scale, True)), MASKED)
        seen = slice(0, LADDER.offsets[scale + 1])
        np.testing.assert_array_equal(after[:, seen], before[:, seen])

    def test_the_published_inputs_do_leak_them(self, model, scale):
        before = model.masked_logits(LABELS, TOKENS, MASKED)
        after = model.masked_logits(LABELS, other_tokens(self.places(scale, True)), MASKED)
        coarser, own = slice(0, LADDER.offsets[scale]), LADDER.slices[scale]
        np.testing.assert_array_equal(after[:, coarser], before[:, coarser])
        assert relative(after[:, own], before[:, own]) > 1e-3

    @pytest.mark.parametrize("kind", ["model", "leak_free_model"])
    def test_visible_tokens_of_the_scale_do_count(self, request, kind, scale):
        network = request.getfixturevalue(kind)
        before = network.masked_logits(LABELS, TOKENS, MASKED)
        after = network.masked_logits(LABELS, other_tokens(self.places(scale, False)), MASKED)
        masked = self.places(scale, True)
        assert relative(after[:, masked], before[:, masked]) > 1e-3

    @pytest.mark.parametrize("kind", ["model", "leak_free_model"])
    def test_which_tokens_are_masked_counts_in_that_scale_alone(self, request, kind, scale):
        network = request.getfixturevalue(kind)
        fewer = MASKED.copy()
        fewer[:, np.flatnonzero(self.places(scale, True))[0]] = False
        before, after = (network.masked_logits(LABELS, TOKENS, masked) for masked in (MASKED, fewer))
        for other, where in enumerate(LADDER.slices):
            if other == scale:
                assert relative(after[:, where], before[:, where]) > 1e-3
            else:
                np.testing.assert_array_equal(after[:, where], before[:, where])


def test_both_branches_share_trunk_and_inputs_but_not_weights(model, stage1_model):
    np.testing.assert_array_equal(
        model.next_scale_logits(LABELS, TOKENS), stage1_model.next_scale_logits(LABELS, TOKENS)
    )
    masked = model.masked_logits(LABELS, TOKENS, MASKED)
    assert relative(model.next_scale_logits(LABELS, TOKENS), masked) > 0.1


# --- drop-path


@functools.partial(jax.jit, static_argnums=0)
def training_logits(rate, params, key):
    nets = networks(tiny(drop_path=rate), params)
    labels, tokens, quantizer = jnp.asarray(LABELS), jnp.asarray(TOKENS), nets.tokenizer.quantizer
    return teacher_forcing.predict(nets.transformer, quantizer, labels, tokens, fused.logits, key=key)


def test_drop_path_works_in_training_only(model):
    at_rest = model.next_scale_logits(LABELS, TOKENS)
    dropping = type(model)(tiny(drop_path=0.9), model.params)
    np.testing.assert_array_equal(dropping.next_scale_logits(LABELS, TOKENS), at_rest)
    first, again, other = (training_logits(0.9, model.params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert relative(first, other) > 1e-2
    without = training_logits(0.0, model.params, jax.random.key(0))
    assert relative(without, at_rest) < TOLERANCE["float32"]


def test_drop_path_rates_rise_linearly_over_trunk_and_branch():
    config = tiny(depth=5, branch_depth=2, drop_path=0.4)
    transformer = nnx.eval_shape(lambda: networks_of(config))
    rates = (*transformer.trunk.drop_rates, *transformer.next_scale.stack.drop_rates)
    assert rates == pytest.approx((0, 0.1, 0.2, 0.3, 0.4))
    assert transformer.masked.stack.drop_rates == transformer.next_scale.stack.drop_rates


def networks_of(config):
    return Networks(config, dtype=jnp.float32, rngs=nnx.Rngs(0)).transformer


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    dropped = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    values = dropped[:, 0, 0]
    assert (dropped == values[:, None, None]).all()
    np.testing.assert_allclose(np.unique(values), [0, 4 / 3], rtol=1e-6)
    assert values.mean() == pytest.approx(1, abs=4 * np.sqrt(0.25 / 0.75 / 4000))  # four standard errors


# --- sizes and options


@pytest.mark.parametrize(
    ("depth", "width", "heads", "branch_depth", "mlp_ratio"),
    [(1, 12, 3, 1, 4), (2, 20, 2, 0, 2), (3, 24, 1, 3, 4), (4, 16, 16, 1, 1)],
)
def test_depth_width_heads_and_branch_are_free(depth, width, heads, branch_depth, mlp_ratio):
    fields = {"depth": depth, "width": width, "heads": heads, "branch_depth": branch_depth, "mlp_ratio": mlp_ratio}
    logits = lively_model(tiny(**fields)).masked_logits(LABELS, TOKENS, MASKED)
    assert (logits.shape, logits.dtype) == ((3, LADDER.length, 16), jnp.float32)
    assert np.isfinite(logits).all()
    assert np.std(logits, axis=1).min() > 0


def test_shared_adaln_is_one_projection_plus_an_offset_per_block():
    """Equal to a model whose blocks each have that projection, their offset added to its bias."""
    config = tiny(shared_adaln=True)
    flat = trees.flatten(lively_params(config))
    kernel, bias = flat.pop("transformer.adaln.kernel"), flat.pop("transformer.adaln.bias")
    own = {}
    for name, leaf in flat.items():
        if name.endswith(".adaln_offset"):
            stem = name.removesuffix("_offset")
            depth = leaf.shape[0]
            own[f"{stem}.kernel"] = jnp.broadcast_to(kernel, (depth, *kernel.shape))
            own[f"{stem}.bias"] = bias + leaf.reshape(depth, -1)
        else:
            own[name] = leaf
    shared = lively_model(config).next_scale_logits(LABELS, TOKENS)
    separate = type(lively_model(TINY))(TINY, trees.unflatten(own)).next_scale_logits(LABELS, TOKENS)
    assert relative(shared, separate) < TOLERANCE["float32"]


def gradients(remat, params):
    """Of a next-scale pass, in the parameters that it uses."""

    x = np.random.default_rng(0).normal(size=(3, LADDER.length, 32)).astype(np.float32)

    @jax.jit
    def gradient(params):
        def loss(transformer):
            nets = networks(tiny(masked=False), params | {"transformer": transformer}, "float32", remat)
            cond = nets.transformer.condition(jnp.asarray(LABELS))
            return jnp.mean(nets.transformer.predict("next_scale", x, cond, LADDER, fused.logits) ** 2)

        return jax.grad(loss)(params["transformer"])

    flat = trees.flatten(gradient(params))
    return {name: leaf for name, leaf in flat.items() if name.startswith(("trunk", "next_scale", "class_embed"))}


@pytest.fixture(scope="module")
def plain_gradients(stage1_model):
    return gradients("none", stage1_model.params)


@pytest.mark.parametrize("remat", ["dots", "all"])
def test_recomputation_changes_no_gradient(stage1_model, plain_gradients, remat):
    recomputed = gradients(remat, stage1_model.params)
    for name, gradient in plain_gradients.items():
        assert np.linalg.norm(gradient) > 0, name
        assert relative(recomputed[name], gradient) < TOLERANCE["float32"], name


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_compute_is_close_and_gives_float32_logits(model, masked):
    half = type(model)(model.config, model.params, "bfloat16")
    exact, rounded = (
        network.masked_logits(LABELS, TOKENS, MASKED) if masked else network.next_scale_logits(LABELS, TOKENS)
        for network in (model, half)
    )
    assert rounded.dtype == jnp.float32
    assert 0 < relative(rounded, exact) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("kind", ["next-scale", "masked", "cached"])
def test_blocks_one_by_one_give_what_they_give_in_a_loop(model, var_model, kind):
    assert relative(*(logits_of(var_model if kind == "cached" else model, kind, scan) for scan in (False, True))) < 1e-6


def logits_of(model, kind, scan):
    @jax.jit
    def run(params):
        nets = networks(model.config, params, scan=scan)
        transformer, quantizer = nets.transformer, nets.tokenizer.quantizer
        if kind != "cached":
            masked = MASKED if kind == "masked" else None
            return teacher_forcing.predict(transformer, quantizer, LABELS, TOKENS, fused.logits, masked)
        cond, cache = transformer.condition(LABELS), transformer.empty_cache(len(LABELS))
        pooled, logits = teacher_forcing.teacher_inputs(quantizer, TOKENS).pooled, []
        for scale, where in enumerate(TINY.ladder.slices):
            x = transformer.inputs(
                cond, range(scale, scale + 1), pooled[:, slice(where.start - 1, where.stop - 1) if scale else slice(0)]
            )
            of_scale, cache = transformer.extend(x, cond, TINY.ladder.until(scale), cache)
            logits.append(of_scale)
        return jnp.concatenate(logits, axis=1)

    return run(model.params)


# --- initial values


@functools.partial(jax.jit, static_argnums=0)
def initial(config, key):
    module = HMAR(config, LADDER, codebook_size=16, latent_channels=4, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


FRESH = TransformerConfig(3, 64, 4, num_classes=40, branch_depth=1, masked=True, gate_init=1e-3)


@pytest.fixture(scope="module")
def fresh():
    return trees.flatten(initial(FRESH, jax.random.key(7)))


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("class_embed.embedding", 1),
        ("pos", 1),
        ("word.kernel", 1),
        ("mask_embed", 1),
        ("trunk.blocks.attention.qkv.kernel", 1),
        ("trunk.blocks.attention.proj.kernel", 6**-0.5),
        ("trunk.blocks.fc1.kernel", 1),
        ("masked.stack.blocks.fc2.kernel", 6**-0.5),
        ("next_scale.head.linear.kernel", 0.02),
        ("masked.head.adaln.kernel", 0.5),
    ],
)
def test_initial_weights_have_the_published_spread(fresh, name, factor):
    leaf = np.asarray(fresh[name])
    expected = factor * (1 / (3 * 64)) ** 0.5
    assert leaf.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * leaf.size))  # four standard errors
    assert abs(leaf.mean()) < 4 * expected / np.sqrt(leaf.size)


def test_initial_weights_have_no_outliers():
    """A truncated normal in float32 has some at 20 deviations and more: one in millions of draws."""
    deviation = (1 / (3 * 128)) ** 0.5
    draws = np.asarray(weight_init(128)(jax.random.key(0), (2**23,))) / deviation
    assert 4.5 < np.abs(draws).max() < 7
    assert draws.std() == pytest.approx(1, rel=5 / np.sqrt(2 * draws.size))  # five standard errors


def test_initial_gates_are_nearly_closed(fresh):
    for rows, factor in ((slice(0, 2), 1e-3), (slice(2, 6), 0.5)):
        kernel = np.asarray(fresh["trunk.blocks.adaln.kernel"]).reshape(2, 64, 6, 64)[:, :, rows]
        assert kernel.std() == pytest.approx(factor * (1 / (3 * 64)) ** 0.5, rel=0.05)


def test_offsets_of_a_shared_adaln_start_with_one_over_the_root_of_the_width():
    config = dataclasses.replace(FRESH, masked=False, shared_adaln=True)
    offsets = trees.flatten(initial(config, jax.random.key(7)))["trunk.blocks.adaln_offset"]  # (2,6,64)
    for rows, factor in ((slice(0, 2), 1e-3), (slice(2, 6), 0.5)):
        chosen = np.asarray(offsets)[:, rows]
        assert chosen.std() == pytest.approx(factor * 64**-0.5, rel=4 / np.sqrt(2 * chosen.size))


def test_initial_biases_are_zero_and_temperatures_four(fresh):
    biases = [name for name in fresh if name.endswith("bias")]
    assert len(biases) > 10
    for name in biases:
        assert not np.any(fresh[name]), name
    for name in ("trunk.blocks", "next_scale.stack.blocks", "masked.stack.blocks"):
        np.testing.assert_allclose(fresh[f"{name}.attention.log_scale"], np.log(4.0), rtol=1e-6)


def test_every_block_starts_from_its_own_numbers(fresh):
    first, second = fresh["trunk.blocks.fc1.kernel"]
    blocks = [first, second, fresh["next_scale.stack.blocks.fc1.kernel"][0], fresh["masked.stack.blocks.fc1.kernel"][0]]
    for i, one in enumerate(blocks):
        for other in blocks[:i]:
            assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.05


def test_initial_values_are_a_function_of_the_seed(fresh):
    again, other = (trees.flatten(initial(FRESH, jax.random.key(seed))) for seed in (7, 8))
    for name, leaf in fresh.items():
        np.testing.assert_array_equal(leaf, again[name])
    assert not np.array_equal(fresh["pos"], other["pos"])
