"""parameters → metrics of held-out examples, while a stage trains."""

from __future__ import annotations

import functools
import logging

import jax
import numpy as np
from jax.sharding import Mesh

from hmar_jax.config import EvalConfig, TrainConfig
from hmar_jax.data import pipeline
from hmar_jax.errors import InputError
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree
from hmar_jax.training.objectives import Objective
from hmar_jax.training.weights_and_masks import joined

logger = logging.getLogger(__name__)


class Evals:
    """The measurements of `config.evals`, each on the same examples every time.

    Args:
      mesh: that the parameters are on.

    A token cache without held-out tokens, such as one of an earlier version, is trained from without evals, and the log
    says so.

    Raises:
      InputError: there are evals, but no pictures are held out, or too few for the devices.
    """

    def __init__(self, config: TrainConfig, objective: Objective, mesh: Mesh):
        self._config, self._objective, self._mesh = config, objective, mesh
        self._measure = jax.jit(objective.measure, out_shardings=sharding.replicated(mesh))
        self._evals = config.evals
        if config.evals and not pipeline.has_validation(config.data):
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
            self._evals = ()
        self._batches = {eval_config: self._plan(eval_config) for eval_config in self._evals}

    def __call__(self, step: int, trained: Tree, frozen: Tree) -> dict[str, np.ndarray]:
        """The metrics that are due after a step: `eval/KIND/NAME` → scalar or (K,) array, the same in every process."""
        found: dict[str, np.ndarray] = {}
        for eval_config in self.due(step):
            means = self._run(eval_config, trained, frozen)
            found |= {f"eval/{eval_config.kind}/{name}": value for name, value in means.items()}
        return found

    def due(self, step: int) -> list[EvalConfig]:
        """The measurements to make after a step; the last step has all of them."""
        return [e for e in self._evals if step % e.every == 0 or step == self._config.steps]

    def _plan(self, eval_config: EvalConfig) -> tuple[int, int]:
        """How many batches to measure, and the size of one: as many whole batches as there are examples for."""
        held_out = len(pipeline.open_source(self._config.data, self._image_size, self._config.seed, "validation"))
        number, ways = min(eval_config.count, held_out), sharding.ways(self._mesh)
        size = min(self._config.batch_size // self._config.accumulate, number // ways * ways)
        if not size:
            raise InputError(
                f"{number} held-out examples cannot be shared by {ways} devices; set data.held_out or the count of "
                "evals so that each gets one, or set evals to ()."
            )
        logger.info("Evals measure %d of %d held-out examples.", number // size * size, held_out)
        return number // size, size

    def _run(self, eval_config: EvalConfig, trained: Tree, frozen: Tree) -> dict[str, np.ndarray]:
        """Means over all examples of the batches."""
        config, (number, size) = self._config, self._batches[eval_config]
        batches = pipeline.batches(
            config.data,
            batch_size=size,
            image_size=self._image_size,
            seed=config.seed,
            rows=sharding.host_rows(self._mesh, size),
            part="validation",
            classes=self._objective.model_config.num_classes,
        )
        key, measured = jax.random.key(config.seed), []
        try:
            for i in range(number):
                batch = sharding.put_batch(next(batches), self._mesh)
                measured.append(self._measure(trained, frozen, batch, jax.random.fold_in(key, i)))
        finally:
            batches.close()
        return jax.device_get(joined(jax.tree.map(lambda *values: np.stack(values), *jax.device_get(measured))))

    @functools.cached_property
    def _image_size(self) -> int:
        return self._objective.model_config.image_size
