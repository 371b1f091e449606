"""The tokenizer's training: it learns, its terms reach whom they should, and what keeps its codebook alive is used."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tiny_training import CLASSES, LADDER, LOSS, SIZE, TOKENIZER, assert_bit_equal, differing, tokenizer_config

from hmar_jax import params as trees
from hmar_jax.config import OptimizerConfig
from hmar_jax.data import pipeline
from hmar_jax.errors import InputError
from hmar_jax.model import from_pretrained
from hmar_jax.tokenizer.perceptual import file_shapes
from hmar_jax.training import loop
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.objectives import initial_parts, make_objective
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.state import TrainState, make_train_step

KEY = jax.random.key(0)
PLAIN = dataclasses.replace(LOSS, adversarial=0.0, scale_dropout=0.0)


@pytest.fixture(scope="module")
def batch():
    config = tokenizer_config()
    stream = pipeline.batches(config.data, batch_size=8, image_size=SIZE, seed=config.seed)
    examples = next(stream)
    stream.close()
    return examples


@pytest.fixture(scope="module")
def forward(batch):
    """(weights, key, parts) → loss and metrics of one batch, compiled once for each weights."""
    compiled = {}

    def run(weights, key=KEY, parts=None, step=5):
        if weights not in compiled:
            objective = make_objective(tokenizer_config(tokenizer_loss=weights), CLASSES)
            compiled[weights] = (
                objective,
                initial_parts(objective, [batch] * objective.start_batches),
                jax.jit(objective.loss),
            )
        objective, own, loss = compiled[weights]
        parts = parts or own
        value, (metrics, _) = loss(parts.trained, parts, batch, key, jnp.int32(step))
        return value, metrics, own

    return run


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of 30 steps on glyphs, and what it logged."""
    workdir = tmp_path_factory.mktemp("learned")
    rate = OptimizerConfig(base_lr=0.3, warmup=0.1, weight_decay=0.0, final_weight_decay=0.0)
    logger, handler, records = logging.getLogger("hmar_jax"), logging.Handler(), []
    handler.emit = lambda record: records.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        loop.train(tokenizer_config(steps=30, optimizer=rate, sample_every=20), workdir)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return workdir, read_metrics(workdir / "metrics.jsonl"), "\n".join(records)


def test_the_loss_falls_on_glyphs(learned):
    pixel = [line["pixel"] for line in learned[1]]
    assert np.mean(pixel[-5:]) < 0.6 * np.mean(pixel[:3])


def test_a_line_has_the_share_of_codes_in_use_for_every_scale(learned):
    for line in learned[1]:
        assert len(line["codes_in_use"]) == LADDER.num_scales
        assert all(0 < share <= 1 for share in line["codes_in_use"])
    assert np.mean([line["codes_in_use"][-1] for line in learned[1][-10:]]) > 0.5  # no collapse


def test_reconstruction_pairs_appear_while_training(learned):
    files = sorted((learned[0] / "samples").iterdir())
    assert [file.name for file in files] == ["00000020.png", "00000030.png"]
    with Image.open(files[-1]) as picture:
        picture.load()
        enlarge = 96 // SIZE
        assert picture.size == ((8 * (SIZE + 2) + 2) * enlarge, (4 * (SIZE + 2) + 2) * enlarge)
        pixels = np.asarray(picture, np.float32)[::enlarge, ::enlarge]
    cell = [pixels[2 + row * 18 : 18 + row * 18, 2:18] for row in (0, 1)]
    assert np.abs(cell[0] - cell[1]).mean() < np.abs(cell[0] - 255).mean()  # the row below is not blank


def test_the_log_says_that_the_perceptual_term_is_off_and_lists_the_parameters(learned):
    assert "perceptual term is off" in learned[2]
    assert "tokenizer/quantizer/codebook" in learned[2]
    assert "discriminator/first/kernel" in learned[2]
    assert "perceptual" not in learned[1][0]


def test_the_codebook_starts_from_the_latents(forward):
    _, random, untrained = forward(dataclasses.replace(PLAIN, kmeans_batches=0))
    objective = make_objective(tokenizer_config(tokenizer_loss=PLAIN), CLASSES)
    assert objective.start_batches == 1
    _, started, parts = forward(PLAIN)
    assert differing(parts.trained, untrained.trained) == {"tokenizer.quantizer.codebook"}
    assert started["vq"] < 0.85 * random["vq"]
    codes = parts.trained["tokenizer"]["quantizer"]["codebook"]
    assert len(np.unique(np.asarray(codes), axis=0)) == TOKENIZER.codebook_size


