"""One step of the two transformer stages: what it hides, counts, averages, freezes and in which precision."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import CLASSES, LADDER, TOKENIZER, TRANSFORMER, assert_bit_equal, next_scale_config, stage_config

from hmar_jax import params as trees
from hmar_jax.compile_check import costs
from hmar_jax.compile_check.hlo import Program
from hmar_jax.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from hmar_jax.errors import InputError
from hmar_jax.model import Model, from_pretrained
from hmar_jax.networks import Layout
from hmar_jax.parallel import sharding
from hmar_jax.training.objectives import Parts, initial_parts, make_objective
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.state import TrainState, jit_train_step, make_train_step
from hmar_jax.training.weights_and_masks import Mean, scale_weights
from hmar_jax.transformer import teacher_forcing
from hmar_jax.transformer.fused import Scores

STEADY = dataclasses.replace(TRANSFORMER, class_dropout=0.0, drop_path=0.0)
KEY = jax.random.key(5)


def batch(size, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TOKENIZER.codebook_size, (size, LADDER.length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "label": jnp.asarray(rng.integers(0, 3, size), jnp.int32)}


@pytest.fixture
def seen(starts, monkeypatch):
    """(stage, batch size, key, step, **config changes) → objective's loss, metrics, what it asked the transformer for.

    The transformer is stood in for by fixed scores, so that all else can be computed here.
    """

    def run(stage, size, key=KEY, step=0, **changes):
        asked = {}

        def record(model, quantizer, labels, tokens, output, masked=None, key=None, *, leak_free=None):
            entropy = jax.random.exponential(jax.random.key(1), tokens.shape)
            correct = jax.random.bernoulli(jax.random.key(2), 0.3, tokens.shape).astype(jnp.float32)
            asked.update(labels=np.asarray(labels), leak_free=leak_free, entropy=np.asarray(entropy, np.float64))
            asked["correct"] = np.asarray(correct)
            asked["masked"] = None if stage == "next_scale" else np.asarray(masked)
            return Scores(entropy, correct)

        monkeypatch.setattr(teacher_forcing, "predict", record)
        objective = make_objective(stage_config(stage, starts, **changes), CLASSES)
        parts = initial_parts(objective)
        examples = batch(size)
        loss, (metrics, _) = objective.loss(parts.trained, parts, examples, key, jnp.int32(step))
        metrics = {name: m.value if isinstance(m, Mean) else m for name, m in metrics.items()}
        return {"loss": loss, "metrics": metrics, "batch": examples} | asked

    return run


@pytest.mark.parametrize("kind", ["log_normal", "uniform", "equal"])
def test_next_scale_loss_weighs_every_token(seen, kind):
    s = seen("next_scale", 3, objective=ObjectiveConfig(scale_weights=kind))
    expected = (s["entropy"] * scale_weights(LADDER, kind)).sum(axis=1).mean()
    np.testing.assert_allclose(s["loss"], expected, rtol=1e-5)
    for k, where in enumerate(LADDER.slices):
        np.testing.assert_allclose(s["metrics"]["scale_loss"][k], s["entropy"][:, where].mean(), rtol=1e-5)
        np.testing.assert_allclose(s["metrics"]["scale_accuracy"][k], s["correct"][:, where].mean(), rtol=1e-5)
    np.testing.assert_allclose(s["metrics"]["accuracy"], s["correct"].mean(), rtol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_masked_loss_counts_masked_positions_only(seen, per_sample):
    s = seen("masked", 3, objective=ObjectiveConfig(per_sample_masks=per_sample))
    masked = s["masked"]
    assert 0 < masked.sum() < masked.size
    np.testing.assert_allclose(s["loss"], s["entropy"][masked].mean(), rtol=1e-5)
    np.testing.assert_allclose(s["metrics"]["accuracy"], s["correct"][masked].mean(), rtol=1e-5)
    np.testing.assert_allclose(s["metrics"]["masked_share"], masked.mean(), rtol=1e-5)
    assert s["metrics"]["scale_loss"][0] == 0
    for k, where in list(enumerate(LADDER.slices))[1:]:
        inside = masked[:, where]
        expected = s["entropy"][:, where][inside].mean() if inside.any() else 0
        np.testing.assert_allclose(s["metrics"]["scale_loss"][k], expected, rtol=1e-5)


def test_a_batch_shares_its_mask_unless_masks_are_per_sample(seen):
    assert len(np.unique(seen("masked", 6)["masked"], axis=0)) == 1
    own = seen("masked", 6, objective=ObjectiveConfig(per_sample_masks=True))["masked"]
    assert len(np.unique(own.sum(axis=1))) > 3
    counts = np.stack([own[:, where].sum(axis=1) for where in LADDER.slices], axis=1)
    assert not counts[:, 0].any()
    assert (abs(counts[:, 1] / 4 - counts[:, 2] / 64) < 1 / 4).all()  # one ratio for all scales of a sample


def test_every_step_has_a_mask_of_its_own_that_all_parts_of_its_batch_share(seen):
    steps = [seen("masked", 2, step=step)["masked"] for step in range(4)]
    assert len({mask.tobytes() for mask in steps}) == 4
    parts = [seen("masked", 2, key=jax.random.key(key), step=1)["masked"] for key in (1, 2)]
    for mask in parts:
        np.testing.assert_array_equal(mask, steps[1])


@pytest.mark.parametrize("leak_free", [False, True])
def test_masked_inputs_are_leak_free_where_the_config_says_so(seen, starts, leak_free):
    changes = {"objective": ObjectiveConfig(leak_free=leak_free)}
    assert seen("masked", 2, **changes)["leak_free"] is leak_free
    recorded = make_objective(stage_config("masked", starts, **changes), CLASSES).model_config.transformer
    assert (recorded.masked, recorded.leak_free) == (True, leak_free)


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
def test_a_tenth_of_the_classes_is_dropped(seen, stage):
    s = seen(stage, 3000)
    given = np.asarray(s["batch"]["label"])
    dropped = s["labels"] == len(CLASSES)
    assert abs(dropped.mean() - 0.1) < 0.03  # 5 standard deviations
    np.testing.assert_array_equal(s["labels"][~dropped], given[~dropped])
    other = seen(stage, 3000, key=jax.random.key(6))
    assert (other["labels"] != s["labels"]).any()


def test_class_dropout_follows_the_config(seen):
    assert (seen("next_scale", 50, transformer=STEADY)["labels"] != len(CLASSES)).all()
    always = dataclasses.replace(STEADY, class_dropout=1.0)
    assert (seen("next_scale", 50, transformer=always)["labels"] == len(CLASSES)).all()


def test_the_mask_branch_starts_as_a_copy_of_the_next_scale_branch(starts):
    parts = initial_parts(make_objective(stage_config("masked", starts), CLASSES))
    assert set(parts.trained["transformer"]) == {"masked", "mask_embed"}
    assert set(parts.trained) == {"transformer"}
    assert_bit_equal(parts.trained["transformer"]["masked"], parts.frozen["transformer"]["next_scale"])
    assert np.std(parts.trained["transformer"]["mask_embed"]) > 0


@pytest.mark.parametrize("classes", [CLASSES, ("D", "E")])
def test_next_scale_training_goes_on_from_a_transformer_of_the_same_network(starts, classes):
    transformer = dataclasses.replace(TRANSFORMER, num_classes=len(classes), drop_path=0.3, class_dropout=0.2)
    config = next_scale_config(starts, init_from=str(starts / "next_scale"), transformer=transformer)
    objective = make_objective(config, classes)
    parts, start = initial_parts(objective), Layout.unpack(from_pretrained(starts / "next_scale").params)
    ours, theirs = (trees.flatten(params["transformer"]) for params in (parts.trained, start))
    embedding, known = ours.pop("class_embed.embedding"), theirs.pop("class_embed.embedding")
    assert_bit_equal(ours, theirs)
    assert embedding.shape == (len(classes) + 1, TRANSFORMER.width)
    assert np.array_equal(embedding, known) == (classes == CLASSES)
    assert set(parts.frozen) == {"tokenizer"}
    assert ("but for its class embeddings" in objective.notes[0]) == (classes != CLASSES)


def test_of_a_start_with_another_network_only_the_tokenizer_is_used_and_it_is_said(starts):
    other = dataclasses.replace(TRANSFORMER, depth=3)
    objective = make_objective(
        next_scale_config(starts, init_from=str(starts / "next_scale"), transformer=other), CLASSES
    )
    assert initial_parts(objective).trained["transformer"]["trunk"]["blocks"]["fc1"]["kernel"].shape[0] == 2
    assert objective.notes == [
        f"The transformer in {starts / 'next_scale'} is another network; only its tokenizer is used."
    ]


def test_a_cache_of_another_number_of_classes_is_refused(starts):
    wrong = dataclasses.replace(TRANSFORMER, num_classes=5)
    with pytest.raises(InputError, match=r"has 3 classes, but transformer.num_classes is 5; set it to 3"):
        make_objective(next_scale_config(starts, transformer=wrong), CLASSES)


@pytest.fixture(scope="module")
def descend(starts):
    """(steps, **config changes) → states and metrics of plain gradient descent from the same start."""

    @functools.cache
    def run(steps, **changes):
        config = next_scale_config(starts, transformer=STEADY, **changes)
        objective = make_objective(config, CLASSES)
        optimizer = optax.sgd(1.0)
        states = [TrainState.create(config, initial_parts(objective), optimizer)]
        frozen, metrics = initial_parts(objective).frozen, []
        step = jax.jit(make_train_step(config, objective, optimizer))
        for i in range(steps):
            state, measured = step(states[-1], frozen, batch(8, seed=i))
            states.append(state)
            metrics.append(jax.device_get(measured))
        return states, metrics

    return run


def moved(states):
    return trees.flatten(jax.tree.map(lambda a, b: np.asarray(b - a), states[0].params, states[1].params))


EMA = OptimizerConfig(ema=0.75)


def test_accumulation_gives_the_gradient_of_the_whole_batch(descend):
    whole, parts = descend(2, optimizer=EMA), descend(1, accumulate=4)
    expected = moved(whole[0])
    assert max(abs(leaf).max() for leaf in expected.values()) > 1e-3
    for name, leaf in moved(parts[0]).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=2e-7, err_msg=name)
    for name in ("loss", "gradient_norm", "scale_loss", "scale_accuracy", "accuracy"):
        np.testing.assert_allclose(parts[1][0][name], whole[1][0][name], rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def steady_start(starts, tmp_path_factory):
    """The next-scale model of `starts` as stage 2 starts from it, but that training drops classes alone."""
    start = from_pretrained(starts / "next_scale")
    config = dataclasses.replace(start.config, transformer=dataclasses.replace(STEADY, class_dropout=0.3))
    return Model(config, start.params).save(tmp_path_factory.mktemp("steady") / "model", source="made for a test")


@pytest.mark.parametrize("per_sample", [False, True], ids=["one mask for all", "a mask each"])
def test_masked_training_in_parts_gives_the_gradient_of_the_whole_batch(starts, steady_start, per_sample):
    """The ratio of sums over the batch, not the mean of its parts' ratios, whose numbers of masked tokens differ."""

    def descended(accumulate):
        wanted = ObjectiveConfig(per_sample_masks=per_sample)
        config = stage_config("masked", starts, init_from=str(steady_start), accumulate=accumulate, objective=wanted)
        objective, optimizer = make_objective(config, CLASSES), optax.sgd(1.0)
        parts = initial_parts(objective)
        before = TrainState.create(config, parts, optimizer)
        before = dataclasses.replace(before, step=jnp.int32(3))
        after, metrics = jax.jit(make_train_step(config, objective, optimizer))(before, parts.frozen, batch(8))
        return moved([before, after]), jax.device_get(metrics)

    expected, whole = descended(1)
    assert 0 < whole["masked_share"] < 1
    assert max(abs(leaf).max() for leaf in expected.values()) > 1e-3
    for accumulate in (2, 4):
        steps, parts = descended(accumulate)
        for name, leaf in steps.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=2e-7, err_msg=name)
        assert parts.keys() == whole.keys()
        for name, value in parts.items():
            np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_averages_follow_their_formula_from_the_first_parameters_on(descend):
    states, _ = descend(2, optimizer=EMA)
    assert_bit_equal(states[0].ema, states[0].params)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        decay = min(EMA.ema, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, before.ema, after.params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), after.ema, expected)
    assert states[2].best is states[2].ema
    assert descend(1, accumulate=4)[0][1].ema == {}


