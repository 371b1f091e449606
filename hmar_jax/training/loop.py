"""train config + work directory → trained model: one training stage, from its data to its model directory.

A work directory holds `config.json`, `checkpoints/`, `metrics.jsonl`, `samples/*.png`, `profile/` if steps were traced,
and, once done, `model/`. Running again goes on from the newest checkpoint, bit for bit as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import numpy as np
from jax.sharding import Mesh

from hmar_jax import images, plots
from hmar_jax.arrays import on_host
from hmar_jax.config import MeshConfig, ModelConfig, TrainConfig, check_paths
from hmar_jax.data import pipeline
from hmar_jax.data.tokens import TokenSource, validation_of
from hmar_jax.errors import DivergedError, InputError, device_memory, shown
from hmar_jax.failures import explained
from hmar_jax.files import is_there, local_path
from hmar_jax.formats.model_directory import locate, read_config
from hmar_jax.model import Model
from hmar_jax.parallel import processes, sharding
from hmar_jax.params import Tree
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder
from hmar_jax.training.checkpoint import Checkpoints, describe
from hmar_jax.training.classes import check_same_classes
from hmar_jax.training.evals import Evals
from hmar_jax.training.metrics import Goodput, MetricsWriter, Profiler
from hmar_jax.training.objectives import OBJECTIVES, Objective, Start, open_start, unjudged
from hmar_jax.training.optimizer import learning_rate, make_optimizer
from hmar_jax.training.settings import check_used
from hmar_jax.training.state import TrainState, jit_train_step, make_train_step
from hmar_jax.training.workdir import open_workdir, origin_of

logger = logging.getLogger(__name__)
_NO_STEPS = range(0)


def train(config: TrainConfig, workdir: Path, profile: range = _NO_STEPS) -> Path | None:
    """Trains one stage to its last step, resuming where the work directory has checkpoints.

    All processes of a job call it together, with a work directory that they share; process 0 writes the files, but for
    its own part of a checkpoint each does.

    Args:
      profile: steps to trace; the trace goes to `workdir/profile`.

    Returns:
      The model directory, `workdir/model`; None where SIGTERM asked to stop, and the last step done is saved.
      Ctrl-C stops in the same way, the second one at once.

    Raises:
      KeyboardInterrupt: after Ctrl-C, when the last step done is saved.
      InputError: config, data, or another process in the work directory don't allow it.
      MachineError: a full disk, or too little memory.
      DivergedError: the loss or its gradient is not finite.
      TransientError: a disk that does not answer, or another process of the job that has gone.
    """
    workdir = local_path(workdir, "workdir")
    check_paths(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    with jax.set_mesh(mesh), explained(f"Training in {workdir} could not go on"), contextlib.ExitStack() as stack:
        return _train(config, workdir, mesh, profile, stack)


def _train(config: TrainConfig, workdir: Path, mesh: Mesh, profile: range, stack: contextlib.ExitStack) -> Path | None:
    objective = make_objective(config)
    check_used(config, objective.start and objective.start.config)
    _check_samples(config, objective.model_config)
    for note in objective.notes:
        logger.info(note)
    data = _batches(config, objective, mesh)
    origin = origin_of(objective)
    checkpoints, lock = stack.enter_context(open_workdir(workdir, config, origin))
    resumes = checkpoints.latest() is not None
    state, frozen, optimizer = _initial_state(config, objective, mesh, fresh=not resumes)
    if resumes:
        like = describe(state)
        del state  # there may be no room for two
        state, position = checkpoints.restore(like)
        data.set_state(position)
        logger.info("Resuming from step %d in %s.", int(state.step), workdir)
    else:  # statistics of parameters would need all processes
        overview = clu.parameter_overview.get_parameter_overview(state.params, include_stats=jax.process_count() == 1)
        for line in ("Parameters:", *overview.splitlines()):
            logger.info("%s", line)

    step_fn = jit_train_step(make_train_step(config, objective, optimizer), state, mesh)
    evals = Evals(config, objective, mesh)
    show = _sample_writer(config, objective, workdir)
    rate = learning_rate(config.optimizer, config.steps, config.batch_size)
    start = int(state.step)
    feed = pipeline.ahead(data, functools.partial(sharding.put_batch, mesh=mesh))
    writer = MetricsWriter(workdir, steps=config.steps, start=start, name=config.stage)
    check = _FiniteCheck(config, objective.model_config.image_size, checkpoints)
    steps = range(start + 1, config.steps + 1)
    goodput, profiler = Goodput(start), Profiler(profile, steps, workdir / "profile")
    told = False
    with processes.preemption() as asked, contextlib.ExitStack() as closing:
        for resource in (checkpoints, data, feed, writer, profiler):  # closed from the last to the first
            closing.callback(resource.close)
        for step in steps:
            with goodput.spent("data_wait"):
                batch, position = next(feed)
            first, last = step == start + 1, step == config.steps
            told = asked(step) and not last
            log = first or last or told or step % config.log_every == 0 or bool(evals.due(step))
            sample = config.sample_every and (last or step % config.sample_every == 0)
            save = last or told or step % config.checkpoint_every == 0
            with goodput.spent("compile" if first else "step"), profiler(step):
                state, metrics = step_fn(state, frozen, batch)
                check(step, metrics, position["examples"])
                if log or sample or save or profiler.ends(step):
                    check.finish()
            writer.advance()
            if save:  # the save before is on disk by now or waited for, so that a kill never loses two
                if processes.is_first():
                    lock.check()
                with goodput.spent("checkpoint"):
                    checkpoints.wait()
            if profiler.ends(step):
                profiler.close()
            if log:
                speed = goodput.speed(step, config.batch_size)
                metrics = jax.device_get(metrics) | {"learning_rate": float(rate(step - 1))}
                metrics |= evals(step, state.best, frozen)
                writer.write(step, metrics if first else metrics | speed)
            if save:
                with goodput.spent("checkpoint"):
                    checkpoints.save(step, state, position | origin, config)
            if sample:  # for which there may be no room, in memory or on disk: the step is saved by now
                with device_memory("set sample_labels to fewer classes, or sample_every to 0"):
                    show(step, objective.model_params(state.best, frozen))
            if told:
                break
        with goodput.spent("checkpoint"):
            checkpoints.wait()
        if start < config.steps:
            writer.write_goodput(goodput.summary())
    if told:
        logger.info("Told to stop, and saved step %d of %s; run the command again to go on.", step, workdir)
    else:
        model, source, licences = _trained(config, objective, state, frozen)
        if processes.is_first():
            model.save(workdir / "model", source=source, licences=licences, replace=True)
        processes.barrier("model saved")
    if asked.interrupted:
        raise KeyboardInterrupt
    return None if told else workdir / "model"


def make_objective(config: TrainConfig, class_names: tuple[str, ...] | None = None) -> Objective:
    """The objective of a stage; its class names, where not given, are those of the data, which is opened for them."""
    if class_names is not None:
        return OBJECTIVES[config.stage](config, class_names)
    if config.data.source != "tokens":
        size = ScaleLadder(config.sides).sides[-1] * config.tokenizer.downsampling
        return OBJECTIVES[config.stage](config, pipeline.open_source(config.data, size).class_names)
    cache = TokenSource(config.data.path)
    start = open_start(config)
    assert start is not None  # TrainConfig sees to it
    _check_coded_by(cache, start, config)
    if config.evals and pipeline.has_validation(config.data):
        held_out = TokenSource(validation_of(config.data.path))
        _check_coded_by(held_out, start, config)
        check_same_classes(
            ("The token cache", cache.class_names), (held_out.path, held_out.class_names), "so export both again"
        )
    return OBJECTIVES[config.stage](config, cache.class_names, start)


def _check_coded_by(cache: TokenSource, start: Start, config: TrainConfig) -> None:
    """Raises InputError unless a token cache was written by the tokenizer of the model that the stage starts from."""
    ours = cache.ladder, cache.tokenizer, cache.codebook_size
    if ours != (start.config.ladder, start.meta["tokenizer_sha256"], start.config.tokenizer.codebook_size):
        raise InputError(
            f"The token cache {cache.path} was written by another tokenizer than that of {config.init_from}; "
            "export it again with this one."
        )


def load_trained(workdir: Path, init_from: str = "") -> tuple[Model, str, list[str]]:
    """The model at the newest checkpoint of a work directory, averaged where it has averages; its source and licences,
    as `Model.save` takes them.

    Args:
      init_from: where the model that the run started from is now; by default where the run found it.
    """
    workdir = local_path(workdir, "workdir")
    if not is_there(workdir / "checkpoints", "Folder"):
        raise InputError(f"{workdir} has no checkpoints; give the --workdir of a training run.")
    checkpoints = Checkpoints(workdir)
    if checkpoints.latest() is None:
        raise InputError(f"{workdir} has no whole checkpoint yet; train until the first is saved.")
    config = _with_start(checkpoints, init_from, workdir)
    objective = make_objective(unjudged(config), tuple(checkpoints.position()["class_names"]))
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        like, frozen, _ = _initial_state(config, objective, mesh, fresh=False)
    state, _ = checkpoints.restore(describe(like))
    checkpoints.close()
    return _trained(config, objective, state, frozen)


def _trained(
    config: TrainConfig, objective: Objective, state: TrainState, frozen: Tree
) -> tuple[Model, str, list[str]]:
    """The model that a state holds, in host memory, its source and its licences."""
    model = Model(objective.model_config, jax.tree.map(on_host, objective.model_params(state.best, frozen)))
    run = f"stage {config.stage}, {int(state.step)} steps of {config.batch_size}, seed {config.seed}"
    licences = objective.start.meta["licences"] if objective.start else []  # a start binds what comes of it
    return model, f"trained by hmar-jax, {run}", licences


def _batches(config: TrainConfig, objective: Objective, mesh: Mesh) -> pipeline.Batches:
    """The part of the training batches that this process reads, from the first one on."""
    model, rows = objective.model_config, sharding.host_rows(mesh, config.batch_size)
    return pipeline.batches(
        config.data,
        batch_size=config.batch_size,
        image_size=model.image_size,
        seed=config.seed,
        rows=rows,
        classes=model.num_classes,
    )


def _initial_state(
    config: TrainConfig, objective: Objective, mesh: Mesh, *, fresh: bool
) -> tuple[TrainState, Tree, Any]:
    """The state at step 0 and the frozen parameters, on the mesh from the moment they exist; and the optimizer.

    Args:
      fresh: whether training starts there; else the state is only something to restore into, and needs no data.
    """
    first: list[Any] = []
    if fresh and objective.start_batches:
        start = _batches(config, objective, mesh)
        first = [sharding.put_batch(next(start), mesh) for _ in range(objective.start_batches)]
        start.close()
    parts = objective.init(first)
    optimizer = make_optimizer(
        config.optimizer, config.steps, config.batch_size, parts.trained, config.tokenizer_loss.adversarial_start
    )
    create = functools.partial(TrainState.create, config, optimizer=optimizer)
    changing = parts._replace(frozen={})
    layout = sharding.tree_shardings(jax.eval_shape(create, changing), mesh)
    return jax.jit(create, out_shardings=layout)(changing), parts.frozen, optimizer


def _start_of(config: TrainConfig) -> str:
    """The checksum of the model that a run starts from, empty where it starts from nothing."""
    return read_config(locate(config.init_from))[1]["sha256"] if config.init_from else ""


def _with_start(checkpoints: Checkpoints, init_from: str, workdir: Path) -> TrainConfig:
    """The config of the newest checkpoint, with an `init_from` whose checksum is that of the run's start."""
    config, start = checkpoints.config(), checkpoints.position()["start"]
    if init_from and not start:
        raise InputError(f"The run in {workdir} started from no model; leave --init-from={init_from} out.")
    config = dataclasses.replace(config, init_from=init_from or config.init_from)
    try:
        reason = "" if _start_of(config) == start else "its weights have another checksum"
    except InputError as error:
        reason = str(error).partition(";")[0].rstrip(".")
    if reason:
        raise InputError(
            f"{config.init_from} is not the model that the run in {workdir} started from ({reason}); give that model's "
            "directory as --init-from."
        )
    return config


