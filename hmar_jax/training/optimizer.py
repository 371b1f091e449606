"""gradients → updates: AdamW with the published schedules and decay mask, one chain for each network trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from hmar_jax import params as trees
from hmar_jax.config import OptimizerConfig
from hmar_jax.params import Tree


def learning_rate(config: OptimizerConfig, steps: int, batch_size: int) -> optax.Schedule:
    """Warm-up, plateau, linear decay (VAR's schedule); a function of the step."""
    peak = config.base_lr * batch_size / 256
    warmup = max(round(config.warmup * steps), 1)
    flat = round(config.flat * (steps - warmup))
    return optax.join_schedules(
        [
            optax.linear_schedule(config.warmup_from * peak, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, config.final_lr * peak, max(steps - warmup - flat, 1)),
        ],
        [warmup, warmup + flat],
    )


def weight_decay(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Half a cosine from the first weight decay to the final one; a function of the step."""
    start, final = config.weight_decay, config.final_weight_decay
    return lambda step: final + (start - final) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / steps, 1)))


def decays(params: Tree) -> Tree:
    """Which parameters decay: kernels, the class embedding and the embedding of masked tokens.

    No bias, norm, position, level, scale or codebook does.
    """
    return trees.unflatten({n: n.endswith((".kernel", ".embedding", ".mask_embed")) for n in trees.flatten(params)})


def make_optimizer(
    config: OptimizerConfig, steps: int, batch_size: int, params: Tree, adversarial_start: int = 0
) -> optax.GradientTransformation:
    """AdamW for a tree of networks; each top-level entry is clipped and updated by itself.

    Args:
      steps: of the whole training.
      params: by network. That of `discriminator` is not touched before the step `adversarial_start`, and has its own
        schedules, warm-up and all, over the steps from there on.
    """

    def chain(steps: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
            optax.scale_by_adam(config.b1, config.b2),
            optax.add_decayed_weights(weight_decay(config, steps), decays),
            optax.scale_by_learning_rate(learning_rate(config, steps, batch_size)),
        )

    chains: dict[str, optax.GradientTransformation] = {name: chain(steps) for name in params}
    if "discriminator" in params:
        late = chain(max(steps - adversarial_start, 1))
        chains["discriminator"] = optax.conditionally_transform(late, lambda step: step >= adversarial_start)
    labels = {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}
    return optax.partition(chains, labels)
