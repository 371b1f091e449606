"""train config + work directory → trained model: one training stage, from its data to its model directory.

A work directory holds `config.json`, `checkpoints/`, `metrics.jsonl`, `samples/*.png` and, once done, `model/`. Running
again goes on from the newest checkpoint, bit for bit as if it had not stopped.
"""

from __future__ import annotations

import json
import logging
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import numpy as np
from jax.sharding import Mesh

from hmar_jax import pictures
from hmar_jax.config import MeshConfig, ModelConfig, TrainConfig, to_plain
from hmar_jax.data import pipeline
from hmar_jax.data.tokens import TokenSource
from hmar_jax.errors import InputError
from hmar_jax.files import write_whole, writing
from hmar_jax.model import Model
from hmar_jax.params import Tree
from hmar_jax.pretrained import read_config, save_model
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder
from hmar_jax.training import sharding
from hmar_jax.training.checkpoint import Checkpoints, describe
from hmar_jax.training.metrics import MetricsWriter
from hmar_jax.training.objectives import OBJECTIVES, Objective, Parts
from hmar_jax.training.optimizer import learning_rate, make_optimizer
from hmar_jax.training.state import TrainState, make_train_step

logger = logging.getLogger(__name__)


def train(config: TrainConfig, workdir: Path) -> Path:
    """Trains one stage to its last step, resuming where the work directory has checkpoints.

    Returns:
      The model directory, `workdir/model`.

    Raises:
      InputError: config, data or disk don't allow it; or the loss is not finite.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    with jax.set_mesh(mesh):
        return _train(config, workdir, mesh)


def _train(config: TrainConfig, workdir: Path, mesh: Mesh) -> Path:
    objective = make_objective(config)
    _check_samples(config, objective.model_config)
    size = objective.model_config.image_size
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    data = pipeline.batches(config.data, batch_size=config.batch_size, image_size=size, seed=config.seed, **host)
    checkpoints = _open_workdir(workdir, config)
    resumes = checkpoints.latest() is not None
    state, frozen, optimizer = _initial_state(config, objective, mesh, fresh=not resumes)
    if resumes:
        state, position = checkpoints.restore(describe(state))
        data.set_state(position)
        logger.info("Resuming from step %d in %s.", int(state.step), workdir)
    else:
        logger.info("Parameters:\n%s", clu.parameter_overview.get_parameter_overview(state.params))

    # Without the layout of its result pinned, XLA chooses another, and compiles again for it.
    layout = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jax.jit(make_train_step(config, objective, optimizer), donate_argnums=0, out_shardings=(layout, None))
    show = _sample_writer(config, objective, workdir)
    rate = learning_rate(config.optimizer, config.steps, config.batch_size)
    start = int(state.step)
    writer = MetricsWriter(workdir, steps=config.steps, start=start, name=config.stage)
    check = _FiniteCheck(config, size, checkpoints)
    origin = {"class_names": objective.model_config.class_names, "start": _start_of(config)}
    timer, timed_from = time.perf_counter(), start
    try:
        for step in range(start + 1, config.steps + 1):
            batch = sharding.put_batch(next(data), mesh)
            state, metrics = step_fn(state, frozen, batch)
            check(step, metrics)
            writer.advance()
            last = step == config.steps
            if step % config.log_every == 0 or last or step == start + 1:
                check.finish()
                metrics = jax.device_get(metrics) | {"learning_rate": float(rate(step - 1))}
                seconds = (time.perf_counter() - timer) / (step - timed_from)
                if step > start + 1:  # the first step compiles
                    metrics |= {"step_seconds": seconds, "images_per_second": config.batch_size / seconds}
                writer.write(step, metrics)
                timer, timed_from = time.perf_counter(), step
            if config.sample_every and (step % config.sample_every == 0 or last):
                show(step, objective.model_params(state.best, frozen))
                timer, timed_from = time.perf_counter(), step
            if step % config.checkpoint_every == 0 or last:
                check.finish()
                checkpoints.save(step, state, data.get_state() | origin, config)
                timer, timed_from = time.perf_counter(), step
        checkpoints.wait()
    finally:
        writer.close()
        data.close()
        checkpoints.close()
    model, source, licences = _trained(config, objective, state, frozen)
    return save_model(workdir / "model", model, source, licences=licences, replace=True)


def make_objective(config: TrainConfig, class_names: tuple[str, ...] | None = None) -> Objective:
    """The objective of a stage; its class names, where not given, are those of the data, which is opened for them."""
    if class_names is not None:
        return OBJECTIVES[config.stage](config, class_names)
    if config.data.source != "tokens":
        size = ScaleLadder(config.sides).sides[-1] * config.tokenizer.downsampling
        return OBJECTIVES[config.stage](config, pipeline.open_source(config.data, size).class_names)
    cache = TokenSource(config.data.path)
    model, meta = read_config(Path(config.init_from))
    if cache.ladder != model.ladder or cache.tokenizer != meta["tokenizer_sha256"]:
        raise InputError(
            f"The token cache {config.data.path} was written by another tokenizer than that of {config.init_from}; "
            "export it again with this one."
        )
    return OBJECTIVES[config.stage](config, cache.class_names)


def load_trained(workdir: Path) -> tuple[Model, str, list[str]]:
    """The model at the newest checkpoint of a work directory, averaged where it has averages; its source and licences,
    as `save_model` takes them.
    """
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir} has no checkpoints; give the --workdir of a training run.")
    checkpoints = Checkpoints(workdir)
    if checkpoints.latest() is None:
        raise InputError(f"{workdir} has no whole checkpoint yet; train until the first is saved.")
    config = checkpoints.config()
    _check_same_start(checkpoints, config, workdir)
    objective = make_objective(config, tuple(checkpoints.position()["class_names"]))
    like, frozen, _ = _initial_state(config, objective, sharding.make_mesh(MeshConfig()), fresh=False)
    state, _ = checkpoints.restore(describe(like))
    checkpoints.close()
    return _trained(config, objective, state, frozen)


def _trained(
    config: TrainConfig, objective: Objective, state: TrainState, frozen: Tree
) -> tuple[Model, str, list[str]]:
    """The model that a state holds, in host memory, its source and its licences."""
    model = Model(objective.model_config, jax.device_get(objective.model_params(state.best, frozen)))
    run = f"stage {config.stage}, {int(state.step)} steps of {config.batch_size}, seed {config.seed}"
    # What a model starts from binds what it becomes.
    licences = read_config(Path(config.init_from))[1]["licences"] if config.init_from else []
    return model, f"trained by hmar-jax, {run}", licences


def _initial_state(
    config: TrainConfig, objective: Objective, mesh: Mesh, *, fresh: bool
) -> tuple[TrainState, Tree, Any]:
    """The state at step 0 and the frozen parameters, on the mesh; and the optimizer.

    Args:
      fresh: whether training starts there; else the state is only something to restore into, and needs no data.
    """
    first: list[Any] = []
    if fresh and objective.start_batches:
        size = objective.model_config.image_size
        start = pipeline.batches(config.data, batch_size=config.batch_size, image_size=size, seed=config.seed)
        first = [next(start) for _ in range(objective.start_batches)]
        start.close()
    parts: Parts = objective.init(first)
    optimizer = make_optimizer(config.optimizer, config.steps, config.batch_size, parts.trained)
    state = TrainState.create(config, parts, optimizer)
    state = jax.device_put(state, sharding.tree_shardings(state, mesh))
    frozen = jax.device_put(parts.frozen, sharding.tree_shardings(parts.frozen, mesh))
    return state, frozen, optimizer


def _open_workdir(workdir: Path, config: TrainConfig) -> Checkpoints:
    """Makes the work directory, or checks that the run in it can go on with this config, which it records there."""
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(workdir, config.keep)
    if checkpoints.latest() is not None:
        _check_same_run(checkpoints.config(), config, workdir)
        _check_same_start(checkpoints, config, workdir)
    write_whole(workdir / "config.json", json.dumps(to_plain(config), indent=2).encode() + b"\n")
    return checkpoints


def _check_same_run(before: TrainConfig, now: TrainConfig, workdir: Path) -> None:
    """Raises InputError where a setting that must last is not what the work directory's run had."""
    for name in ("stage", "seed", "sides", "tokenizer", "transformer", "objective", "optimizer.ema"):
        old, new = (operator.attrgetter(name)(config) for config in (before, now))
        if old != new:
            raise InputError(
                f"The run in {workdir} has {name}={old}, this config {new}; set it back, or choose another --workdir."
            )
    if bool(before.tokenizer_loss.adversarial) != bool(now.tokenizer_loss.adversarial):
        raise InputError(
            f"The run in {workdir} was started with tokenizer_loss.adversarial={before.tokenizer_loss.adversarial}; a "
            "discriminator can neither join nor leave, so set it back, or choose another --workdir."
        )


