"""train config, absent devices → its train step and its sampler, compiled for them.

The programs are those that `hmar-jax train` runs, of shapes instead of arrays: neither data nor weights are read. Where
`init_from` is not here, what its config would tell is taken from the train config: `sides` and `tokenizer`, and in
stage `masked` `transformer`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hmar_jax import params as trees
from hmar_jax.compile_check.topology import Topology
from hmar_jax.config import ModelConfig, TrainConfig
from hmar_jax.files import is_there, local_path
from hmar_jax.formats.model_directory import read_config
from hmar_jax.networks import held_dtypes, shapes_of
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree
from hmar_jax.sampling.program import Request, sample
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder
from hmar_jax.tokenizer import perceptual
from hmar_jax.training.objectives import Objective, Start, make_objective
from hmar_jax.training.objectives.base import uses_perceptual
from hmar_jax.training.state import TrainState, jit_train_step, make_train_step, optimizer_of, state_shapes

logger = logging.getLogger(__name__)


class Compiled(NamedTuple):
    """A program, or the compiler's refusal.

    Attributes:
      executable: None where it does not fit. seconds: that compiling took.
      needed: bytes of a device's memory, where the compiler refused for lack of it.
    """

    executable: Any | None
    seconds: float
    needed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """A stage on a mesh of absent devices: arrays are `ShapeDtypeStruct`s with shardings."""

    config: TrainConfig
    mesh: Mesh
    objective: Objective
    state: TrainState
    frozen: Tree

    @property
    def model(self) -> ModelConfig:
        return self.objective.model_config

    @property
    def ways(self) -> int:
        """Parts that a batch is split into."""
        return self.mesh.size // self.mesh.shape.get("tensor", 1)


def prepare(config: TrainConfig, topology: Topology) -> Setup:
    """The objective, and the state as training would make it.

    Raises:
      InputError: mesh, batch and topology do not go together.
    """
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    sharding.check_batch(config, mesh)
    objective = make_objective(config, (), absent_start(config))
    return Setup(config, mesh, objective, *state_shapes(config, objective, mesh))


def absent_start(config: TrainConfig) -> Start:
    """What a stage starts from, though weights need not be here: the config of the model, and all shapes."""
    model = start_model(config)
    lpips = _perceptual_shapes() if uses_perceptual(config) else {}
    return Start(model, {}, {**shapes_of(model), **lpips}, _absent)


def _absent(name: str) -> Any:
    raise LookupError(f"{name} is not read, since only its shape is known here.")


def _perceptual_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of LPIPS's parameters, laid out as `lpips_files.load_perceptual` does."""

    def turned(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[2:], shape[1], shape[0]) if name.startswith("features.") and len(shape) == 4 else shape

    return {f"perceptual.{name}": turned(name, shape) for name, shape in perceptual.file_shapes().items()}


def start_model(config: TrainConfig) -> ModelConfig:
    """The config of the model that a stage starts from: that in `init_from`; what `config` says, where it is not here.

    Raises:
      InputError: `init_from` is here, but is no model directory.
    """
    if config.init_from and is_there(start := local_path(config.init_from, "init_from"), "init_from"):
        return read_config(start)[0]
    if config.stage != "tokenizer" and config.init_from:
        what = "init_from=%s is not here; sides=%s and the tokenizer are taken from this config."
        logger.info(what, config.init_from, config.sides)
    transformer = config.transformer if config.stage == "masked" else None
    return ModelConfig(ScaleLadder(config.sides), config.tokenizer, transformer)


def lower_train_step(setup: Setup) -> jax.stages.Lowered:
    """The step that `hmar-jax train` jits: objective, optimizer and all, with the state donated."""
    config, mesh = setup.config, setup.mesh
    step = make_train_step(config, setup.objective, optimizer_of(config, setup.state.params))
    with jax.set_mesh(mesh):
        return jit_train_step(step, setup.state, mesh).lower(setup.state, setup.frozen, _batch(setup))


def lower_sampler(setup: Setup, batch: int) -> jax.stages.Lowered:
    """Label to picture in one program, with the config's schedule and the parameters laid out as in training."""
    held = held_dtypes(setup.model, setup.config.dtype)
    flat = trees.flatten(setup.objective.model_params(setup.state.best, setup.frozen))
    params = trees.unflatten({name: leaf.update(dtype=held.get(name, leaf.dtype)) for name, leaf in flat.items()})

    def shape(array: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    request = Request.of(setup.model, setup.config.dtype, schedule_of(setup), params, np.zeros(batch)).mapped(
        functools.partial(shape, where=sharding.batch_sharding(setup.mesh)),
        functools.partial(shape, where=sharding.replicated(setup.mesh)),
    )
    with jax.set_mesh(setup.mesh):
        return sample.lower(request)


def schedule_of(setup: Setup) -> Schedule:
    """The config's sample schedule."""
    transformer = setup.model.transformer
    assert transformer is not None
    return Schedule.parse(setup.config.sample_schedule, setup.model.ladder, transformer.depth)


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """The program for its devices, or the compiler's refusal for lack of memory; other errors are raised."""
    start = time.perf_counter()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error))
        if not needed:
            raise
        return Compiled(None, time.perf_counter() - start, needed)
    return Compiled(executable, time.perf_counter() - start)


def memory_needed(refusal: str) -> float:
    """Bytes out of a compiler's refusal for lack of memory; 0 where it refused for another reason."""
    if "RESOURCE_EXHAUSTED" not in refusal:
        return 0.0
    for form in (r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"):
        if found := re.search(form, refusal):
            return float(found[1]) * 2.0 ** (10 * " KMGT".index(found[2] or " "))
    return 0.0


def _batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the data pipeline gives it."""
    size, model, split = setup.config.batch_size, setup.model, sharding.batch_sharding(setup.mesh)
    label = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
    if setup.config.stage != "tokenizer":
        return {"tokens": jax.ShapeDtypeStruct((size, model.ladder.length), jnp.int32, sharding=split), "label": label}
    pixels = (size, model.image_size, model.image_size, 3)
    return {"image": jax.ShapeDtypeStruct(pixels, jnp.uint8, sharding=split), "label": label}
