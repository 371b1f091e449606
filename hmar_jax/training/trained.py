"""training state → Model: at the end of a run, or from the newest checkpoint of a work directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from hmar_jax.arrays import on_host
from hmar_jax.config import MeshConfig, TrainConfig
from hmar_jax.errors import InputError
from hmar_jax.files import is_there, local_path
from hmar_jax.formats.model_directory import About, sampling_of
from hmar_jax.model import Model
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree, flatten
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.objectives import Objective, Start, make_objective, open_start
from hmar_jax.training.state import TrainState, state_shapes


def trained_model(config: TrainConfig, objective: Objective, state: TrainState, frozen: Tree) -> Model:
    """The model that a state holds, with averaged parameters where there are any, all in host memory. It recommends the
    schedules of the model that the run started from where that is the same network.
    """  # fmt: skip
    model = Model(objective.model_config, jax.tree.map(on_host, objective.model_params(state.best, frozen)))
    run = f"stage {config.stage}, {int(state.step)} steps of {config.batch_size}, seed {config.seed}"
    licences = tuple(objective.start.meta.get("licences", ()))  # a start binds what comes of it
    model.about = About(source=f"trained by hmar-jax, {run}", licences=licences)
    if objective.start.config == model.config:  # another network, with a mask branch say, is sampled otherwise
        model.sampling = sampling_of(model.config, objective.start.meta)
    return model


def load_trained(workdir: Path, init_from: str = "") -> Model:
    """The model at the newest checkpoint of a work directory.

    Args:
      init_from: where the model that the run started from is now; by default where the run found it.

    Raises:
      InputError: there is no whole checkpoint, or the model that the run started from is not there.
    """
    workdir = local_path(workdir, "workdir")
    if not is_there(workdir / "checkpoints", "Folder"):
        raise InputError(f"{workdir} has no checkpoints; give the --workdir of a training run.")
    checkpoints = Checkpoints(workdir)
    if checkpoints.latest() is None:
        raise InputError(f"{workdir} has no whole checkpoint yet; train until the first is saved.")
    config, start = _open_start_again(checkpoints, init_from, workdir)
    objective = make_objective(config, tuple(checkpoints.position()["class_names"]), start)
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        like, frozen = state_shapes(config, objective, mesh)
        frozen = start.params(flatten(frozen))
    state, _ = checkpoints.restore(like)
    checkpoints.close()
    return trained_model(config, objective, state, frozen)


def _open_start_again(checkpoints: Checkpoints, init_from: str, workdir: Path) -> tuple[TrainConfig, Start]:
    """The config of the newest checkpoint, and the model that its run started from, known by its checksum."""
    config, checksum = checkpoints.config(), checkpoints.position()["start"]
    if init_from and not checksum:
        raise InputError(f"The run in {workdir} started from no model; leave --init-from={init_from} out.")
    # LPIPS's weights are no part of the model, and need not be here.
    loss = dataclasses.replace(config.tokenizer_loss, perceptual_weights="")
    config = dataclasses.replace(config, init_from=init_from or config.init_from, tokenizer_loss=loss)
    try:
        start = open_start(config)
        reason = "" if start.meta.get("sha256", "") == checksum else "its weights have another checksum"
    except InputError as error:
        reason = str(error).partition(";")[0].rstrip(".")
    if reason:
        raise InputError(
            f"{config.init_from} is not the model that the run in {workdir} started from ({reason}); give that model's "
            "directory as --init-from."
        )
    return config, start