def test_steps_are_counted_and_the_gradient_norm_is_that_of_all_gradients(descend):
    states, metrics = descend(2, optimizer=EMA)
    assert [int(state.step) for state in states] == [0, 1, 2]
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in moved(states).values()))
    np.testing.assert_allclose(metrics[0]["gradient_norm"], norm, rtol=1e-3)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(descend, starts):
    config = next_scale_config(starts, transformer=STEADY, dtype="bfloat16", optimizer=EMA)
    objective = make_objective(config, CLASSES)
    parts = initial_parts(objective)
    optimizer = make_optimizer(config.optimizer, 5, 8, parts.trained)
    state = TrainState.create(config, parts, optimizer)
    step = jax.jit(make_train_step(config, objective, optimizer))
    products = [line for line in str(step.trace(state, parts.frozen, batch(8)).jaxpr).splitlines() if "dot_gen" in line]
    assert sum("bf16" in line for line in products) > len(products) / 2
    after, metrics = step(state, parts.frozen, batch(8))
    floats = [leaf.dtype for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    exact = descend(2, optimizer=EMA)[1][0]["loss"]
    assert metrics["loss"] != exact
    np.testing.assert_allclose(metrics["loss"], exact, rtol=0.02)


# --- on a mesh; called by test_devices.py, which has the devices


class Linear:
    """An objective of one matrix; after a step it sees what that made of the batch."""

    def loss(self, trained, parts, batch, key, step):
        made = batch["x"] @ trained["w"]
        return (made**2).mean(), ({}, made)

    def after_update(self, trained, ema, extra, seen, key, step):
        return trained, ema, {"usage": extra["usage"] + seen.reshape(-1, seen.shape[-1]).mean(axis=0)}, {}


def done_in_parts(parts):
    """FLOPs of each of eight devices in a step of as many parts, and kind → payload of its collectives."""
    config = stage_config("tokenizer", Path(), batch_size=64, accumulate=parts)
    mesh, optimizer = sharding.make_mesh(MeshConfig()), optax.sgd(0.1)
    with jax.set_mesh(mesh):
        start = Parts({"w": np.ones((32, 128), np.float32)}, {}, {"usage": np.ones(128, np.float32)})
        state = jax.device_put(TrainState.create(config, start, optimizer), sharding.replicated(mesh))
        batch = sharding.put_batch({"x": np.ones((64, 32), np.float32)}, mesh)
        step = jit_train_step(make_train_step(config, Linear(), optimizer), state, mesh)
        text = Program(step.lower(state, {}, batch).compile().as_text())
    return costs.products(text), {kind: sums.payload for kind, sums in costs.collectives(text).items()}
