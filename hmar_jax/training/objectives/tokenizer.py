"""Stage `tokenizer`: pictures → pixel, VQ, perceptual and adversarial losses.

Axis letters: B batch, S pixels a side, K scales, Z latent channels, N queries of all scales of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import stop_gradient

from hmar_jax import params as trees
from hmar_jax.arrays import on_host
from hmar_jax.config import ModelConfig, TokenizerLossConfig, TrainConfig
from hmar_jax.errors import InputError
from hmar_jax.images import to_signed
from hmar_jax.networks import Networks, networks
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree
from hmar_jax.scales import ScaleLadder
from hmar_jax.tokenizer import codebook, losses, perceptual
from hmar_jax.training.objectives.base import Batch, Metrics, Parts, Start, fresh_params, uses_perceptual


class TokenizerObjective:
    """Pixels, VQ, perceptual and adversarial terms; the codebook is kept alive by k-means, revival and scale dropout.

    One scalar trains tokenizer and discriminator, each by its own terms (`losses.generator_terms`).
    """

    def __init__(self, config: TrainConfig, class_names: tuple[str, ...], start: Start):
        self.config, self.weights, self.start = config, config.tokenizer_loss, start
        self.model_config = ModelConfig(ScaleLadder(config.sides), config.tokenizer, None, class_names)
        self.reads = frozenset({"perceptual"})
        self.start_batches = self.weights.kmeans_batches
        if config.init_from and start.config is not None:
            _check_same_tokenizer(config, start.config)
            if start.config.ladder.num_scales == len(config.sides):  # each scale keeps the phi it was trained with
                self.model_config = dataclasses.replace(
                    self.model_config, tokenizer=start.config.tokenizer, phi_layout=start.config.phi_layout
                )
            self.reads |= {"tokenizer"}
            self.start_batches = 0
        off = "The perceptual term is off: tokenizer_loss.perceptual_weights names no file."
        self.notes = [] if uses_perceptual(config) else [off]

    def init(self, start: Tree, first: Sequence[Batch]) -> Parts:
        seed, size = self.config.seed, self.model_config.tokenizer.codebook_size
        trained = {"tokenizer": start.get("tokenizer") or fresh_params(self.model_config, seed, "tokenizer")}
        if first:
            queries = [on_host(self._queries(trained["tokenizer"], batch["image"])) for batch in first]
            codes = codebook.kmeans(jnp.concatenate(queries), size, jax.random.key(seed))
            trained = _with_codebook(trained, sharding.put("quantizer.codebook", np.asarray(codes)))
        if self.weights.adversarial:

            def create() -> Tree:
                module = _discriminator(self.weights, self.config.dtype, seed)
                return {"discriminator": nnx.to_pure_dict(nnx.state(module, nnx.Param))}

            trained |= jax.jit(create, out_shardings=sharding.shardings_in_use(jax.eval_shape(create)))()
        frozen = {name: start[name] for name in ("perceptual",) if name in start}
        return Parts(trained, frozen, {"usage": jnp.full((size,), 1 / size, jnp.float32)})

    @functools.partial(jax.jit, static_argnums=0)
    def _queries(self, params: Tree, images: jax.Array) -> jax.Array:
        """Latents at every scale's resolution (N,Z): stand-ins for residuals while there is no codebook yet."""
        tokenizer = self._networks(params).tokenizer
        latents = tokenizer.latents(to_signed(images))
        scales = range(self.model_config.ladder.num_scales)
        pooled = [tokenizer.quantizer.pool(latents, scale) for scale in scales]
        return jnp.concatenate(pooled, axis=1).reshape(-1, latents.shape[-1])

    def _networks(self, params: Tree) -> Networks:
        return networks(self.model_config, {"tokenizer": params}, self.config.dtype)

    def loss(self, trained: Tree, parts: Parts, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        images = to_signed(batch["image"])
        tokenizer = self._networks(trained["tokenizer"]).tokenizer
        latents = tokenizer.latents(images)
        quantized = tokenizer.quantizer.quantize(latents)
        fhats = jnp.cumsum(jnp.stack(quantized.lifts), axis=0)
        ladder = self.model_config.ladder
        kept = codebook.truncate_scales(key, images.shape[0], ladder.num_scales, self.weights.scale_dropout)
        chosen = fhats[kept - 1, jnp.arange(images.shape[0])]
        features = tokenizer.features(latents + stop_gradient(chosen - latents))
        reconstruction = tokenizer.render(features)
        adversary = None
        if "discriminator" in trained:
            kernel, constant = stop_gradient((tokenizer.decoder.conv_out.kernel[...], features))
            _, pull = jax.vjp(functools.partial(tokenizer.render, constant), kernel)
            adversary = losses.Adversary(self._discriminate, trained["discriminator"], lambda g: pull(g)[0], step)
        loss, metrics = losses.generator_terms(
            self.weights,
            reconstruction,
            images,
            latents,
            fhats,
            perceptual=_distance(parts.frozen),
            adversary=adversary,
        )
        metrics["codes_in_use"] = codebook.codes_in_use(
            quantized.tokens, ladder, self.model_config.tokenizer.codebook_size
        )
        return loss, (metrics, (quantized.tokens, quantized.queries))

    def measure(self, trained: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Metrics:
        images = to_signed(batch["image"])
        tokenizer = self._networks(trained["tokenizer"]).tokenizer
        latents = tokenizer.latents(images)
        quantized = tokenizer.quantizer.quantize(latents)
        fhats = jnp.cumsum(jnp.stack(quantized.lifts), axis=0)
        reconstruction = tokenizer.decode_latents(fhats[-1])
        loss, terms = losses.generator_terms(
            self.weights, reconstruction, images, latents, fhats, perceptual=_distance(frozen)
        )
        error = jnp.mean(jnp.square((reconstruction - images) / 2), axis=(1, 2, 3))
        return {**terms, "loss": loss, "psnr": jnp.mean(-10 * jnp.log10(error))}

    def _discriminate(self, params: Tree, images: jax.Array) -> jax.Array:
        module = nnx.eval_shape(lambda: _discriminator(self.weights, self.config.dtype, 0))
        graphdef, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(images)

    def after_update(self, trained: Tree, ema: Tree, extra: Tree, seen: Any, key: jax.Array, step: jax.Array) -> Any:
        tokens, queries = seen
        usage = codebook.update_usage(extra["usage"], tokens, self.weights.usage_decay)
        before = trained["tokenizer"]["quantizer"]["codebook"]
        vectors, below = queries.reshape(-1, queries.shape[-1]), self.weights.dead_below
        codes, usage, revived = jax.lax.cond(
            (step + 1) % self.weights.revive_every == 0,
            lambda: codebook.revive_dead_codes(before, usage, vectors, key, dead_below=below),
            lambda: (before, usage, jnp.int32(0)),
        )
        if ema:  # a code that moved has no past to be averaged with
            averaged = ema["tokenizer"]["quantizer"]["codebook"]
            moved = jnp.any(codes != before, axis=-1, keepdims=True)
            ema = _with_codebook(ema, jnp.where(moved, codes, averaged))
        return _with_codebook(trained, codes), ema, {"usage": usage}, {"codes_revived": revived}

    def model_params(self, trained: Tree, frozen: Tree) -> Tree:
        return {"tokenizer": trained["tokenizer"]}


def _check_same_tokenizer(config: TrainConfig, start: ModelConfig) -> None:
    """Raises InputError where the tokenizer of `init_from` has other parameters; `sides` have none.

    An empty `phi_of_scale` takes that of `init_from`.
    """
    theirs, ours = (dataclasses.asdict(tokenizer) for tokenizer in (start.tokenizer, config.tokenizer))
    if not config.tokenizer.phi_of_scale:
        del theirs["phi_of_scale"]
    if other := [f"tokenizer.{name}={value}" for name, value in theirs.items() if value != ours[name]]:
        raise InputError(
            f"init_from={config.init_from} has {', '.join(other)}, unlike this config; set the config to that, or "
            "leave init_from out."
        )


def _distance(frozen: Tree) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """LPIPS by its frozen parameters; None where the loss has no perceptual term."""
    if "perceptual" not in frozen:
        return None
    return functools.partial(perceptual.perceptual_distance, trees.flatten(frozen["perceptual"]))


def _with_codebook(params: Tree, codes: jax.Array) -> Tree:
    return trees.merge(params, {"tokenizer": {"quantizer": {"codebook": codes}}})


def _discriminator(weights: TokenizerLossConfig, dtype: str, seed: int) -> losses.Discriminator:
    return losses.Discriminator(
        weights.discriminator_channels, weights.discriminator_layers, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)
    )
