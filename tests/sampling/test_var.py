"""VAR: sampling with kept keys and values equals teacher forcing over all tokens; one program, of static size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, lively_model, random_tokens, tiny

from hmar_jax import InputError, Schedule
from hmar_jax.networks import networks
from hmar_jax.sampling import program
from hmar_jax.scales import ScaleLadder
from hmar_jax.transformer import teacher_forcing

LADDER = TINY.ladder
LABELS = np.array([0, 3, 5])  # the last is the null class
# Norm of the difference over norm of the truth.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def relative(result, truth):
    return np.linalg.norm(np.asarray(result, np.float64) - truth) / np.linalg.norm(truth)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_scale_by_scale(config, dtype, params, labels, tokens):
    """What a sampler would ask for, were it to draw `tokens`: (B,L,V); and the final cache."""
    nets = networks(config, params, dtype)
    model, ladder = nets.transformer, config.ladder
    pooled = teacher_forcing.teacher_inputs(nets.tokenizer.quantizer, tokens).pooled
    cond, cache, logits = model.condition(labels), model.empty_cache(labels.shape[0]), []
    first = ladder.lengths[0]
    for scale, where in enumerate(ladder.slices):
        own = pooled[:, where.start - first : where.stop - first] if scale else pooled[:, :0]
        x = model.inputs(cond, range(scale, scale + 1), own)
        part, cache = model.extend(x, cond, ladder.until(scale), cache)
        logits.append(part)
    return jnp.concatenate(logits, axis=1), cache


@pytest.mark.parametrize(
    ("sides", "fields", "dtype"),
    [
        ((1, 2, 3), {}, "float32"),
        ((1, 2, 3), {}, "bfloat16"),
        ((1, 2, 3), {"branch_depth": 0}, "float32"),
        ((1, 2, 3), {"branch_depth": 3, "shared_adaln": True}, "float32"),
        ((1, 2, 3), {"branch_depth": 3, "shared_adaln": True}, "bfloat16"),
        ((2, 5), {"depth": 2}, "float32"),
        ((4,), {"depth": 1}, "float32"),
        ((1, 3, 4, 6), {"heads": 2}, "float32"),
    ],
    ids=str,
)
def test_kept_keys_and_values_give_the_teacher_forced_logits(sides, fields, dtype):
    config = tiny(masked=False, pattern="block_causal", **fields)
    network = lively_model(dataclasses.replace(config, ladder=ScaleLadder(sides)), dtype=dtype)
    tokens = random_tokens(network.config, 3)
    kept, cache = logits_scale_by_scale(network.config, dtype, network.params, LABELS, tokens)
    assert relative(kept, np.asarray(network.next_scale_logits(LABELS, tokens))) < TOLERANCE[dtype]
    transformer = network.config.transformer
    room = (3, network.config.ladder.length, transformer.heads, transformer.width // transformer.heads)
    depths = (transformer.trunk_depth, transformer.branch_depth)
    for stack, depth in zip(cache, depths, strict=True):
        assert {x.shape for x in stack} == {(depth, *room)}
        assert {x.dtype for x in stack} == {jnp.dtype(dtype)}
        assert all(np.any(np.asarray(x, np.float32), axis=(-1, -2)).all() for x in stack)  # every place was filled


def test_unguided_greedy_tokens_are_the_teacher_forced_argmax(var_model):
    labels = [0, 1, 2]
    out = var_model.sample(labels, "var", cfg=0, greedy=True)
    np.testing.assert_array_equal(np.argmax(var_model.next_scale_logits(labels, out.tokens), -1), out.tokens)


def test_guided_greedy_tokens_follow_the_published_ramp(var_model):
    labels, cfg = [0, 1, 2], 3.0
    out = var_model.sample(labels, "var", cfg=cfg, greedy=True)
    cond, null = (np.asarray(var_model.next_scale_logits(who, out.tokens)) for who in (labels, [5, 5, 5]))
    ramp = cfg * LADDER.scale_ids[:, None] / (LADDER.num_scales - 1)
    np.testing.assert_array_equal(np.argmax((1 + ramp) * cond - ramp * null, -1), out.tokens)
    assert (out.tokens != var_model.sample(labels, "var", cfg=0, greedy=True).tokens).any()


def test_guidance_of_one_scale_alone_works(var_model):
    """The passes before it are not guided, yet have to fill the null half's keys and values."""
    cfg = [[0.0], [0.0], [4.0]]
    out = var_model.sample([0, 1], "var", cfg=cfg, greedy=True)
    cond, null = (np.asarray(var_model.next_scale_logits(who, out.tokens)) for who in ([0, 1], [5, 5]))
    t = np.where(LADDER.scale_ids == 2, 4.0, 0.0)[:, None]
    np.testing.assert_array_equal(np.argmax((1 + t) * cond - t * null, -1), out.tokens)


def test_same_seed_same_picture_for_any_batch_size(var_model):
    labels = np.arange(5)
    five = var_model.sample(labels, "var", seed=7)
    for batch in (1, 4):
        part = var_model.sample(labels[:batch], "var", seed=7)
        np.testing.assert_array_equal(part.tokens, five.tokens[:batch])
        np.testing.assert_allclose(part.images, five.images[:batch], atol=1e-5)
    assert (var_model.sample(labels, "var", seed=8).tokens != five.tokens).any(1).all()


def test_every_coarser_scale_counts(var_model, stage1_model):
    """Same parameters, other attention: another picture, but for the first scale, which has none before it."""
    var, hmar = (network.sample([0, 1, 2], "var", greedy=True).tokens for network in (var_model, stage1_model))
    np.testing.assert_array_equal(var[:, :1], hmar[:, :1])
    assert (var != hmar).any()


def test_scalars_compile_nothing(var_model):
    labels = np.arange(5)
    base = var_model.sample(labels, "var")
    compiled = program.sample._cache_size()
    for name, value in {"cfg": 6.0, "temperature": 0.3, "top_k": 2, "top_p": 0.3, "seed": 1}.items():
        assert (var_model.sample(labels, "var", **{name: value}).tokens != base.tokens).any(), name
    assert program.sample._cache_size() == compiled


def test_the_null_half_costs_nothing_where_there_is_no_guidance(var_model):
    def flops(cfg):
        schedule = Schedule.preset("var", LADDER).replace(cfg=cfg)
        request = program.Request.of(var_model.config, "float32", schedule, var_model.params, np.zeros(4))
        return program.sample.lower(request).cost_analysis()["flops"]

    assert flops(0) < 0.8 * flops(1.5)


def test_the_preset_has_the_published_settings_at_any_depth():
    for depth in (16, 36):
        schedule = Schedule.preset("var", ScaleLadder.preset(256), depth)
        assert schedule.counts == tuple((side * side,) for side in ScaleLadder.preset(256).sides)
        assert [steps[0] for steps in schedule.cfg] == pytest.approx([1.5 * k / 9 for k in range(10)])
        assert {steps[0] for steps in schedule.top_k} == {900}
        assert {steps[0] for steps in schedule.top_p} == {0.96}


def test_masked_steps_are_refused(var_model):
    with pytest.raises(InputError, match="needs a mask branch, which this model has not"):
        var_model.sample([0], Schedule.from_counts([[1], [1, 3], [9]]))
