"""The demo: the three stages on rendered glyphs, from their installed configs, and pictures of what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hmar_jax import images, plots
from hmar_jax.config import TrainConfig, load
from hmar_jax.data import pipeline
from hmar_jax.errors import InputError
from hmar_jax.files import json_files
from hmar_jax.model import from_pretrained
from hmar_jax.training.metrics import read_metrics

STAGES = ("tokenizer", "next_scale", "masked")
PICTURES = 12_000  # in the token cache
SAMPLING: dict[str, Any] = {"cfg": 2.5, "top_k": 60}
QUICK_STEPS = {"tokenizer": 30, "next_scale": 30, "masked": 10}
QUICK_PICTURES = 500


def stage_config(stage: str, folder: Path, *, quick: bool) -> TrainConfig:
    """The installed config of a stage on glyphs, with its places inside `folder`."""
    config = load(f"glyphs_{stage}")
    before = {"next_scale": "tokenizer", "masked": "next_scale"}
    if stage in before:
        data = dataclasses.replace(config.data, path=str(folder / "tokens"))
        config = dataclasses.replace(config, init_from=str(folder / before[stage] / "model"), data=data)
    if quick:
        steps = QUICK_STEPS[stage]
        config = dataclasses.replace(config, steps=steps, sample_every=0, log_every=10, checkpoint_every=steps)
    return config


def check_same_length(folder: Path, steps: int) -> None:
    """Raises InputError where the folder has a demo of another number of steps, or its record is damaged."""
    file, instead = folder / "tokenizer" / "config.json", f"remove {folder}, or choose another --output"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        record = json_files.read(file, "The demo's record", instead)
        if not isinstance(record, dict) or type(record.get("steps")) is not int:
            raise InputError(f"The demo's record {file} has no steps; {instead}.")
        if record["steps"] != steps:
            raise InputError(f"{folder} holds a demo of another length; {instead}.")


def draw(folder: Path, model_path: Path, configs: dict[str, TrainConfig]) -> dict[Path, str]:
    """Writes the demo's four pictures; returns each with a caption."""
    model = from_pretrained(model_path)
    size, classes = model.config.image_size, model.config.num_classes
    unseen = pipeline.batches(configs["tokenizer"].data, batch_size=24, image_size=size, seed=1_000)
    originals = next(unseen)["image"]
    unseen.close()
    labels = list(range(classes)) * 2
    out = model.sample(labels, "small", **SAMPLING)
    chosen = out.tokens[: min(8, classes)]
    grown = images.from_signed(np.asarray(model.tokenizer.growth(chosen)))
    curves = [(stage, read_metrics(folder / stage / "metrics.jsonl")) for stage in STAGES]
    made = {
        "reconstructions.png": (
            plots.reconstructions(model.tokenizer, originals, 12, 3),
            "unseen glyphs above their reconstructions",
        ),
        "losses.png": (plots.loss_curves(curves, model.config.ladder.sides), "loss of each scale while training"),
        "samples.png": (
            out.grid(17, 3),
            f"two samples of each class: {''.join(model.config.class_names)}",
        ),
        "growth.png": (
            images.grid(grown.swapaxes(0, 1).reshape(-1, size, size, 3), len(grown), 3),
            f"samples growing scale by scale, {' → '.join(map(str, model.config.ladder.sides))}",
        ),
    }
    return {images.save_png(picture, folder / name): caption for name, (picture, caption) in made.items()}