def _start_of(config: TrainConfig) -> str:
    """The checksum of the model that a run starts from, empty where it starts from nothing."""
    return read_config(Path(config.init_from))[1]["sha256"] if config.init_from else ""


def _check_same_start(checkpoints: Checkpoints, config: TrainConfig, workdir: Path) -> None:
    """Raises InputError where `init_from` is another model by now: frozen parameters are read from there again."""
    if checkpoints.position()["start"] != _start_of(config):
        raise InputError(
            f"{config.init_from or 'A start from nothing'} is not what the run in {workdir} started from; set "
            "init_from back to that model, or choose another --workdir."
        )


class _FiniteCheck:
    """Stops the run at the first loss or gradient that is not finite, looking one step back: the device never waits.

    The gradient counts because it is in the parameters, and in a checkpoint, before the next loss shows it.
    """

    def __init__(self, config: TrainConfig, image_size: int, checkpoints: Checkpoints):
        self._config, self._image_size, self._checkpoints = config, image_size, checkpoints
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def __call__(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.finish()
        self._pending = (step, {"loss": metrics["loss"], "gradient": metrics["gradient_norm"]})

    def finish(self) -> None:
        """Checks what is still pending."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        for name, value in values.items():
            if np.isfinite(value):
                continue
            self._checkpoints.wait()
            last, size = self._checkpoints.latest(), self._config.batch_size
            good = (
                f"the last good checkpoint is {self._checkpoints.folder / str(last)}" if last else "none is saved yet"
            )
            raise InputError(
                f"The {name} is {float(value)} at step {step}, examples {(step - 1) * size} to {step * size - 1} of "
                f"the data ({self._numbers((step - 1) * size, size)} of its source); {good}. Lower optimizer.base_lr "
                "or look at those examples, and run again."
            )

    def _numbers(self, start: int, count: int, shown: int = 8) -> str:
        """The first few of a batch's examples by their numbers in the source, before shuffling."""
        where = {"image_size": self._image_size, "seed": self._config.seed}
        numbers = pipeline.example_indices(self._config.data, start=start, count=min(count, shown), **where)
        return f"numbers {', '.join(map(str, numbers))}{' …' if count > shown else ''}"


def _check_samples(config: TrainConfig, model: ModelConfig) -> None:
    """Raises InputError now, not after hours of training, where sample pictures could not be drawn."""
    if not config.sample_every or model.transformer is None:
        return
    wrong = [label for label in config.sample_labels if not 0 <= label < model.num_classes]
    if wrong or not config.sample_labels:
        raise InputError(
            f"sample_labels={config.sample_labels} is not a list of the classes 0 to {model.num_classes - 1}; set it "
            "to some of those, or sample_every to 0."
        )
    schedule = Schedule.preset(config.sample_schedule, model.ladder, model.transformer.depth)
    if schedule.has_masked_steps and not model.transformer.masked:
        raise InputError(
            f"sample_schedule={config.sample_schedule!r} has masked steps, which stage {config.stage!r} does not have; "
            "set it to 'next-scale', or sample_every to 0."
        )


def _sample_writer(config: TrainConfig, objective: Objective, workdir: Path) -> Callable[[int, Tree], None]:
    """(step, model parameters) → `samples/<step>.png`: the same pictures, labels and seeds every time."""
    model_config = objective.model_config
    enlarge = max(1, 96 // model_config.image_size)
    if config.stage == "tokenizer" and config.sample_every:
        held = pipeline.batches(config.data, batch_size=16, image_size=model_config.image_size, seed=config.seed + 1)
        originals = next(held)["image"]
        held.close()

    def write(step: int, params: Tree) -> None:
        model = Model(model_config, params, config.dtype)
        if config.stage == "tokenizer":
            picture = pictures.reconstructions(model.tokenizer, originals, enlarge=enlarge)
        else:
            images = model.sample(config.sample_labels, config.sample_schedule, seed=config.seed).images
            picture = pictures.grid(images, 8, enlarge)
        if jax.process_index() == 0:
            pictures.save_png(picture, workdir / "samples" / f"{step:08d}.png")

    return write
