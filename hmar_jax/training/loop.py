"""train config + work directory → trained model: one training stage, from its data to its model directory.

A work directory holds `config.json`, `checkpoints/`, `metrics.jsonl`, `samples/*.png`, `profile/` if steps were traced,
and, once done, `model/`. Running again goes on from the newest checkpoint, bit for bit as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import clu.parameter_overview
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from hmar_jax.config import TrainConfig, check_paths, from_config_dict, load
from hmar_jax.data import pipeline
from hmar_jax.data.sources import Sources
from hmar_jax.data.tokens import TokenSource
from hmar_jax.errors import InputError, device_memory, shown
from hmar_jax.failures import explained
from hmar_jax.files import local_path
from hmar_jax.model import Model
from hmar_jax.parallel import processes, sharding
from hmar_jax.params import flatten
from hmar_jax.scales import ScaleLadder
from hmar_jax.training.evals import Evaluator, make_evaluators
from hmar_jax.training.finite import FiniteCheck
from hmar_jax.training.metrics import Goodput, MetricsWriter, Profiler
from hmar_jax.training.objectives import Objective, Start, initial_parts, make_objective, open_start
from hmar_jax.training.optimizer import learning_rate
from hmar_jax.training.samples import SampleWriter, check_samples
from hmar_jax.training.settings import check_same_classes, check_used
from hmar_jax.training.state import initial_state, jit_train_step, make_train_step, optimizer_of, state_shapes
from hmar_jax.training.trained import trained_model
from hmar_jax.training.workdir import open_workdir, origin_of

logger = logging.getLogger(__name__)

Callback = Callable[[int, dict[str, Any]], object]
_NO_STEPS = range(0)


def train(
    config: TrainConfig | ml_collections.ConfigDict | str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    callbacks: Sequence[Callback] = (),
    *,
    profile: range = _NO_STEPS,
) -> Model | None:
    """Trains one stage to its last step, resuming where the work directory has checkpoints.

    All processes of a job call it together, with a work directory that they share; process 0 writes the files, but for
    its own part of a checkpoint each does. Nothing that it sets for itself, such as signal handlers, stays set.

    Args:
      config: a `TrainConfig`, such a `ConfigDict` as `configs/*.py` return, or a file or name for `config.load`.
      workdir: made if it is not there.
      callbacks: functions of a step and its metrics, called after each step that is logged: `log_every`, the first and
        last, and those with evaluations. Metrics are floats, and float32 arrays where there is one for each scale, by
        the names in `metrics.jsonl`. One that returns True, in any process, asks to save the step and stop. What one
        raises ends the training, and what was saved before stays.
      profile: steps to trace; the trace goes to `workdir/profile`.

    Returns:
      The model, its parameters in host memory; it is in `workdir/model` too. None where SIGTERM or a callback asked to
      stop, and the last step done is saved. At the last step there is nothing left to stop.

    Raises:
      KeyboardInterrupt: after Ctrl-C, when the last step done is saved. The second Ctrl-C leaves at once.
      InputError: config, data, or another process in the work directory don't allow it.
      MachineError: a full disk, or too little memory.
      DivergedError: the loss or its gradient is not finite.
      TransientError: a disk that does not answer, or another process of the job that has gone.
    """
    config, workdir = _checked(config), local_path(workdir, "workdir")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise InputError(f"callbacks is {shown(callbacks)}; expected a list of functions of a step and its metrics.")
    if not isinstance(profile, range):
        raise InputError(f"profile is {shown(profile)}; expected a range of steps, such as range(10, 13).")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    with jax.set_mesh(mesh), explained(f"Training in {workdir} could not go on"):
        return Run(config, workdir, mesh, callbacks, profile).train()


class Closeable(Protocol):
    """What holds threads, files or processes until it is closed."""

    def close(self) -> Any: ...


class Run:
    """One training stage in a work directory: `setup`, then `step` by step, then the model.

    After a step come, each where it is due and always in this order:

    1. `check`: loss and gradient are finite. Nothing of a step is logged or saved before. A step that is to be saved
       waits here, too, until the save before is on disk, so that a kill never loses two.
    2. `evaluate`: metrics of held-out examples, for the log.
    3. `log`: the metrics, to `metrics.jsonl` and the callbacks, which may ask to save and stop. Before `save`, as a run
       that is killed between the two and goes on from that step would never write its line.
    4. `save`: only while the work directory is still this run's.
    5. `sample`: pictures, for which there may be no room, in memory or on disk; the step is saved by then.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        mesh: Mesh,
        callbacks: Sequence[Callback] = (),
        profile: range = _NO_STEPS,
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.callbacks, self.profile = callbacks, profile
        self.resources = contextlib.ExitStack()  # closed from the last to the first

    def train(self) -> Model | None:
        """All steps that are left; see the function `train`."""
        stopped = False
        with contextlib.ExitStack() as held:
            try:
                self.setup(held)
            except BaseException:  # as `with` would, but for signals, which are to end a setup at once
                self.resources.close()
                raise
            with processes.preemption() as self.stop_requests, self.resources:
                for step in self.steps:
                    if stopped := self.step(step):
                        break
                self.wait_for_save()
                if self.steps:
                    self.writer.write_goodput(self.goodput.summary())
            model = None if stopped else self.save_model()
        if stopped:
            logger.info("Told to stop, and saved step %d of %s; run the command again to go on.", step, self.workdir)
        if self.stop_requests.interrupted:
            raise KeyboardInterrupt
        return model

    def setup(self, held: contextlib.ExitStack) -> None:
        """All that the steps need. The lock of the work directory goes to `held`."""
        config = self.config
        self.sources, self.objective = open_inputs(config)
        model_config = self.objective.model_config
        check_used(config, self.objective.start.config)
        check_samples(config, model_config)
        for note in self.objective.notes:
            logger.info(note)
        self.source = self.sources.open("train", config.seed, model_config.num_classes)
        self.data = self._closed_in_the_end(self._batches())
        self.origin = origin_of(self.objective)
        self.checkpoints, self.lock = held.enter_context(open_workdir(self.workdir, config, self.origin))
        self._closed_in_the_end(self.checkpoints)

        resumes = self.checkpoints.latest() is not None
        self.state, self.frozen = self._resume() if resumes else self._begin()
        optimizer = optimizer_of(config, self.state.params)
        step_function = make_train_step(config, self.objective, optimizer)
        self.train_step = jit_train_step(step_function, self.state, self.mesh)
        self.learning_rate = learning_rate(config.optimizer, config.steps, config.batch_size)

        done = int(self.state.step)
        self.steps = range(done + 1, config.steps + 1)
        self.finite = FiniteCheck(config, self.source, self.checkpoints)
        self.evaluators = make_evaluators(config, self.objective, self.sources, self.mesh)
        self.write_samples = SampleWriter(config, model_config, self.sources, self.workdir)
        self.feed = self._closed_in_the_end(
            pipeline.ahead(self.data, functools.partial(sharding.put_batch, mesh=self.mesh))
        )
        self.writer = self._closed_in_the_end(
            MetricsWriter(self.workdir, steps=config.steps, start=done, name=config.stage)
        )
        self.profiler = self._closed_in_the_end(Profiler(self.profile, self.steps, self.workdir / "profile"))
        self.goodput = Goodput(done)

    def step(self, step: int) -> bool:
        """One step and what is due after it; whether the run was asked to stop there."""
        config, first, last = self.config, step == self.steps.start, step == self.config.steps
        with self.goodput.spent("data_wait"):
            batch, position = next(self.feed)
        stop = self.stop_requests(step) and not last
        evaluators = [evaluator for evaluator in self.evaluators if evaluator.due(step)]
        log = first or last or stop or step % config.log_every == 0 or bool(evaluators)
        save = last or stop or step % config.checkpoint_every == 0
        sample = config.sample_every > 0 and (last or step % config.sample_every == 0)

        with self.goodput.spent("compile" if first else "step"), self.profiler(step):
            self.state, metrics = self.train_step(self.state, self.frozen, batch)
            self.check(step, metrics, position, wait=log or save or sample or self.profiler.ends(step))
        self.writer.advance()
        if self.profiler.ends(step):
            self.profiler.close()
        if save:
            self.wait_for_save()
        if log:
            stop |= self.log(step, metrics, self.evaluate(step, evaluators)) and not last
        if save or stop:
            self.save(step, position)
        if sample:
            self.sample(step)
        return stop

    def check(self, step: int, metrics: dict[str, jax.Array], position: dict[str, int], *, wait: bool) -> None:
        """Has loss and gradient checked: now, where the run waits for the step anyway, else during the next one."""
        self.finite(step, metrics, position["examples"])
        if wait:
            self.finite.finish()

    def wait_for_save(self) -> None:
        """Returns when the save under way, if any, is on disk."""
        with self.goodput.spent("checkpoint"):
            self.checkpoints.wait()

    def evaluate(self, step: int, evaluators: list[Evaluator]) -> dict[str, np.ndarray]:
        """The metrics of evaluators, on averaged parameters where there are any."""
        measured: dict[str, np.ndarray] = {}
        for evaluator in evaluators:
            measured |= evaluator(step, self.state.best, self.frozen)
        return measured

    def log(self, step: int, metrics: dict[str, jax.Array], measured: dict[str, np.ndarray]) -> bool:
        """Writes metrics and shows them to the callbacks; whether one of these, in any process, asks to stop."""
        speed = self.goodput.speed(step, self.config.batch_size)
        line = jax.device_get(metrics) | {"learning_rate": float(self.learning_rate(step - 1))} | measured
        if step > self.steps.start:  # the first step compiled
            line |= speed
        self.writer.write(step, line)
        plain = {name: value if np.ndim(value) else float(value) for name, value in line.items()}
        answers = [callback(step, dict(plain)) for callback in self.callbacks]
        return processes.any_of_all(any(isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers))

    def save(self, step: int, position: dict[str, int]) -> None:
        """Starts to save the step."""
        if processes.is_first():
            self.lock.check()
        with self.goodput.spent("checkpoint"):
            self.checkpoints.save(step, self.state, position | self.origin, self.config)

    def sample(self, step: int) -> None:
        """Writes sample pictures."""
        with device_memory("set sample_labels to fewer classes, or sample_every to 0"):
            self.write_samples(step, self.objective.model_params(self.state.best, self.frozen))

    def save_model(self) -> Model:
        """Writes `model/` of the work directory; returns its model."""
        model = trained_model(self.config, self.objective, self.state, self.frozen)
        if processes.is_first():
            model.save(self.workdir / "model", replace=True)
        processes.barrier("model saved")
        return model

    def _closed_in_the_end[Resource: Closeable](self, resource: Resource) -> Resource:
        self.resources.callback(resource.close)
        return resource

    def _batches(self) -> pipeline.Batches:
        """The part of the training batches that this process reads, from the first one on."""
        config = self.config
        return pipeline.batches(
            config.data,
            batch_size=config.batch_size,
            image_size=self.objective.model_config.image_size,
            seed=config.seed,
            rows=sharding.host_rows(self.mesh, config.batch_size),
            source=self.source,
        )

    def _begin(self) -> Any:
        """The state at step 0, and the frozen parameters."""
        start = self._batches()
        first = [sharding.put_batch(next(start), self.mesh) for _ in range(self.objective.start_batches)]
        start.close()
        parts = initial_parts(self.objective, first)
        state = initial_state(self.config, parts, self.mesh)
        # Statistics of parameters would need all processes.
        overview = clu.parameter_overview.get_parameter_overview(state.params, include_stats=jax.process_count() == 1)
        for line in ("Parameters:", *overview.splitlines()):
            logger.info("%s", line)
        return state, parts.frozen

    def _resume(self) -> Any:
        """The state of the newest checkpoint, and the frozen parameters, which are read from `init_from` again."""
        like, frozen = state_shapes(self.config, self.objective, self.mesh)
        state, position = self.checkpoints.restore(like)
        self.data.set_state(position)
        logger.info("Resuming from step %d in %s.", int(state.step), self.workdir)
        return state, self.objective.start.params(flatten(frozen))


