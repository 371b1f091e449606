"""Stage `masked`: tokens, random masks → cross-entropy of the masked tokens given the others and the coarser scales.

Axis letters: B batch, L tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig
from hmar_jax.errors import InputError
from hmar_jax.params import Tree
from hmar_jax.training.objectives.base import Batch, Metrics, Parts, fresh_params
from hmar_jax.training.objectives.transformer import TransformerObjective, check_class_count, split_keys
from hmar_jax.training.settings import check_same_classes
from hmar_jax.training.weights_and_masks import Mean, random_masks
from hmar_jax.transformer import teacher_forcing
from hmar_jax.transformer.fused import scores_of


class MaskedObjective(TransformerObjective):
    """Stage 2: mean cross-entropy over masked positions; trains the mask branch and mask_embed, all else is frozen."""

    def _model_config(self, start: ModelConfig, class_names: tuple[str, ...]) -> ModelConfig:
        if start.transformer is None or start.transformer.is_var:
            raise InputError(
                f"init_from={self.config.init_from} has no next-scale transformer with block-diagonal attention, which "
                "stage 'masked' starts from; give the model directory of a finished next_scale stage."
            )
        check_same_classes(
            ("The token cache", class_names),
            (f"init_from={self.config.init_from}", start.class_names),
            "whose class embeddings are trained in that order; export the tokens again from folders of those names",
        )
        check_class_count(class_names, start.transformer)
        transformer = dataclasses.replace(start.transformer, masked=True, leak_free=self.config.objective.leak_free)
        return dataclasses.replace(start, transformer=transformer, class_names=class_names or start.class_names)

    def init(self, start: Tree, first: Sequence[Batch]) -> Parts:
        if "masked" not in start["transformer"]:  # the branch starts as a copy of the next-scale one
            fresh = fresh_params(self.model_config, self.config.seed, "transformer")
            branch = jax.tree.map(jnp.array, start["transformer"]["next_scale"])
            start = trees.merge(start, {"transformer": {"masked": branch, "mask_embed": fresh["mask_embed"]}})
        return Parts(*trees.partition(start, _is_mask_branch), {})

    def loss(self, trained: Tree, parts: Parts, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        nets, tokens = self._networks(trained, parts.frozen), batch["tokens"]
        ladder, objective = self.model_config.ladder, self.config.objective
        key, class_keys, mask_keys = split_keys(batch, key)
        labels = self._drop_classes(batch["label"], class_keys)
        if objective.per_sample_masks:
            masked = jax.vmap(lambda key: random_masks(key, ladder))(mask_keys)
        else:
            # One mask for the whole batch, also where it is worked off in parts, whose `key` differs: see
            # `ObjectiveConfig.per_sample_masks`.
            step_key = jax.random.fold_in(jax.random.key(self.config.seed + 1), step)
            masked = jnp.broadcast_to(random_masks(step_key, ladder), tokens.shape)
        scores = teacher_forcing.predict(
            nets.transformer,
            nets.tokenizer.quantizer,
            labels,
            tokens,
            scores_of(tokens),
            masked,
            key,
            leak_free=objective.leak_free,
        )
        counted = masked.astype(jnp.float32)
        loss = Mean.of(scores.entropy, counted)
        return loss.value, (self._metrics(scores, counted) | {"masked_share": jnp.mean(counted), "loss": loss}, ())

    def measure(self, trained: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Metrics:
        nets, tokens = self._networks(trained, frozen), batch["tokens"]
        keys = jax.random.split(key, tokens.shape[0])  # ratios of all sizes in every batch
        masked = jax.vmap(lambda key: random_masks(key, self.model_config.ladder))(keys)
        scores = teacher_forcing.predict(
            nets.transformer,
            nets.tokenizer.quantizer,
            batch["label"],
            tokens,
            scores_of(tokens),
            masked,
            leak_free=self.config.objective.leak_free,
        )
        counted = masked.astype(jnp.float32)
        return self._metrics(scores, counted) | {"loss": Mean.of(scores.entropy, counted)}


def _is_mask_branch(name: str) -> bool:
    return name.startswith(("transformer.masked.", "transformer.mask_embed"))
