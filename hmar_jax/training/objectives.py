"""parameters, batch → loss: one objective for each training stage, all with the same methods (`Objective`).

Axis letters: B batch, S pixels a side, L tokens, K scales, V codebook, Z latent channels.

(Over 400 lines: the three stages stand side by side, and the two of the transformer share most of what they do.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import stop_gradient

from hmar_jax import params as trees
from hmar_jax.arrays import on_host
from hmar_jax.config import ModelConfig, TokenizerLossConfig, TrainConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.formats import lpips_files
from hmar_jax.formats.model_directory import open_model, read_params
from hmar_jax.images import to_signed
from hmar_jax.networks import Networks, init_params, networks
from hmar_jax.parallel import sharding
from hmar_jax.params import Tree
from hmar_jax.scales import ScaleLadder
from hmar_jax.tokenizer import codebook, losses, perceptual
from hmar_jax.training.classes import check_same_classes
from hmar_jax.training.weights_and_masks import Mean, per_scale, random_masks, scale_weights
from hmar_jax.transformer import teacher_forcing
from hmar_jax.transformer.fused import Scores, scores_of

Metrics = dict[str, jax.Array | Mean]
Batch = dict[str, jax.Array]


class Parts(NamedTuple):
    """What a stage starts from: parameters it trains, parameters it only reads, and state no gradient moves."""

    trained: Tree
    frozen: Tree
    extra: Tree


class Objective(Protocol):
    """One training stage.

    Attributes:
      model_config: what `model_params` are the parameters of. start_batches: batches of data that `init` wants.
      start: the model in `init_from`, None where the stage starts from nothing.
      notes: sentences, each on what the config leaves out or takes from `init_from`, for the log of a training.
    """

    model_config: ModelConfig
    start: Start | None
    start_batches: int
    notes: list[str]

    def init(self, first: list[Batch]) -> Parts:
        """The state at step 0 from `start_batches` batches of data, laid out on the mesh in use, if any."""

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


class Start(NamedTuple):
    """The model in `init_from`, opened once in a run.

    Attributes:
      config: its config. meta: all of its `config.json`.
      read: the name of a network, or "" for both → its parameters, laid out on the mesh in use, if any.
    """

    config: ModelConfig
    meta: dict[str, Any]
    read: Callable[[str], Tree]


def open_start(config: TrainConfig) -> Start | None:
    """Opens the model in `init_from`, a directory or hub id; None where that is empty."""
    if not config.init_from:
        return None
    opened = open_model(config.init_from)
    return Start(opened.config, opened.meta, lambda only: read_params(opened, only, sharding.put))


def unjudged(config: TrainConfig) -> TrainConfig:
    """The config without LPIPS, whose weights then need not be here."""
    return dataclasses.replace(config, tokenizer_loss=dataclasses.replace(config.tokenizer_loss, perceptual_weights=""))


# ---------------------------------------------------------------------------------------------- stage `tokenizer`


class TokenizerObjective:
    """Pixels, VQ, perceptual and adversarial terms; the codebook is kept alive by k-means, revival and scale dropout.

    One scalar trains tokenizer and discriminator, each by its own terms (`losses.generator_terms`).

    Args:
      start: the model in `init_from`; opened when None.
      judge: LPIPS's parameters, or their shapes; read from `tokenizer_loss.perceptual_weights` when None.
    """

    def __init__(
        self,
        config: TrainConfig,
        class_names: tuple[str, ...],
        start: Start | None = None,
        judge: Tree | None = None,
    ):
        self.config, self.weights = config, config.tokenizer_loss
        self.model_config = ModelConfig(ScaleLadder(config.sides), config.tokenizer, None, class_names)
        self.start = start or open_start(config)
        if config.init_from and self.start is not None:
            before = self.start.config
            _check_same_tokenizer(config, before)
            if before.ladder.num_scales == len(config.sides):  # each scale keeps the phi that it was trained with
                self.model_config = dataclasses.replace(
                    self.model_config, tokenizer=before.tokenizer, phi_layout=before.phi_layout
                )
        self.start_batches = 0 if config.init_from else self.weights.kmeans_batches
        self._perceptual = judge
        if self._perceptual is None and self.weights.perceptual and self.weights.perceptual_weights:
            self._perceptual = lpips_files.load_perceptual(self.weights.perceptual_weights)
        off = "The perceptual term is off: tokenizer_loss.perceptual_weights names no file."
        self.notes = [off] if self._perceptual is None else []

    def init(self, first: list[Batch]) -> Parts:
        seed, weights = self.config.seed, self.weights
        if self.config.init_from and self.start is not None:
            params = self.start.read("tokenizer")["tokenizer"]
        else:
            params = init_params(self.model_config, seed, "tokenizer", sharding.shardings_in_use)
        if first:
            queries = [on_host(self._queries(params, batch["image"])) for batch in first]
            size = self.model_config.tokenizer.codebook_size
            codes = codebook.kmeans(jnp.concatenate(queries), size, jax.random.key(seed))
            params["quantizer"]["codebook"] = sharding.put("quantizer.codebook", np.asarray(codes))
        trained = {"tokenizer": params}
        if weights.adversarial:

            def create() -> Tree:
                module = _discriminator(weights, self.config.dtype, seed)
                return {"discriminator": nnx.to_pure_dict(nnx.state(module, nnx.Param))}

            trained |= jax.jit(create, out_shardings=sharding.shardings_in_use(jax.eval_shape(create)))()
        size = self.model_config.tokenizer.codebook_size
        frozen = {}
        if self._perceptual is not None:
            placed = {name: sharding.put(f"perceptual.{name}", leaf) for name, leaf in self._perceptual.items()}
            frozen["perceptual"] = placed
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
        distance = None
        if self._perceptual is not None:
            distance = functools.partial(perceptual.perceptual_distance, parts.frozen["perceptual"])
        adversary = None
        if "discriminator" in trained:
            kernel, constant = stop_gradient((tokenizer.decoder.conv_out.kernel[...], features))
            _, pull = jax.vjp(functools.partial(tokenizer.render, constant), kernel)
            adversary = losses.Adversary(self._discriminate, trained["discriminator"], lambda g: pull(g)[0], step)
        loss, metrics = losses.generator_terms(
            self.weights, reconstruction, images, latents, fhats, perceptual=distance, adversary=adversary
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
        distance = None
        if self._perceptual is not None:
            distance = functools.partial(perceptual.perceptual_distance, frozen["perceptual"])
        reconstruction = tokenizer.decode_latents(fhats[-1])
        loss, terms = losses.generator_terms(self.weights, reconstruction, images, latents, fhats, perceptual=distance)
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


def _with_codebook(params: Tree, codes: jax.Array) -> Tree:
    return trees.merge(params, {"tokenizer": {"quantizer": {"codebook": codes}}})


def _discriminator(weights: TokenizerLossConfig, dtype: str, seed: int) -> losses.Discriminator:
    return losses.Discriminator(
        weights.discriminator_channels, weights.discriminator_layers, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)
    )


# ------------------------------------------------------------------------- stages `next_scale` and `masked`


class _TransformerObjective:
    """What both transformer stages share: the model they start from, class dropout, metrics per scale.

    Args:
      start: the model in `init_from`; opened when None.
    """

    start_batches = 0

    def __init__(self, config: TrainConfig, class_names: tuple[str, ...], start: Start | None = None):
        self.config = config
        self.notes: list[str] = []
        opened = start or open_start(config)
        assert opened is not None  # TrainConfig sees to it
        self.start = opened
        self.model_config = self._model_config(opened.config, class_names)
        assert self.model_config.transformer is not None

    def _model_config(self, start: ModelConfig, class_names: tuple[str, ...]) -> ModelConfig:
        raise NotImplementedError

    def _networks(self, trained: Tree, frozen: Tree) -> Networks:
        params = self.model_params(trained, frozen)
        return networks(self.model_config, params, self.config.dtype, self.config.remat, self.config.scan_layers)

    def _drop_classes(self, labels: jax.Array, keys: jax.Array) -> jax.Array:
        transformer = self.model_config.transformer
        assert transformer is not None
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, transformer.class_dropout))(keys)
        return jnp.where(dropped, transformer.num_classes, labels)

    def _metrics(self, scores: Scores, counted: jax.Array) -> Metrics:
        """Mean cross-entropy and accuracy in each scale, and accuracy in all, over the counted tokens (B,L) float."""
        entropy, correct = scores
        ladder = self.model_config.ladder
        return {
            "scale_loss": per_scale(entropy, counted, ladder),
            "scale_accuracy": per_scale(correct, counted, ladder),
            "accuracy": Mean.of(correct, counted),
        }

    def after_update(self, trained: Tree, ema: Tree, extra: Tree, seen: Any, key: jax.Array, step: jax.Array) -> Any:
        return trained, ema, extra, {}

    def model_params(self, trained: Tree, frozen: Tree) -> Tree:
        return trees.merge(frozen, trained)


class NextScaleObjective(_TransformerObjective):
    """Stage 1: weighted cross-entropy of every token given the coarser scales.

    It goes on from the transformer in `init_from` where that has one of the same network, for any classes.
    """

    def _model_config(self, start: ModelConfig, class_names: tuple[str, ...]) -> ModelConfig:
        transformer = dataclasses.replace(self.config.transformer, masked=False)
        _check_class_count(class_names, transformer)
        self._goes_on = start.transformer is not None and _same_network(start.transformer, transformer)
        if self._goes_on:
            anew = "" if start.num_classes == transformer.num_classes else " but for its class embeddings"
            self.notes = [f"Training goes on from the transformer in {self.config.init_from}{anew}."]
        elif start.transformer is not None:
            self.notes = [f"The transformer in {self.config.init_from} is another network; only its tokenizer is used."]
        return dataclasses.replace(start, transformer=transformer, class_names=class_names)

    def init(self, first: list[Batch]) -> Parts:
        start = self.start.read("" if self._goes_on else "tokenizer")
        transformer = init_params(self.model_config, self.config.seed, "transformer", sharding.shardings_in_use)
        if self._goes_on:
            fresh, known = trees.flatten(transformer), trees.flatten(start["transformer"])
            # Of the same shape is all but the embeddings of another number of classes.
            same = {name: known[name] for name, leaf in fresh.items() if known[name].shape == leaf.shape}
            transformer = trees.unflatten(fresh | same)
        return Parts({"transformer": transformer}, {"tokenizer": start["tokenizer"]}, {})

    def loss(self, trained: Tree, parts: Parts, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        nets, tokens = self._networks(trained, parts.frozen), batch["tokens"]
        key, class_keys, _ = _keys(batch, key)
        labels = self._drop_classes(batch["label"], class_keys)
        quantizer = nets.tokenizer.quantizer
        scores = teacher_forcing.predict(nets.transformer, quantizer, labels, tokens, scores_of(tokens), key=key)
        weights = scale_weights(self.model_config.ladder, self.config.objective.scale_weights)
        metrics = self._metrics(scores, jnp.ones(tokens.shape))
        return jnp.mean(jnp.sum(scores.entropy * weights, axis=1)), (metrics, ())

    def measure(self, trained: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Metrics:
        nets, tokens = self._networks(trained, frozen), batch["tokens"]
        scores = teacher_forcing.predict(
            nets.transformer, nets.tokenizer.quantizer, batch["label"], tokens, scores_of(tokens)
        )
        weights = scale_weights(self.model_config.ladder, self.config.objective.scale_weights)
        loss = jnp.mean(jnp.sum(scores.entropy * weights, axis=1))
        return self._metrics(scores, jnp.ones(tokens.shape)) | {"loss": loss}


class MaskedObjective(_TransformerObjective):
    """Stage 2: mean cross-entropy over masked positions; trains the mask branch and mask_embed, all else is frozen."""

    def _model_config(self, start: ModelConfig, class_names: tuple[str, ...]) -> ModelConfig:
        if start.transformer is None or start.transformer.is_var:
            raise InputError(
                f"init_from={self.config.init_from} has no next-scale transformer with block-diagonal attention, which "
                "stage 'masked' starts from; give the model directory of a finished next_scale stage."
            )
        check_same_classes(
            ("The token cache", class_names),
            (f"init_from={self.config.init_from}", start.class_names),
            "whose class embeddings are trained in that order; export the tokens again from folders of those names",
        )
        _check_class_count(class_names, start.transformer)
        transformer = dataclasses.replace(start.transformer, masked=True, leak_free=self.config.objective.leak_free)
        return dataclasses.replace(start, transformer=transformer, class_names=class_names or start.class_names)

    def init(self, first: list[Batch]) -> Parts:
        params = dict(self.start.read(""))
        if "masked" not in params["transformer"]:  # the branch starts as a copy of the next-scale one
            fresh = init_params(self.model_config, self.config.seed, "transformer", sharding.shardings_in_use)
            branch = jax.tree.map(jnp.array, params["transformer"]["next_scale"])
            params["transformer"] = params["transformer"] | {"masked": branch, "mask_embed": fresh["mask_embed"]}
        return Parts(*trees.partition(params, _is_mask_branch), {})

    def loss(self, trained: Tree, parts: Parts, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        nets, tokens = self._networks(trained, parts.frozen), batch["tokens"]
        ladder, objective = self.model_config.ladder, self.config.objective
        key, class_keys, mask_keys = _keys(batch, key)
        labels = self._drop_classes(batch["label"], class_keys)
        if objective.per_sample_masks:
            masked = jax.vmap(lambda key: random_masks(key, ladder))(mask_keys)
        else:
            # One mask for the whole batch, also where it is worked off in parts, whose `key` differs: see
            # `ObjectiveConfig.per_sample_masks`.
            step_key = jax.random.fold_in(jax.random.key(self.config.seed + 1), step)
            masked = jnp.broadcast_to(random_masks(step_key, ladder), tokens.shape)
        scores = teacher_forcing.predict(
            nets.transformer,
            nets.tokenizer.quantizer,
            labels,
            tokens,
            scores_of(tokens),
            masked,
            key,
            leak_free=objective.leak_free,
        )
        counted = masked.astype(jnp.float32)
        loss = Mean.of(scores.entropy, counted)
        return loss.value, (self._metrics(scores, counted) | {"masked_share": jnp.mean(counted), "loss": loss}, ())

    def measure(self, trained: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Metrics:
        nets, tokens = self._networks(trained, frozen), batch["tokens"]
        keys = jax.random.split(key, tokens.shape[0])  # ratios of all sizes in every batch
        masked = jax.vmap(lambda key: random_masks(key, self.model_config.ladder))(keys)
        scores = teacher_forcing.predict(
            nets.transformer,
            nets.tokenizer.quantizer,
            batch["label"],
            tokens,
            scores_of(tokens),
            masked,
            leak_free=self.config.objective.leak_free,
        )
        counted = masked.astype(jnp.float32)
        return self._metrics(scores, counted) | {"loss": Mean.of(scores.entropy, counted)}


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """(count,2) keys, two for each example of a batch whose loss gets `key`."""
    return jax.random.split(jax.random.fold_in(key, 1), (count, 2))


def _keys(batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A key for what is drawn once, and twice keys (B,) for what each example draws by itself.

    A part of a batch comes with its examples' keys, so that these draws are the same in parts of any number.
    """
    keys = batch["keys"] if "keys" in batch else example_keys(key, batch["label"].shape[0])
    return jax.random.fold_in(key, 0), keys[:, 0], keys[:, 1]


def _check_class_count(class_names: tuple[str, ...], transformer: TransformerConfig) -> None:
    """Raises InputError where a token cache has another number of classes than the transformer."""
    if len(class_names) not in (0, transformer.num_classes):
        raise InputError(
            f"The token cache has {len(class_names)} classes, but transformer.num_classes is "
            f"{transformer.num_classes}; set it to {len(class_names)}."
        )


def _same_network(start: TransformerConfig, wanted: TransformerConfig) -> bool:
    """Whether one can go on as the other: they differ in nothing but classes, mask branch and how they are trained."""
    free = ("num_classes", "masked", "leak_free", "class_dropout", "drop_path", "gate_init")
    return dataclasses.replace(start, **{name: getattr(wanted, name) for name in free}) == wanted


def _is_mask_branch(name: str) -> bool:
    return name.startswith(("transformer.masked.", "transformer.mask_embed"))


OBJECTIVES: dict[str, Any] = {
    "tokenizer": TokenizerObjective,
    "next_scale": NextScaleObjective,
    "masked": MaskedObjective,
}
