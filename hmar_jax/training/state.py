"""state, batch → state: the jitted train step that all stages share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hmar_jax.config import TrainConfig
from hmar_jax.parallel.sharding import replicated, tree_shardings
from hmar_jax.params import Tree
from hmar_jax.training.objectives.base import Batch, Metrics, Objective, Parts, example_keys, start_names
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.weights_and_masks import Mean, joined
from hmar_jax.xla import COMPILER_OPTIONS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, and all that a checkpoint holds beside the position in the data.

    Attributes:
      step: int32, steps done. key: random key data, from the seed; a step folds its number in.
      params: trained, float32. ema: their moving average, but for a discriminator's, or empty. opt: of the optimizer.
      extra: state no gradient moves, such as the codebook's usage.
    """

    step: jax.Array
    key: jax.Array
    params: Tree
    ema: Tree
    opt: Any
    extra: Tree

    @classmethod
    def create(cls, config: TrainConfig, parts: Parts, optimizer: optax.GradientTransformation) -> TrainState:
        """The state at step 0."""
        # An initialiser's weak types would be gone after the first step, which would compile the second anew; a model
        # stored in bfloat16 trains in float32.
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts.trained)
        extra = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), parts.extra)
        ema = jax.tree.map(jnp.array, of_model(params)) if config.optimizer.ema else {}
        key = jax.random.key_data(jax.random.key(config.seed))
        return cls(jnp.zeros((), jnp.int32), key, params, ema, optimizer.init(params), extra)

    @property
    def best(self) -> Tree:
        """The averaged parameters where there are any, else the trained ones."""
        return self.ema or self.params


def optimizer_of(config: TrainConfig, params: Tree) -> optax.GradientTransformation:
    """The optimizer of a stage, for its trained parameters or their shapes."""
    start = config.tokenizer_loss.adversarial_start
    return make_optimizer(config.optimizer, config.steps, config.batch_size, params, start)


def initial_state(config: TrainConfig, parts: Parts, mesh: Mesh) -> TrainState:
    """The state at step 0, each array laid out on the mesh from the moment it exists."""
    create = functools.partial(TrainState.create, config, optimizer=optimizer_of(config, parts.trained))
    changing = parts._replace(frozen={})
    layout = tree_shardings(jax.eval_shape(create, changing), mesh)
    return jax.jit(create, out_shardings=layout)(changing)


def state_shapes(config: TrainConfig, objective: Objective, mesh: Mesh) -> tuple[TrainState, Tree]:
    """Shapes, dtypes and shardings of a stage's state and of its frozen parameters; nothing is read or computed."""

    def create(start: Tree) -> tuple[TrainState, Tree]:
        parts = objective.init(start, [])
        return TrainState.create(config, parts, optimizer_of(config, parts.trained)), parts.frozen

    shapes = jax.eval_shape(create, objective.start.abstract(start_names(objective)))
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def of_model(trained: Tree) -> Tree:
    """A tree by network without the discriminator, which is no part of the model."""
    return {name: tree for name, tree in trained.items() if name != "discriminator"}


def make_train_step(
    config: TrainConfig, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen parameters, batch) → (state, metrics); pure, to be jitted with the state donated."""

    def gradients(state: TrainState, frozen: Tree, batch: Batch, key: jax.Array) -> Any:
        parts = Parts(state.params, frozen, state.extra)
        grad = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, (metrics, seen)), grads = grad(state.params, parts, batch, key, state.step)
        return grads, {"loss": Mean(loss, jnp.float32(1))} | metrics, seen

    def whole(state: TrainState, frozen: Tree, batch: Batch, key: jax.Array) -> Any:
        """Gradients, metrics and what `after_update` wants to see of a batch."""
        grads, metrics, seen = gradients(state, frozen, batch, key)
        return grads, {name: m.value if isinstance(m, Mean) else m for name, m in metrics.items()}, seen

    def accumulated(state: TrainState, frozen: Tree, batch: Batch, key: jax.Array) -> Any:
        """As `whole`, from equal parts of the batch, worked off one after the other.

        The gradient of sum/count over the batch is the mean of the parts' gradients, weighted by their counts: a part's
        ratio of sums has the gradient sum_i'/count_i. Part i has examples i, i + parts, …: so each device's examples
        are spread over all parts, and none moves.
        """
        parts = config.accumulate
        batch = batch | {"keys": example_keys(key, config.batch_size)}
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(total: Any, part: Any) -> tuple[Any, Any]:
            batch, index = part
            grads, metrics, seen = gradients(state, frozen, batch, jax.random.fold_in(key, index))
            weight = metrics["loss"].weight
            return jax.tree.map(lambda t, g: t + weight * g, total, grads), (metrics, seen)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, (metrics, seen) = jax.lax.scan(one, zeros, (split, jnp.arange(parts)))
        weight = jnp.maximum(jnp.sum(metrics["loss"].weight), 1)
        mean = jax.tree.map(lambda x: x / weight, total)
        seen = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), seen)  # as the batch has it
        return mean, joined(metrics), seen

    def train_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        key, after_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step))
        run = whole if config.accumulate == 1 else accumulated
        grads, metrics, seen = run(state, frozen, batch, key)
        with jax.named_scope("optimizer"):  # as profiles call it
            updates, opt = optimizer.update(grads, state.opt, state.params)
            params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if config.optimizer.ema:  # follows closely at first: after n steps it reaches back over about n/9 of them
            decay = jnp.minimum(config.optimizer.ema, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, of_model(params))
        params, ema, extra, more = objective.after_update(params, ema, state.extra, seen, after_key, state.step)
        metrics |= more | {"gradient_norm": optax.tree.norm(of_model(grads))}
        if "discriminator" in grads:
            metrics["discriminator_gradient_norm"] = optax.tree.norm(grads["discriminator"])
        return TrainState(state.step + 1, state.key, params, ema, opt, extra), metrics

    return train_step


def jit_train_step(step: Callable[..., Any], state: TrainState, mesh: Mesh) -> Any:
    """What `make_train_step` gives, jitted for states like this one on `mesh`: donated, and laid out as they came."""
    # Without the layout of its result pinned, XLA chooses another, and compiles again for it.
    layout = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=layout, compiler_options=COMPILER_OPTIONS)