def open_inputs(config: TrainConfig) -> tuple[Sources, Objective]:
    """The data of a stage, and its objective, which knows the classes in the data and the model to start from."""
    if config.stage == "tokenizer":
        sources = Sources(config.data, ScaleLadder(config.sides).sides[-1] * config.tokenizer.downsampling)
    else:
        sources = Sources(config.data)
    source, start = sources.open("train", config.seed), open_start(config)
    if isinstance(source, TokenSource):
        _check_coded_by(source, start, config)
        if config.evals and sources.has_validation():
            held_out = sources.open("validation")
            assert isinstance(held_out, TokenSource)
            _check_coded_by(held_out, start, config)
            check_same_classes(
                ("The token cache", source.class_names), (held_out.path, held_out.class_names), "so export both again"
            )
    return sources, make_objective(config, source.class_names, start)


def _check_coded_by(cache: TokenSource, start: Start, config: TrainConfig) -> None:
    """Raises InputError unless a token cache was written by the tokenizer of the model that the stage starts from."""
    assert start.config is not None  # TrainConfig sees to it
    ours = cache.ladder, cache.tokenizer, cache.codebook_size
    if ours != (start.config.ladder, start.meta["tokenizer_sha256"], start.config.tokenizer.codebook_size):
        raise InputError(
            f"The token cache {cache.path} was written by another tokenizer than that of {config.init_from}; "
            "export it again with this one."
        )


def _checked(config: Any) -> TrainConfig:
    """A config from what `train` takes."""
    if isinstance(config, str | os.PathLike):
        return load(config)
    if isinstance(config, ml_collections.ConfigDict):
        config = from_config_dict(TrainConfig, config)
    if not isinstance(config, TrainConfig):
        raise InputError(f"config is {shown(config)}; expected a TrainConfig, a ConfigDict, or a file or name of one.")
    check_paths(config)
    return config
