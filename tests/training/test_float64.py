"""Gradients and a whole optimizer step of stage 1 against a plain float64 transformer; a golden loss curve."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import lively_params
from tiny_training import CLASSES, LADDER, TOKENIZER, TRANSFORMER, next_scale_config

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, OptimizerConfig
from hmar_jax.networks import networks
from hmar_jax.training import loop
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.objectives import NextScaleObjective, Parts, Start
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.state import TrainState, make_train_step
from hmar_jax.training.weights_and_masks import scale_weights
from hmar_jax.transformer.teacher_forcing import teacher_inputs

B, RATE, DECAY, CLIP = 4, 1e-2, 0.1, 0.5
NETWORK = dataclasses.replace(TRANSFORMER, class_dropout=0.0, drop_path=0.0)
GOLDEN = {1: 2.7718, 40: 2.8928, 100: 2.7379, 200: 2.5083}  # step → loss, on a CPU
START = Start(ModelConfig(LADDER, TOKENIZER, None, CLASSES), {}, {}, lambda name: pytest.fail(f"{name} was read"))


def norm(x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def attention(p, h, heads):
    batch, length, width = h.shape
    bias = jnp.concatenate([p["q_bias"], jnp.zeros(width), p["v_bias"]])
    qkv = (h @ p["qkv"]["kernel"] + bias).reshape(batch, length, 3, heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * jnp.exp(p["log_scale"])[:, None], k)
    same = np.equal.outer(LADDER.scale_ids, LADDER.scale_ids)
    shares = jax.nn.softmax(jnp.where(same, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(h.shape) @ p["proj"]["kernel"] + p["proj"]["bias"]


def block(p, x, cond):
    six = (cond @ p["adaln"]["kernel"] + p["adaln"]["bias"])[:, None]
    g1, g2, s1, s2, b1, b2 = jnp.split(six, 6, axis=-1)
    x = x + g1 * attention(p["attention"], norm(x) * (1 + s1) + b1, NETWORK.heads)
    hidden = (norm(x) * (1 + s2) + b2) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    return x + g2 * (jax.nn.gelu(hidden, approximate=True) @ p["fc2"]["kernel"] + p["fc2"]["bias"])


def plain_loss(p, pooled, batch):
    """Stage 1's loss as its paper has it, without anything that makes it fast."""
    embedding = p["class_embed"]["embedding"][batch["label"]]
    cond = jax.nn.silu(embedding)
    x = jnp.concatenate([embedding[:, None] + p["pos_start"], pooled @ p["word"]["kernel"] + p["word_bias"]], axis=1)
    x = x + p["pos"] + p["level"][LADDER.scale_ids]
    for stack in (p["trunk"]["blocks"], p["next_scale"]["stack"]["blocks"]):
        for i in range(stack["fc1"]["bias"].shape[0]):
            x = block(jax.tree.map(lambda leaf, i=i: leaf[i], stack), x, cond)
    head = p["next_scale"]["head"]
    scale, shift = jnp.split((cond @ head["adaln"]["kernel"] + head["adaln"]["bias"])[:, None], 2, axis=-1)
    logits = (norm(x) * (1 + scale) + shift) @ head["linear"]["kernel"] + head["linear"]["bias"]
    of_target = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][..., None], axis=-1)[..., 0]
    return -jnp.mean(jnp.sum(of_target * scale_weights(LADDER, "log_normal"), axis=1))


@pytest.fixture(scope="module")
def step():
    """The float64 loss and gradients, ours, and the parameters before and after a step."""
    optimizer = OptimizerConfig(
        base_lr=RATE * 256 / B, warmup_from=1, flat=1, weight_decay=DECAY, final_weight_decay=DECAY
    )
    optimizer = dataclasses.replace(optimizer, clip=CLIP)
    config = next_scale_config(Path("."), transformer=NETWORK, batch_size=B, optimizer=optimizer)
    objective = NextScaleObjective(config, CLASSES, START)
    params = lively_params(objective.model_config)
    parts = Parts({"transformer": params["transformer"]}, {"tokenizer": params["tokenizer"]}, {})
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TOKENIZER.codebook_size, (B, LADDER.length)).astype(np.int32)
    batch = {"tokens": tokens, "label": rng.integers(0, len(CLASSES), B).astype(np.int32)}
    pooled = teacher_inputs(networks(objective.model_config, params).tokenizer.quantizer, tokens).pooled
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params["transformer"])
        expected = jax.jit(jax.value_and_grad(plain_loss))(wide, jnp.asarray(np.asarray(pooled), jnp.float64), batch)
        loss, gradients = jax.tree.map(np.asarray, expected)
    own = jax.jit(jax.grad(lambda trained: objective.loss(trained, parts, batch, jax.random.key(0), jnp.int32(0))[0]))
    chain = make_optimizer(optimizer, 10, B, parts.trained)
    before = TrainState.create(config, parts, chain)
    after, metrics = jax.jit(make_train_step(config, objective, chain))(before, parts.frozen, batch)
    trained = (own(parts.trained), before.params, after.params)
    flat = [trees.flatten(tree["transformer"]) for tree in trained]
    ours, old, new = ({name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()} for leaves in flat)
    return loss, trees.flatten(gradients), metrics, ours, old, new


def test_the_loss_and_its_gradients_are_those_of_the_plain_transformer(step):
    loss, expected, metrics, ours, _, _ = step
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    whole = np.sqrt(sum(np.sum(leaf**2) for leaf in expected.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], whole, rtol=1e-5)
    for name, leaf in expected.items():
        distance = np.linalg.norm(ours[name] - leaf)
        assert distance < 1e-5 * np.linalg.norm(leaf) + 1e-7 * whole, name


def test_a_whole_step_is_that_of_adamw_on_those_gradients(step):
    _, gradients, _, _, before, after = step
    whole = np.sqrt(sum(np.sum(leaf**2) for leaf in gradients.values()))
    assert whole > CLIP
    compared = 0
    for name, gradient in gradients.items():
        clipped = gradient * CLIP / whole
        clear = np.abs(clipped) > 1e-6  # below, Adam makes 1 of what may be rounding
        old = before[name]
        moved = clipped / (np.abs(clipped) + 1e-8) + DECAY * old * name.endswith((".kernel", ".embedding"))
        expected = (old - RATE * moved)[clear]
        np.testing.assert_allclose(after[name][clear], expected, rtol=2e-7, atol=1e-4 * RATE, err_msg=name)
        compared += clear.sum() / gradient.size
    assert compared > 0.9 * len(gradients)


def test_the_loss_falls_along_a_golden_curve(starts, tmp_path):
    """Recorded at the commit that added it; a change of seeds, schedules or arithmetic moves it."""
    rate = OptimizerConfig(base_lr=0.3, warmup=0.1)
    loop.train(next_scale_config(starts, steps=200, optimizer=rate, log_every=20, checkpoint_every=200), tmp_path)
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert {step: losses[step] for step in GOLDEN} == pytest.approx(GOLDEN, rel=0.01)
