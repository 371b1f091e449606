"""Schedules that a model recommends for itself, by name: `"sampling"` of a model directory's config.json ⇄ Schedules.

    "sampling": {"default": {"counts": [[1], [1, 3], …], "cfg": …}, "fast": {"counts": [[1], [4], …]}}

`default` is what is sampled by where nothing else is said. A name means the model's own schedule before a preset or a
curve that is called so, and a directory stays what it is when presets are added.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from hmar_jax.config import ModelConfig
from hmar_jax.errors import InputError, saying, shown
from hmar_jax.sampling.schedule import DEFAULT, Schedule

MOST = 64
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")


def check(sampling: Mapping[str, Schedule], config: ModelConfig) -> None:
    """Checks what a model is to recommend.

    Raises:
      InputError: more than 64 schedules, a name that is not a letter and up to 39 letters, digits, `_` or `-`, no
        Schedule, or one that this model cannot sample by.
    """
    _check_names(sampling)
    if not sampling:
        return
    if config.transformer is None:
        raise InputError("sampling recommends schedules, but this model is a tokenizer alone; leave sampling out.")
    for name, schedule in sampling.items():
        with saying(f"Recommended schedule {name!r}"):
            if not isinstance(schedule, Schedule):
                raise InputError(f"It is {shown(schedule)}; expected a Schedule.")
            schedule.check_model(config.ladder, config.transformer)


def _check_names(sampling: Any) -> None:
    if not isinstance(sampling, Mapping):
        raise InputError(f"sampling is {shown(sampling)}; expected schedules by name, such as {DEFAULT!r}.")
    if len(sampling) > MOST:
        raise InputError(f"sampling has {len(sampling)} schedules; expected {MOST} at most.")
    for name in sampling:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"sampling has a schedule called {shown(name)}; expected a letter and then up to 39 letters, digits, "
                "'_' or '-'."
            )


def read(fields: Any, config: ModelConfig) -> dict[str, Schedule]:
    """The Schedules of a `"sampling"`, as `check` wants them. Each is JSON as `Schedule.from_json` takes it."""
    _check_names(fields)
    sampling = {}
    for name, of_one in fields.items():
        with saying(f"Recommended schedule {name!r}"):
            sampling[name] = Schedule.from_fields(of_one)
    check(sampling, config)
    return sampling


def to_plain(sampling: Mapping[str, Schedule]) -> dict[str, Any]:
    """What `read` takes."""
    return {name: dataclasses.asdict(schedule) for name, schedule in sampling.items()}
