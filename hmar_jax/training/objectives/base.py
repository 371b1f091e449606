"""What the objectives of all stages share: their protocol, and what they start from.

init_from, LPIPS's file ─open_start→ Start ─params→ parameters, first batches ─Objective.init→ Parts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, TrainConfig
from hmar_jax.formats import lpips_files
from hmar_jax.formats.model_directory import open_model
from hmar_jax.networks import init_params, shapes_of
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree
from hmar_jax.training.weights_and_masks import Mean

Metrics = dict[str, jax.Array | Mean]
Batch = dict[str, jax.Array]


class Parts(NamedTuple):
    """The arrays of a stage: parameters it trains, parameters it only reads, and state that no gradient moves."""

    trained: Tree
    frozen: Tree
    extra: Tree


class Start(NamedTuple):
    """What a stage starts from, opened once in a run: the model in `init_from`, and LPIPS's weights.

    Attributes:
      config: the model's; None where `init_from` is empty. meta: all of its `config.json`, or {}.
      shapes: of all parameters, by dotted name; names of LPIPS's begin with `perceptual.`.
      read: the dotted name of a parameter → that array.
    """

    config: ModelConfig | None
    meta: dict[str, Any]
    shapes: trees.Shapes
    read: Callable[[str], ArrayLike]

    def params(self, names: Iterable[str]) -> Tree:
        """The parameters of these dotted names, laid out on the mesh in use, if any."""
        return trees.unflatten({name: sharding.put(name, self.read(name)) for name in names})

    def abstract(self, names: Iterable[str]) -> Tree:
        """As `params`, but shapes alone, of float32; nothing is read."""
        return trees.unflatten({name: jax.ShapeDtypeStruct(self.shapes[name], jnp.float32) for name in names})


def open_start(config: TrainConfig) -> Start:
    """Opens the model in `init_from`, a directory or hub id, and reads LPIPS's weights where the stage uses them."""
    perceptual: Mapping[str, jax.Array] = {}
    if uses_perceptual(config):
        lpips = lpips_files.load_perceptual(config.tokenizer_loss.perceptual_weights)
        perceptual = {f"perceptual.{name}": leaf for name, leaf in lpips.items()}
    shapes = {name: leaf.shape for name, leaf in perceptual.items()}
    if not config.init_from:
        return Start(None, {}, shapes, perceptual.__getitem__)
    model, meta, file = open_model(config.init_from)

    def read(name: str) -> ArrayLike:
        return perceptual[name] if name in perceptual else file.read(name)

    return Start(model, meta, {**shapes, **shapes_of(model)}, read)


def uses_perceptual(config: TrainConfig) -> bool:
    """Whether a stage's loss has the perceptual term."""
    loss = config.tokenizer_loss
    return config.stage == "tokenizer" and bool(loss.perceptual and loss.perceptual_weights)


class Objective(Protocol):
    """One training stage.

    Attributes:
      model_config: what `model_params` are the parameters of.
      start: what the stage starts from. reads: what of it `init` takes: `tokenizer`, `transformer`, `perceptual`.
      start_batches: batches of data that `init` takes.
      notes: sentences, each on what the config leaves out or takes from `init_from`, for the log of a training.
    """

    model_config: ModelConfig
    start: Start
    reads: frozenset[str]
    start_batches: int
    notes: list[str]

    def init(self, start: Tree, first: Sequence[Batch]) -> Parts:
        """The parts at step 0, laid out on the mesh in use, if any. With no batches it may be traced.

        Args:
          start: the parameters of `start` that `start_names` lists; those that stay frozen are passed on as they are.
          first: `start_batches` batches of data.
        """

    def loss(self, trained: Tree, parts: Parts, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        """The scalar to minimise over `trained`, and (metrics, what `after_update` wants to see of the batch).

        Parts of a batch are alike but for what is a `Mean` among the metrics, and for the loss itself where `loss` is a
        `Mean` there: these are joined by their weights.

        Args:
          batch: as the data has it; of a part of a batch also `keys`, see `example_keys`.
        """

    def measure(self, trained: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Metrics:
        """The loss as `loss`, and its terms, of examples that are not trained on: no dropout of any kind, no adversary.

        Args:
          key: for what a loss is a mean over, such as masks; the same key gives the same result.
        """

    def after_update(self, trained: Tree, ema: Tree, extra: Tree, seen: Any, key: jax.Array, step: jax.Array) -> Any:
        """What follows a step without a gradient: → trained, ema, extra, metrics."""

    def model_params(self, trained: Tree, frozen: Tree) -> Tree:
        """The parameters of a whole model, as `Model` takes them."""


def start_names(objective: Objective) -> list[str]:
    """The dotted names of those parameters of an objective's start that its `init` takes."""
    return [name for name in objective.start.shapes if name.partition(".")[0] in objective.reads]


def initial_parts(objective: Objective, first: Sequence[Batch] = ()) -> Parts:
    """The parts at step 0; reads what they take of the objective's start."""
    return objective.init(objective.start.params(start_names(objective)), first)


def fresh_params(config: ModelConfig, seed: int, only: str) -> Tree:
    """The parameters of one network, `tokenizer` or `transformer`, initialised, laid out on the mesh in use, if any."""
    return init_params(config, seed, only, sharding.shardings_in_use)


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """(count,2) keys, two for each example of a batch whose loss gets `key`."""
    return jax.random.split(jax.random.fold_in(key, 1), (count, 2))
