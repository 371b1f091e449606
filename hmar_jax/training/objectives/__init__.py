"""parameters, batch → loss: one objective for each training stage, all with the same methods (`Objective`)."""

from __future__ import annotations

from typing import Any

from hmar_jax.config import TrainConfig
from hmar_jax.training.objectives.base import Batch, Metrics, Objective, Parts, Start, initial_parts, open_start
from hmar_jax.training.objectives.masked import MaskedObjective
from hmar_jax.training.objectives.next_scale import NextScaleObjective
from hmar_jax.training.objectives.tokenizer import TokenizerObjective

OBJECTIVES: dict[str, Any] = {
    "tokenizer": TokenizerObjective,
    "next_scale": NextScaleObjective,
    "masked": MaskedObjective,
}


def make_objective(config: TrainConfig, class_names: tuple[str, ...], start: Start | None = None) -> Objective:
    """The objective of a config's stage.

    Args:
      class_names: of the labels in the data.
      start: what the stage starts from; opened when None.
    """
    return OBJECTIVES[config.stage](config, class_names, start or open_start(config))


__all__ = [
    "OBJECTIVES",
    "Batch",
    "MaskedObjective",
    "Metrics",
    "NextScaleObjective",
    "Objective",
    "Parts",
    "Start",
    "TokenizerObjective",
    "initial_parts",
    "make_objective",
    "open_start",
]
