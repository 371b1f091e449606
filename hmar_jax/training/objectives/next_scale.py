"""Stage `next_scale`: tokens → cross-entropy of every token given the coarser scales.

Axis letters: B batch, L tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, TransformerConfig
from hmar_jax.params import Tree
from hmar_jax.training.objectives.base import Batch, Metrics, Parts, fresh_params
from hmar_jax.training.objectives.transformer import TransformerObjective, check_class_count, split_keys
from hmar_jax.training.weights_and_masks import scale_weights
from hmar_jax.transformer import teacher_forcing
from hmar_jax.transformer.fused import scores_of


class NextScaleObjective(TransformerObjective):
    """Stage 1: weighted cross-entropy of every token given the coarser scales.

    It goes on from the transformer in `init_from` where that has one of the same network, for any classes.
    """

    def _model_config(self, start: ModelConfig, class_names: tuple[str, ...]) -> ModelConfig:
        transformer = dataclasses.replace(self.config.transformer, masked=False)
        check_class_count(class_names, transformer)
        self._goes_on = start.transformer is not None and _same_network(start.transformer, transformer)
        if self._goes_on:
            anew = "" if start.num_classes == transformer.num_classes else " but for its class embeddings"
            self.notes = [f"Training goes on from the transformer in {self.config.init_from}{anew}."]
        else:
            self.reads = frozenset({"tokenizer"})
            if start.transformer is not None:
                self.notes = [
                    f"The transformer in {self.config.init_from} is another network; only its tokenizer is used."
                ]
        return dataclasses.replace(start, transformer=transformer, class_names=class_names)

    def init(self, start: Tree, first: Sequence[Batch]) -> Parts:
        transformer = fresh_params(self.model_config, self.config.seed, "transformer")
        if self._goes_on:
            fresh, known = trees.flatten(transformer), trees.flatten(start["transformer"])
            # Of the same shape is all but the embeddings of another number of classes.
            same = {name: known[name] for name, leaf in fresh.items() if known[name].shape == leaf.shape}
            transformer = trees.unflatten(fresh | same)
        return Parts({"transformer": transformer}, {"tokenizer": start["tokenizer"]}, {})

    def loss(self, trained: Tree, parts: Parts, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        nets, tokens = self._networks(trained, parts.frozen), batch["tokens"]
        key, class_keys, _ = split_keys(batch, key)
        labels = self._drop_classes(batch["label"], class_keys)
        quantizer = nets.tokenizer.quantizer
        scores = teacher_forcing.predict(nets.transformer, quantizer, labels, tokens, scores_of(tokens), key=key)
        weights = scale_weights(self.model_config.ladder, self.config.objective.scale_weights)
        metrics = self._metrics(scores, jnp.ones(tokens.shape))
        return jnp.mean(jnp.sum(scores.entropy * weights, axis=1)), (metrics, ())

    def measure(self, trained: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Metrics:
        nets, tokens = self._networks(trained, frozen), batch["tokens"]
        scores = teacher_forcing.predict(
            nets.transformer, nets.tokenizer.quantizer, batch["label"], tokens, scores_of(tokens)
        )
        weights = scale_weights(self.model_config.ladder, self.config.objective.scale_weights)
        loss = jnp.mean(jnp.sum(scores.entropy * weights, axis=1))
        return self._metrics(scores, jnp.ones(tokens.shape)) | {"loss": loss}


def _same_network(start: TransformerConfig, wanted: TransformerConfig) -> bool:
    """Whether one can go on as the other: they differ in nothing but classes, mask branch and how they are trained."""
    free = ("num_classes", "masked", "leak_free", "class_dropout", "drop_path", "gate_init")
    return dataclasses.replace(start, **{name: getattr(wanted, name) for name in free}) == wanted
