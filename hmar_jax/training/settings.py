"""train config → what its stage uses of it: the rest is refused where it says something else, and not compared."""

from __future__ import annotations

import dataclasses
from typing import Any

from hmar_jax.config import ModelConfig, ObjectiveConfig, TrainConfig
from hmar_jax.config.plain import to_plain
from hmar_jax.errors import InputError
from hmar_jax.params import flatten

# Which stages use a field; fields that are not here are used by all.
_STAGES = {
    "sides": {"tokenizer"},
    "tokenizer": {"tokenizer"},
    "tokenizer_loss": {"tokenizer"},
    "transformer": {"next_scale"},
    "remat": {"next_scale", "masked"},
    "scan_layers": {"next_scale", "masked"},
}
_OBJECTIVE = {"scale_weights": "next_scale", "per_sample_masks": "masked", "leak_free": "masked"}


def used(config: TrainConfig) -> TrainConfig:
    """The config with every field that its stage does not use at its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    ignored = {name: defaults[name] for name, stages in _STAGES.items() if config.stage not in stages}
    default = ObjectiveConfig()
    objective = {name: getattr(default, name) for name, stage in _OBJECTIVE.items() if config.stage != stage}
    changes: dict[str, Any] = ignored | {"objective": dataclasses.replace(config.objective, **objective)}
    return dataclasses.replace(config, **changes)


def check_used(config: TrainConfig, start: ModelConfig | None) -> None:
    """Raises InputError for a field that the stage does not use, unless it is at its default or says what `start` has.

    Args:
      start: of the model in `init_from`; sides, tokenizer and transformer that are taken from there may be repeated, as
        `compile-check` needs where that model is not there yet. Of a transformer's classes the token cache decides.
    """
    ours, wanted = flatten(to_plain(config)), flatten(to_plain(used(config)))
    theirs = {} if start is None else flatten(_taken(start))
    for name, value in ours.items():
        if value == wanted[name] or name == "transformer.num_classes" or theirs.get(name, wanted[name]) == value:
            continue
        if name in theirs:
            raise InputError(
                f"{name} is {value} in this config and {theirs[name]} in init_from={config.init_from}, from where "
                f"stage {config.stage!r} takes it; leave it out of the config, or set it to {theirs[name]}."
            )
        raise InputError(f"Stage {config.stage!r} does not use {name}, which is {value}; leave it out of the config.")


def _taken(start: ModelConfig) -> dict[str, Any]:
    """What a stage takes from the model that it starts from, as a train config has it."""
    taken: dict[str, Any] = {"sides": start.ladder.sides, "tokenizer": to_plain(start.tokenizer)}
    if start.transformer is not None:
        taken["transformer"] = to_plain(dataclasses.replace(start.transformer, masked=False, leak_free=False))
    return taken
