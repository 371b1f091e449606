"""work directory ⇄ run: one process at a time, which goes on as it was begun.

A work directory has `config.json`, `checkpoints/`, while a process trains in it `.lock`, and what the loop writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmar_jax.config import TrainConfig
from hmar_jax.config.plain import to_plain
from hmar_jax.errors import InputError, shown
from hmar_jax.files import write_whole, writing
from hmar_jax.files.lock import Lock
from hmar_jax.parallel import processes
from hmar_jax.params import flatten
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.objectives import Objective
from hmar_jax.training.settings import check_same_classes, used

logger = logging.getLogger(__name__)
# What another stream of examples differs in.
_STREAM = {"data.source", "data.path", "data.name", "data.split", "data.classes", "data.held_out"}


@contextlib.contextmanager
def open_workdir(workdir: Path, config: TrainConfig, origin: dict[str, Any]) -> Iterator[tuple[Checkpoints, Lock]]:
    """A work directory that no other process trains in, made, or checked against this config, which it records there.

    All processes of a job call it together. One that was made is removed again where the input turns out to be bad
    before the first step, such as a damaged token cache.

    Args:
      origin: of the run that is to be begun or to go on; see `origin_of`.

    Raises:
      InputError: another process trains there, or the run in it cannot go on with this config.
    """
    new, unused = not workdir.exists(), not (workdir / "config.json").exists()
    try:
        with processes.locked(workdir, "trains") as lock:
            try:
                yield _open(workdir, config, origin), lock
            except InputError:
                if unused and processes.is_first() and not (workdir / "metrics.jsonl").exists():
                    (workdir / "config.json").unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # something is in it
                        (workdir / "checkpoints").rmdir()
                raise
    except InputError:
        if new and processes.is_first():
            with contextlib.suppress(OSError):
                workdir.rmdir()
        raise


def _open(workdir: Path, config: TrainConfig, origin: dict[str, Any]) -> Checkpoints:
    """Its checkpoints, once the config is checked and recorded."""
    with writing(workdir):
        checkpoints = Checkpoints(workdir, config.keep)
    if (done := checkpoints.latest()) is not None:
        before, begun = checkpoints.config(), checkpoints.position()
        check_same_run(before, config, workdir)
        _check_same_start(begun, origin, config, workdir)
        check_same_classes(
            ("The data", origin["class_names"]),
            (f"the run in {workdir}", begun["class_names"]),
            "and labels would change their meaning; go on with data of those names, or choose another --workdir",
        )
        if config.steps < done:
            raise InputError(
                f"steps={config.steps}, and the run in {workdir} has done {done} already; set steps to {done} or more, "
                "or choose another --workdir."
            )
        _log_changes(before, config)
    processes.barrier("work directory checked")
    if processes.is_first():
        write_whole(workdir / "config.json", json.dumps(to_plain(config), indent=2).encode() + b"\n")
    return checkpoints


def origin_of(objective: Objective) -> dict[str, Any]:
    """What a run is begun from, as its checkpoints have it: class names, and the checksum of `init_from`'s weights."""
    start = objective.start.meta.get("sha256", "")
    return {"class_names": objective.model_config.class_names, "start": start}


def _check_same_start(begun: dict[str, Any], origin: dict[str, Any], config: TrainConfig, workdir: Path) -> None:
    """Raises InputError where `init_from` is another model by now: frozen parameters are read from there again."""
    if begun["start"] != origin["start"]:
        raise InputError(
            f"{config.init_from or 'A start from nothing'} is not what the run in {workdir} started from; set "
            "init_from back to that model, or choose another --workdir."
        )


def check_same_run(before: TrainConfig, now: TrainConfig, workdir: Path) -> None:
    """Raises InputError where a setting that must last is not what the work directory's run had."""
    before, now = used(before), used(now)
    for name in ("stage", "seed", "sides", "tokenizer", "transformer", "objective", "optimizer.ema"):
        old, new = (operator.attrgetter(name)(config) for config in (before, now))
        if old != new:
            raise InputError(
                f"The run in {workdir} has {name}={shown(old, 600)}, this config {shown(new, 600)}; set it back, or "
                "choose another --workdir."
            )
    if bool(before.tokenizer_loss.adversarial) != bool(now.tokenizer_loss.adversarial):
        raise InputError(
            f"The run in {workdir} was started with tokenizer_loss.adversarial={before.tokenizer_loss.adversarial}; a "
            "discriminator can neither join nor leave, so set it back, or choose another --workdir."
        )


def _log_changes(before: TrainConfig, now: TrainConfig) -> None:
    """Says, a line each, which settings a run goes on with that are not those it had."""
    old, new = (flatten(to_plain(config)) for config in (before, now))
    changed = [name for name in new if old[name] != new[name]]
    for name in changed:
        logger.info("Going on with %s=%s instead of %s.", name, shown(new[name]), shown(old[name]))
    if _STREAM & set(changed):
        logger.warning("The position in the data is that of the old stream; the new one goes on from the same number.")
