"""Measurements on held-out examples while a stage trains."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_training import CLASSES, LADDER, LOSS, SIZE, idle_steps, stage_config, write_starts

from hmar_jax.config import DataConfig, EvalConfig
from hmar_jax.data import pipeline
from hmar_jax.data.sources import Sources
from hmar_jax.data.tokens import TokenSource, validation_of, write_token_cache
from hmar_jax.errors import InputError
from hmar_jax.model import from_pretrained
from hmar_jax.parallel import sharding
from hmar_jax.training import loop
from hmar_jax.training.evals import make_evaluators
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.objectives import initial_parts, make_objective

NAMES = {
    "tokenizer": {"loss", "pixel", "vq", "psnr"},
    "next_scale": {"loss", "accuracy", "scale_loss", "scale_accuracy"},
    "masked": {"loss", "accuracy", "scale_loss", "scale_accuracy"},
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """What the stages start from, with a cache of held-out tokens in that for training."""
    folder = tmp_path_factory.mktemp("held_out")
    write_starts(folder)
    train = TokenSource(folder / "tokens")
    rng = np.random.default_rng(1)
    batch = rng.integers(0, train.codebook_size, (2, 24, LADDER.length)), rng.integers(0, len(CLASSES), 24)
    header = {name: getattr(train, name) for name in ("ladder", "codebook_size", "crops", "class_names", "tokenizer")}
    write_token_cache(validation_of(folder / "tokens"), [batch], source="random", **header)
    return folder


@pytest.mark.parametrize("stage", NAMES)
def test_held_out_losses_are_written_when_due_and_at_the_end(starts, tmp_path, stage):
    config = stage_config(stage, starts, steps=3, log_every=100, evals=(EvalConfig(every=2, count=20),))
    loop.train(config, tmp_path)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert sorted(lines) == [1, 2, 3]
    for step, line in lines.items():
        found = {name.removeprefix("eval/loss/") for name in line if name.startswith("eval/")}
        assert found == (NAMES[stage] if step > 1 else set())
    assert all(np.all(np.isfinite(lines[2][f"eval/loss/{name}"])) for name in NAMES[stage])


def test_the_loss_is_that_of_the_examples_without_dropout(starts):
    config = stage_config("next_scale", starts, evals=(EvalConfig(count=24),))
    model = from_pretrained(starts / "next_scale")
    objective = make_objective(dataclasses.replace(config, init_from=str(starts / "next_scale")), CLASSES)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        (evaluator,) = make_evaluators(config, objective, Sources(config.data), mesh)
        measured = evaluator(config.steps, model.params, {})
    source = Sources(config.data).open("validation")
    batches = pipeline.batches(config.data, batch_size=24, image_size=SIZE, seed=config.seed, source=source)
    batch = next(batches)
    batches.close()
    logits = np.asarray(model.next_scale_logits(batch["label"], batch["tokens"]))
    entropy = np.asarray(jax.nn.logsumexp(logits, axis=-1)) - np.take_along_axis(
        logits, batch["tokens"][..., None], axis=-1
    ).squeeze(-1)
    per_scale = [entropy[:, where].mean() for where in LADDER.slices]
    np.testing.assert_allclose(measured["eval/loss/scale_loss"], per_scale, rtol=1e-4)


@pytest.mark.parametrize("stage", NAMES)
def test_the_same_parameters_give_the_same_metrics_every_time(starts, stage):
    config = stage_config(stage, starts, evals=(EvalConfig(every=1, count=16),))
    objective = make_objective(config, CLASSES)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        parts = (
            initial_parts(objective)
            if stage != "tokenizer"
            else initial_parts(objective, [sharding.put_batch({"image": np.zeros((8, SIZE, SIZE, 3), np.uint8)}, mesh)])
        )
        (evaluator,) = make_evaluators(config, objective, Sources(config.data, SIZE), mesh)
        first, second = (evaluator(step, parts.trained, parts.frozen) for step in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_adversary_has_no_part_in_the_tokenizers_loss(starts):
    found = []
    for adversarial in (0.0, 5.0):
        loss = dataclasses.replace(LOSS, adversarial=adversarial, adversarial_start=0)
        config = stage_config("tokenizer", starts, tokenizer_loss=loss, evals=(EvalConfig(count=8),))
        objective = make_objective(config, CLASSES)
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            first = [sharding.put_batch({"image": np.zeros((8, SIZE, SIZE, 3), np.uint8)}, mesh)]
            parts = initial_parts(objective, first)
            (evaluator,) = make_evaluators(config, objective, Sources(config.data, SIZE), mesh)
            found.append(evaluator(config.steps, parts.trained, parts.frozen))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_sample_pictures_of_the_tokenizer_are_of_held_out_pictures(tmp_path):
    """The two held-out pictures are white, all others black."""
    names = [f"{i}.png" for i in range(12)]
    for name in names:
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / name)
    data = DataConfig("folder", path=str(tmp_path), resize=1.0, held_out=0.1)
    held_out = Sources(data, SIZE).open("validation")
    for index in range(len(held_out)):
        Image.new("RGB", (SIZE, SIZE), "white").save(tmp_path / held_out.name(index))
    config = stage_config("tokenizer", tmp_path, steps=1, data=data, sample_every=1)
    loop.train(config, tmp_path / "run")
    with Image.open(tmp_path / "run" / "samples" / "00000001.png") as picture:
        shown = np.asarray(picture)
    enlarge = 96 // SIZE
    first_row = shown[2 * enlarge : (2 + SIZE) * enlarge, 2 * enlarge : (2 + SIZE) * enlarge]
    np.testing.assert_array_equal(first_row, 255)


@pytest.mark.parametrize(
    ("data", "evals", "said"),
    [
        ({}, (EvalConfig(),), r"evals measure held-out pictures, and data\.held_out is 0; set it to a share"),
        ({"held_out": 0.5}, (EvalConfig(), EvalConfig(every=3)), "evals has a kind more than once"),
    ],
)
def test_evals_that_cannot_be_are_refused_before_training(tmp_path, data, evals, said):
    for i in range(4):
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=said):
        config = stage_config("tokenizer", tmp_path, data=DataConfig("folder", path=str(tmp_path), **data), evals=evals)
        loop.train(config, tmp_path / "run")


def test_a_cache_without_held_out_tokens_is_trained_from_without_evals(starts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    shutil.copytree(starts / "tokens", tmp_path / "tokens", ignore=shutil.ignore_patterns("validation"))
    data = DataConfig("tokens", path=str(tmp_path / "tokens"))
    loop.train(stage_config("next_scale", starts, steps=2, data=data, evals=(EvalConfig(every=1),)), tmp_path / "run")
    assert "has no held-out tokens, so that evals are left out" in caplog.text
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines and not any(name.startswith("eval/") for line in lines for name in line)
