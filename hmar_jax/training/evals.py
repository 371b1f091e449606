"""parameters → metrics, while a stage trains: the protocol of evaluators, and the losses of held-out examples."""

from __future__ import annotations

import logging
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from hmar_jax.config import EvalConfig, TrainConfig
from hmar_jax.data import pipeline
from hmar_jax.data.sources import Sources
from hmar_jax.errors import InputError
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree
from hmar_jax.training.objectives import Objective
from hmar_jax.training.weights_and_masks import joined

logger = logging.getLogger(__name__)


class Evaluator(Protocol):
    """A measurement of a model while it is trained. All processes of a job make it together."""

    def due(self, step: int) -> bool:
        """Whether to measure after a step; the same answer in every process."""

    def __call__(self, step: int, params: Tree, frozen: Tree) -> dict[str, np.ndarray]:
        """The metrics after a step, `eval/KIND/NAME` → scalar or (K,) array, the same in every process.

        Args:
          params: the trained parameters, averaged where there are averages. frozen: those that the stage only reads.
        """


def make_evaluators(config: TrainConfig, objective: Objective, sources: Sources, mesh: Mesh) -> list[Evaluator]:
    """The evaluators of `config.evals`.

    A token cache without held-out tokens, such as one of an earlier version, is trained from without them, and the log
    says so.

    Args:
      sources: of `config.data`. mesh: that the parameters are on.

    Raises:
      InputError: there are evals, but no pictures are held out, or too few for the devices.
    """
    if config.evals and not sources.has_validation():
        if config.data.source != "tokens":
            raise InputError(
                "evals measure held-out pictures, and data.held_out is 0; set it to a share of the pictures, or "
                "evals to ()."
            )
        logger.warning(
            "%s has no held-out tokens, so that evals are left out; `hmar-jax export tokens` with data.held_out "
            "writes some.",
            config.data.path,
        )
        return []
    return [HeldOutLoss(eval_config, config, objective, sources, mesh) for eval_config in config.evals]


class HeldOutLoss:
    """The stage's loss and its terms, on the same held-out examples every time."""

    def __init__(
        self, eval_config: EvalConfig, config: TrainConfig, objective: Objective, sources: Sources, mesh: Mesh
    ) -> None:
        self._eval, self._config, self._objective, self._mesh = eval_config, config, objective, mesh
        self._measure = jax.jit(objective.measure, out_shardings=sharding.replicated(mesh))
        self._source = sources.open("validation", config.seed, objective.model_config.num_classes)
        held_out, ways = len(self._source), sharding.ways(mesh)
        number = min(eval_config.count, held_out)
        # As many whole batches as there are examples for.
        self._size = min(config.batch_size // config.accumulate, number // ways * ways)
        if not self._size:
            raise InputError(
                f"{number} held-out examples cannot be shared by {ways} devices; set data.held_out or the count of "
                "evals so that each gets one, or set evals to ()."
            )
        self._batches = number // self._size
        logger.info("Evals measure %d of %d held-out examples.", self._batches * self._size, held_out)

    def due(self, step: int) -> bool:
        return step % self._eval.every == 0 or step == self._config.steps

    def __call__(self, step: int, params: Tree, frozen: Tree) -> dict[str, np.ndarray]:
        batches = pipeline.batches(
            self._config.data,
            batch_size=self._size,
            image_size=self._objective.model_config.image_size,
            seed=self._config.seed,
            rows=sharding.host_rows(self._mesh, self._size),
            source=self._source,
        )
        key, measured = jax.random.key(self._config.seed), []
        try:
            for i in range(self._batches):
                batch = sharding.put_batch(next(batches), self._mesh)
                measured.append(self._measure(params, frozen, batch, jax.random.fold_in(key, i)))
        finally:
            batches.close()
        means = jax.device_get(joined(jax.tree.map(lambda *values: np.stack(values), *jax.device_get(measured))))
        return {f"eval/{self._eval.kind}/{name}": value for name, value in means.items()}
