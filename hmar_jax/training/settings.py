"""What must agree: settings that a stage does not use are refused, and class names that differ.

Only what a stage uses is compared when a run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
Named = tuple[str, Sequence[str]]  # what has the classes, as a sentence calls it; their names by label


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


def check_same_classes(here: Named, there: Named, remedy: str) -> None:
    """Raises InputError, with both lists, where two lists of class names differ; one without names fits all.

    Args:
      remedy: the end of the sentence, after the list of `there`.
    """
    (who, ours), (other, theirs) = here, there
    if not ours or not theirs or tuple(ours) == tuple(theirs):
        return
    raise InputError(f"{who} has the classes {_shown(ours, theirs)}, but {other} has {_shown(theirs, ours)}, {remedy}.")


def _shown(names: Sequence[str], others: Sequence[str], most: int = 8) -> str:
    """Names as part of a sentence; of many, those around the first that differs."""
    if len(names) <= most:
        return ", ".join(map(_cut, names))
    same = (a == b for a, b in zip(names, others, strict=False))
    first = next((i for i, equal in enumerate(same) if not equal), min(len(names), len(others)))
    start = max(0, min(first - 2, len(names) - most))
    shown = ", ".join(map(_cut, names[start : start + most]))
    return f"{'…, ' if start else ''}{shown}{', …' if start + most < len(names) else ''} ({len(names)} in all)"


def _cut(name: str, most: int = 32) -> str:
    printable = name if name.isprintable() else repr(name)[1:-1]
    return printable if len(printable) <= most else printable[: most - 1] + "…"