def test_scale_dropout_leaves_scales_out_of_the_reconstruction(forward):
    keys = jax.random.split(KEY, 2)
    whole = [forward(PLAIN, key)[1] for key in keys]
    cut = [forward(dataclasses.replace(PLAIN, scale_dropout=1.0), key)[1] for key in keys]
    assert whole[0]["pixel"] == whole[1]["pixel"]
    assert cut[0]["pixel"] != cut[1]["pixel"]
    np.testing.assert_allclose(cut[0]["vq"], whole[0]["vq"], rtol=1e-6)  # all scales still learn their codes


@pytest.fixture(scope="module")
def trained_at(batch):
    """(step, factor on the discriminator's initial parameters) → state before and after a step, and its metrics."""
    loss = dataclasses.replace(LOSS, scale_dropout=0.0, adversarial_start=2)
    config = tokenizer_config(tokenizer_loss=loss, optimizer=OptimizerConfig(base_lr=0.1, ema=0.9, clip=0.0))
    objective = make_objective(config, CLASSES)
    parts = initial_parts(objective, [batch])
    optimizer = make_optimizer(config.optimizer, 5, 8, parts.trained, loss.adversarial_start)
    state = TrainState.create(config, parts, optimizer)
    run = jax.jit(make_train_step(config, objective, optimizer))

    @functools.cache
    def of(step, factor=1.0):
        judge = jax.tree.map(lambda x: factor * x, state.params["discriminator"])
        before = dataclasses.replace(state, params=state.params | {"discriminator": judge})
        for _ in range(step):
            before, _ = run(before, {}, batch)
        after, metrics = run(before, {}, batch)
        return before, after, jax.device_get(metrics)

    return of


def first_moments(state, network):
    """The norm of Adam's first moments of a network."""
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(state.opt)]
    return np.sqrt(sum(np.square(leaf).sum() for name, leaf in leaves if ".mu" in name and f"['{network}']" in name))


def test_before_its_start_the_discriminator_is_neither_computed_nor_changed(trained_at):
    """Parameters that are not finite would spoil whatever is computed from them."""
    (before, after, metrics), (_, plain, _) = trained_at(1, np.nan), trained_at(1)
    assert metrics["discriminator_gradient_norm"] == metrics["generator"] == metrics["discriminator"] == 0
    assert_bit_equal(after.params["discriminator"], before.params["discriminator"])
    assert_bit_equal(after.params["tokenizer"], plain.params["tokenizer"])
    assert first_moments(after, "discriminator") == 0


def test_from_its_start_on_the_discriminator_learns_and_the_tokenizer_learns_from_it(trained_at):
    before, after, metrics = trained_at(2)
    kernels = {name for name in trees.flatten(before.params["discriminator"]) if name.endswith("kernel")}
    assert kernels <= differing(after.params["discriminator"], before.params["discriminator"])
    assert metrics["adaptive_weight"] > 0
    other = trained_at(2, 0.5)
    assert_bit_equal(other[0].params["tokenizer"], before.params["tokenizer"])
    assert other[2]["gradient_norm"] != metrics["gradient_norm"]


def test_each_network_has_a_gradient_norm_of_its_own_and_the_tokenizer_alone_is_averaged(trained_at):
    _, first, metrics = trained_at(0)
    np.testing.assert_allclose(first_moments(first, "tokenizer"), 0.1 * metrics["gradient_norm"], rtol=1e-4)
    _, third, metrics = trained_at(2)
    norm = metrics["discriminator_gradient_norm"]
    np.testing.assert_allclose(first_moments(third, "discriminator"), 0.1 * norm, rtol=1e-4)
    assert set(third.ema) == {"tokenizer"}


def test_perceptual_weights_from_a_file_turn_the_term_on(forward, tmp_path_factory):
    rng = np.random.default_rng(0)
    entries = {
        name: rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
        for name, shape in file_shapes().items()
    }
    entries |= {name: np.abs(value) for name, value in entries.items() if name.startswith("lin")}
    file = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(v, np.float32) for name, v in entries.items()}, file)
    weights = dataclasses.replace(PLAIN, perceptual=0.5, perceptual_weights=str(file))
    loss, metrics, parts = forward(weights)
    assert make_objective(tokenizer_config(tokenizer_loss=weights), CLASSES).notes == []
    file.unlink()
    assert metrics["perceptual"] > 0
    plain = forward(PLAIN)[0]
    np.testing.assert_allclose(loss - plain, 0.5 * metrics["perceptual"], rtol=1e-3)
    assert "perceptual" in parts.frozen
    assert not [name for name in trees.flatten(parts.trained) if "perceptual" in name]


