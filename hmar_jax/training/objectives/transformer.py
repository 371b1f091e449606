"""What the two transformer stages share: the model they start from, class dropout, metrics of each scale.

Axis letters: B batch, K scales, L tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, TrainConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.networks import Networks, networks
from hmar_jax.params import Tree
from hmar_jax.training.objectives.base import Batch, Metrics, Start, example_keys
from hmar_jax.training.weights_and_masks import Mean, per_scale
from hmar_jax.transformer.fused import Scores


class TransformerObjective:
    """What both transformer stages share; a stage adds `_model_config` and the other methods of `Objective`."""

    start_batches = 0
    reads = frozenset({"tokenizer", "transformer"})

    def __init__(self, config: TrainConfig, class_names: tuple[str, ...], start: Start):
        assert start.config is not None  # TrainConfig sees to it that there is an init_from
        self.config, self.start = config, start
        self.notes: list[str] = []
        self.model_config = self._model_config(start.config, class_names)

    def _model_config(self, start: ModelConfig, class_names: tuple[str, ...]) -> ModelConfig:
        raise NotImplementedError

    def _networks(self, trained: Tree, frozen: Tree) -> Networks:
        params = self.model_params(trained, frozen)
        return networks(self.model_config, params, self.config.dtype, self.config.remat, self.config.scan_layers)

    def _drop_classes(self, labels: jax.Array, keys: jax.Array) -> jax.Array:
        transformer = self.model_config.transformer
        assert transformer is not None
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, transformer.class_dropout))(keys)
        return jnp.where(dropped, transformer.num_classes, labels)

    def _metrics(self, scores: Scores, counted: jax.Array) -> Metrics:
        """Mean cross-entropy and accuracy in each scale, and accuracy in all, over the counted tokens (B,L) float."""
        entropy, correct = scores
        ladder = self.model_config.ladder
        return {
            "scale_loss": per_scale(entropy, counted, ladder),
            "scale_accuracy": per_scale(correct, counted, ladder),
            "accuracy": Mean.of(correct, counted),
        }

    def after_update(self, trained: Tree, ema: Tree, extra: Tree, seen: Any, key: jax.Array, step: jax.Array) -> Any:
        return trained, ema, extra, {}

    def model_params(self, trained: Tree, frozen: Tree) -> Tree:
        return trees.merge(frozen, trained)


def split_keys(batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A key for what is drawn once, and twice keys (B,) for what each example draws by itself.

    A part of a batch comes with its examples' keys, so that these draws are the same in parts of any number.
    """
    keys = batch["keys"] if "keys" in batch else example_keys(key, batch["label"].shape[0])
    return jax.random.fold_in(key, 0), keys[:, 0], keys[:, 1]


def check_class_count(class_names: tuple[str, ...], transformer: TransformerConfig) -> None:
    """Raises InputError where a token cache has another number of classes than the transformer."""
    if len(class_names) not in (0, transformer.num_classes):
        raise InputError(
            f"The token cache has {len(class_names)} classes, but transformer.num_classes is "
            f"{transformer.num_classes}; set it to {len(class_names)}."
        )
