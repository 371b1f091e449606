"""metrics of a step → the run stops where they are not finite."""

from __future__ import annotations

import jax
import numpy as np

from hmar_jax.config import TrainConfig
from hmar_jax.data import pipeline
from hmar_jax.data.crops import Source
from hmar_jax.errors import DivergedError
from hmar_jax.training.checkpoint import Checkpoints


class FiniteCheck:
    """Stops the run at the first loss or gradient that is not finite, looking one step back: the device never waits.

    The gradient counts because it is in the parameters, and in a checkpoint, before the next loss shows it.

    Args:
      source: the examples that are trained on, of which the sentence names some.
    """

    def __init__(self, config: TrainConfig, source: Source, checkpoints: Checkpoints):
        self._config, self._source, self._checkpoints = config, source, checkpoints
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None

    def __call__(self, step: int, metrics: dict[str, jax.Array], examples: int) -> None:
        """Has the metrics of a step checked; `examples` of the data were read up to its end."""
        self.finish()
        values = {"loss": metrics["loss"], "gradient": metrics["gradient_norm"]}
        if "discriminator_gradient_norm" in metrics:
            values["discriminator's gradient"] = metrics["discriminator_gradient_norm"]
        self._pending = step, examples, values

    def finish(self) -> None:
        """Checks what is still pending, which waits for the device. Raises DivergedError."""
        if self._pending is None:
            return
        (step, examples, values), self._pending = self._pending, None
        for name, value in values.items():
            if np.isfinite(value):
                continue
            self._checkpoints.wait()
            last, size = self._checkpoints.latest(), self._config.batch_size
            first = examples - size
            good = (
                f"the last good checkpoint is {self._checkpoints.folder / str(last)}" if last else "none is saved yet"
            )
            raise DivergedError(
                f"The {name} is {float(value)} at step {step}, examples {first} to {examples - 1} of "
                f"the data ({self._numbers(first, size)} of its source); {good}. Lower optimizer.base_lr "
                "or look at those examples, and run again."
            )

    def _numbers(self, start: int, count: int, most: int = 8) -> str:
        """The first few of a batch's examples by their numbers in the source, before shuffling."""
        config = self._config
        numbers = pipeline.example_indices(
            self._source, config.data, start=start, count=min(count, most), seed=config.seed
        )
        return f"numbers {', '.join(map(str, numbers))}{' …' if count > most else ''}"