class _FiniteCheck:
    """Stops the run at the first loss or gradient that is not finite, looking one step back: the device never waits.

    The gradient counts because it is in the parameters, and in a checkpoint, before the next loss shows it.
    """

    def __init__(self, config: TrainConfig, image_size: int, checkpoints: Checkpoints):
        self._config, self._image_size, self._checkpoints = config, image_size, checkpoints
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None

    def __call__(self, step: int, metrics: dict[str, jax.Array], examples: int) -> None:
        """Has the metrics of a step checked; `examples` of the data were read up to its end."""
        self.finish()
        values = {"loss": metrics["loss"], "gradient": metrics["gradient_norm"]}
        if "discriminator_gradient_norm" in metrics:
            values["discriminator's gradient"] = metrics["discriminator_gradient_norm"]
        self._pending = step, examples, values

    def finish(self) -> None:
        """Checks what is still pending."""
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
            f"sample_labels={shown(config.sample_labels)} is not a list of the classes 0 to {model.num_classes - 1}; "
            "set it to some of those, or sample_every to 0."
        )
    schedule = Schedule.parse(config.sample_schedule, model.ladder, model.transformer.depth)
    if schedule.has_masked_steps and not model.transformer.masked:
        raise InputError(
            f"sample_schedule={shown(config.sample_schedule)} has masked steps, which stage {config.stage!r} does not "
            "have; set it to 'next-scale', or sample_every to 0."
        )


def _sample_writer(config: TrainConfig, objective: Objective, workdir: Path) -> Callable[[int, Tree], None]:
    """(step, model parameters) → `samples/<step>.png`: the same pictures, labels and seeds every time."""
    model_config = objective.model_config
    enlarge = max(1, 96 // model_config.image_size)
    if config.stage == "tokenizer" and config.sample_every:
        part: pipeline.Part = "validation" if pipeline.has_validation(config.data) else "train"
        size = model_config.image_size
        held = pipeline.batches(config.data, batch_size=16, image_size=size, seed=config.seed + 1, part=part)
        originals = next(held)["image"]
        held.close()

    def write(step: int, params: Tree) -> None:
        model = Model(model_config, params, config.dtype)
        if config.stage == "tokenizer":
            picture = plots.reconstructions(model.tokenizer, originals, enlarge=enlarge)
        else:
            drawn = model.sample(config.sample_labels, config.sample_schedule, seed=config.seed).images
            picture = images.grid(drawn, 8, enlarge)
        if processes.is_first():
            images.save_png(picture, workdir / "samples" / f"{step:08d}.png")

    return write
