"""Schedules, decay mask, clipping and one step of AdamW by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import LADDER, TOKENIZER, TRANSFORMER, assert_bit_equal

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, OptimizerConfig
from hmar_jax.networks import structure
from hmar_jax.training.optimizer import decays, learning_rate, make_optimizer, weight_decay

CONFIG = OptimizerConfig(base_lr=1e-4, final_lr=0.1)
PEAK = 3e-4  # base_lr · 768 / 256


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.005 * PEAK),
        (10, (0.005 + 0.995 / 2) * PEAK),  # half of the warm-up: 2% of 1000 steps
        (20, PEAK),
        (20 + 49, PEAK),  # flat for 5% of the other 980
        (20 + 49 + 931 // 2, PEAK * (1 - 0.9 * 465 / 931)),
        (1000, 0.1 * PEAK),
        (2000, 0.1 * PEAK),
    ],
)
def test_the_learning_rate_warms_up_stays_and_falls(step, expected):
    np.testing.assert_allclose(learning_rate(CONFIG, 1000, 768)(step), expected, rtol=1e-5)


def test_a_run_of_one_step_has_a_learning_rate():
    assert 0 < learning_rate(CONFIG, 1, 256)(0) <= 1e-4


@pytest.mark.parametrize(("step", "expected"), [(0, 0.05), (50, 0.065), (100, 0.08), (200, 0.08)])
def test_weight_decay_follows_half_a_cosine(step, expected):
    schedule = weight_decay(OptimizerConfig(weight_decay=0.05, final_weight_decay=0.08), 100)
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


def test_kernels_and_the_embeddings_of_classes_and_masked_tokens_decay_and_nothing_else():
    transformer = dataclasses.replace(TRANSFORMER, masked=True)
    _, state = structure(ModelConfig(LADDER, TOKENIZER, transformer))
    names = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    names = trees.flatten(decays(trees.unflatten(names)))
    decayed, rest = ({n for n, on in names.items() if on is kind} for kind in (True, False))
    assert {n.rsplit(".", 1)[1] for n in decayed} == {"kernel", "embedding", "mask_embed"}
    assert "transformer.class_embed.embedding" in decayed
    assert "transformer.masked.head.linear.kernel" in decayed
    for name in ("pos", "pos_start", "level", "word_bias"):
        assert f"transformer.{name}" in rest
    for name in ("log_scale", "q_bias", "v_bias"):
        assert f"transformer.trunk.blocks.attention.{name}" in rest
    assert "tokenizer.quantizer.codebook" in rest
    assert not [n for n in rest if n.endswith("kernel")]


def test_one_step_of_adamw_is_what_the_formula_says():
    config = OptimizerConfig(base_lr=0.1, warmup=0, flat=1, weight_decay=0.2, final_weight_decay=0.2, clip=1.0)
    params = {"net": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([0.5])}}
    grads = {"net": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([-4.0])}}
    optimizer = make_optimizer(config, 100, 256, params)
    rates = [learning_rate(config, 100, 256)(step) for step in (0, 1)]
    state, expected = optimizer.init(params), {n: np.asarray(v, np.float64) for n, v in params["net"].items()}
    first = dict.fromkeys(expected, 0.0)
    second = dict(first)
    for step, rate in enumerate(rates, 1):
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, gradient in grads["net"].items():
            clipped = np.asarray(gradient, np.float64) / 5  # norm 5 → 1
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.95 * second[name] + 0.05 * clipped**2
            moved = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8)
            decay = 0.2 * expected[name] if name == "kernel" else 0
            expected[name] = expected[name] - rate * (moved + decay)
    for name, value in expected.items():
        np.testing.assert_allclose(params["net"][name], value, rtol=1e-5)


@pytest.mark.parametrize(("clip", "seen"), [(2.0, 2.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_to_their_norm_or_not_at_all(clip, seen):
    params = {"net": {"bias": jnp.zeros(2)}}
    optimizer = make_optimizer(OptimizerConfig(clip=clip), 100, 256, params)
    _, state = optimizer.update({"net": {"bias": jnp.array([3.0, 4.0])}}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    np.testing.assert_allclose(np.linalg.norm(moments[0]), 0.1 * seen, rtol=1e-5)


def test_each_network_is_clipped_by_itself():
    params = {"tokenizer": {"bias": jnp.zeros(1)}, "discriminator": {"bias": jnp.zeros(1)}}
    grads = {"tokenizer": {"bias": jnp.array([0.5])}, "discriminator": {"bias": jnp.array([1e6])}}
    optimizer = make_optimizer(OptimizerConfig(clip=1.0), 100, 256, params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = sorted(float(leaf[0]) for leaf in jax.tree.leaves(state) if leaf.shape == (1,))
    np.testing.assert_allclose(moments[-2:], [0.05, 0.1], rtol=1e-5)  # first moments: a tenth of 0.5 and of 1


def test_the_discriminator_is_left_alone_before_its_start_and_warms_up_by_itself_from_there():
    """Its moments, bias corrections and learning rate are those of a training that begins at the start."""
    config = OptimizerConfig(base_lr=0.1, warmup=0.5, weight_decay=0.2, final_weight_decay=0.1)
    params = {name: {"kernel": jnp.array([2.0, -1.0])} for name in ("tokenizer", "discriminator")}
    gradients = [{name: {"kernel": jnp.array([0.3, -0.1 * i])} for name in params} for i in range(5)]

    def run(optimizer, params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    quiet = [gradient | {"discriminator": {"kernel": jnp.zeros(2)}} for gradient in gradients[:3]]
    late = make_optimizer(config, 7, 256, params, adversarial_start=3)
    before, after = run(late, params, quiet), run(late, params, quiet + gradients[3:])
    assert_bit_equal(before["discriminator"], params["discriminator"])
    for name, steps, seen in (("tokenizer", 7, gradients), ("discriminator", 4, gradients[3:])):
        alone = {"net": params[name]}
        expected = run(make_optimizer(config, steps, 256, alone), alone, [{"net": gradient[name]} for gradient in seen])
        assert not np.array_equal(after[name]["kernel"], params[name]["kernel"])
        np.testing.assert_allclose(after[name]["kernel"], expected["net"]["kernel"], rtol=1e-6)