def test_a_missing_file_of_perceptual_weights_is_a_sentence():
    weights = dataclasses.replace(LOSS, perceptual_weights="/nowhere/vgg.safetensors")
    with pytest.raises(InputError, match=r"'/nowhere/vgg.safetensors' cannot be read"):
        make_objective(tokenizer_config(tokenizer_loss=weights), CLASSES)


def test_a_tokenizer_goes_on_from_another_with_the_sides_of_its_config(starts):
    objective = make_objective(tokenizer_config(init_from=str(starts / "tokenizer"), sides=(1, 3, 4, 8)), CLASSES)
    assert objective.start_batches == 0
    assert objective.model_config.ladder.sides == (1, 3, 4, 8)
    assert_bit_equal(
        initial_parts(objective).trained["tokenizer"], from_pretrained(starts / "tokenizer").params["tokenizer"]
    )


def test_a_start_with_another_tokenizer_than_the_config_is_refused(starts):
    other = dataclasses.replace(TOKENIZER, channels=12, phis=3)
    with pytest.raises(InputError, match=r"has tokenizer.channels=8, tokenizer.phis=2, unlike this config; set"):
        make_objective(tokenizer_config(init_from=str(starts / "tokenizer"), tokenizer=other), CLASSES)


@pytest.fixture(scope="module")
def updated():
    """step → codebooks, averages and metrics around `after_update` of a batch that draws codes 0 to 7 alone."""
    weights = dataclasses.replace(LOSS, revive_every=3, dead_below=0.5, usage_decay=0.5)
    objective = make_objective(tokenizer_config(tokenizer_loss=weights), CLASSES)
    rng = np.random.default_rng(0)
    codes, averages = rng.standard_normal((2, TOKENIZER.codebook_size, TOKENIZER.latent_channels)).astype(np.float32)
    tokens = jnp.asarray(np.arange(2 * LADDER.length).reshape(2, -1) % 8)
    queries = jnp.asarray(rng.standard_normal((*tokens.shape, TOKENIZER.latent_channels)), jnp.float32)
    usage = np.full(TOKENIZER.codebook_size, 1 / 16, np.float32)
    usage[12:] = 0  # and what was drawn rarely before: dead after this batch, while 8 to 11 are only halved

    def tree(codebook):
        return {"tokenizer": {"quantizer": {"codebook": jnp.asarray(codebook)}, "other": jnp.arange(3.0)}}

    def run(step, average=True):
        ema = tree(averages) if average else {}
        seen = tokens, queries
        after = objective.after_update(tree(codes), ema, {"usage": jnp.asarray(usage)}, seen, KEY, jnp.int32(step))
        return {"codes": codes, "averages": averages, "usage": usage, "queries": queries, "ema_before": ema}, after

    return run


def codebook_of(params):
    return np.asarray(params["tokenizer"]["quantizer"]["codebook"])


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "not averaged"])
def test_a_revived_code_has_its_new_value_in_the_averages_and_the_others_keep_theirs(updated, average):
    before, (trained, ema, extra, metrics) = updated(2, average)  # the third step
    new = codebook_of(trained)
    assert metrics["codes_revived"] == 4
    np.testing.assert_array_equal(new[:12], before["codes"][:12])
    queries = {query.tobytes() for query in np.asarray(before["queries"]).reshape(-1, 4)}
    assert all(code.tobytes() in queries for code in new[12:])
    np.testing.assert_allclose(extra["usage"][12:], 1 / 16)
    if average:
        np.testing.assert_array_equal(codebook_of(ema)[12:], new[12:])
        np.testing.assert_array_equal(codebook_of(ema)[:12], before["averages"][:12])
        assert differing(ema, before["ema_before"]) == {"tokenizer.quantizer.codebook"}
    else:
        assert ema == {}


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_nothing_is_revived_between_multiples_of_revive_every(updated, step):
    before, (trained, ema, extra, metrics) = updated(step)
    assert metrics["codes_revived"] == 0
    np.testing.assert_array_equal(codebook_of(trained), before["codes"])
    np.testing.assert_array_equal(codebook_of(ema), before["averages"])
    np.testing.assert_allclose(extra["usage"], before["usage"] / 2 + np.repeat([1 / 16, 0], 8), rtol=0.1)  # goes on
