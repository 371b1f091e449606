"""config + parameters → Model: tokenizer, transformer and sampler behind one object, all of it jitted.

Axis letters: B batch, S pixels a side, L tokens, N tokens of one scale, V codebook.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from hmar_jax.config import ModelConfig
from hmar_jax.errors import InputError
from hmar_jax.networks import networks
from hmar_jax.sampling import program
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.transformer import teacher_forcing
from hmar_jax.transformer.hmar import HMAR


class DrawRecord(NamedTuple):
    """One pass as `Sample.draws` lists it: scale and step from 0; tokens, masked (B,N), masked where it decides."""

    scale: int
    step: int
    tokens: np.ndarray
    masked: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sample:
    """What `Model.sample` gives.

    Attributes:
      images: (B,S,S,3) float32 in [0,1]. tokens: (B,L) int32, final.
      draws: with `record=True` every pass's draw, in order; else None.
    """

    images: np.ndarray
    tokens: np.ndarray
    draws: list[DrawRecord] | None = None


class TokenizerDoor:
    """image ⇄ tokens of a `Model`."""

    def __init__(self, config: ModelConfig, params: Any, dtype: str):
        self._config, self._params, self._dtype = config, params, dtype

    def encode(self, images: ArrayLike) -> jax.Array:
        """(B,S,S,3) float in [-1,1] → (B,L) int32."""
        pictures = jnp.asarray(images, jnp.float32)
        size = self._config.image_size
        if pictures.ndim != 4 or pictures.shape[1:] != (size, size, 3):
            raise InputError(f"Images are {pictures.shape}; this model takes (B, {size}, {size}, 3) in [-1, 1].")
        return _encode(self._config, self._dtype, self._params, pictures)

    def decode(self, tokens: ArrayLike) -> jax.Array:
        """(B,L) int → (B,S,S,3) float32 in [-1,1]."""
        return _decode(self._config, self._dtype, self._params, check_tokens(self._config, tokens))

    def growth(self, tokens: ArrayLike) -> jax.Array:
        """The picture after each scale: (B,L) int → (K,B,S,S,3) float32 in [-1,1]; the last is `decode`'s."""
        return _growth(self._config, self._dtype, self._params, check_tokens(self._config, tokens))


class Model:
    """A tokenizer with or without a transformer, ready to use.

    Attributes:
      config: what it is.
      params: nested dicts of float32 arrays (or bfloat16, if stored so), `tokenizer` and perhaps `transformer`.
      tokenizer: `encode` and `decode`. transformer: the HMAR or VAR module, None in a tokenizer's model directory.
    """

    def __init__(self, config: ModelConfig, params: dict[str, Any], dtype: str = "float32"):
        self.config, self.params, self.dtype = config, params, dtype
        self.tokenizer = TokenizerDoor(config, params, dtype)

    @property
    def transformer(self) -> HMAR | None:
        return networks(self.config, self.params, self.dtype).transformer if self.config.transformer else None

    def next_scale_logits(self, labels: ArrayLike, tokens: ArrayLike) -> jax.Array:
        """Teacher-forced logits: labels (B,) in [0, num_classes] (the last is the null class), tokens (B,L) →
        (B,L,V) float32; no class dropout.
        """  # fmt: skip
        labels, tokens = self._check(labels, tokens)
        return _next_scale_logits(self.config, self.dtype, self.params, labels, tokens)

    def masked_logits(self, labels: ArrayLike, tokens: ArrayLike, masked: ArrayLike) -> jax.Array:
        """Logits of the mask branch: as `next_scale_logits`, with masked (B,L) bool → (B,L,V) float32."""
        labels, tokens = self._check(labels, tokens)
        masked = jnp.asarray(masked)
        if masked.dtype != bool or masked.shape != tokens.shape:
            raise InputError(f"masked is {masked.dtype} {masked.shape}; expected bool {tokens.shape}, as the tokens.")
        self._check_mask_branch("masked_logits")
        return _masked_logits(self.config, self.dtype, self.params, labels, tokens, masked)

    def sample(
        self,
        labels: ArrayLike,
        schedule: str | Schedule = "next-scale",
        *,
        cfg: Any = None,
        temperature: Any = None,
        top_k: Any = None,
        top_p: Any = None,
        noise: Any = None,
        seed: int = 0,
        numbers: ArrayLike | None = None,
        greedy: bool = False,
        record: bool = False,
    ) -> Sample:
        """Samples pictures; each depends on (seed, its number, its label) alone, whatever the batch and the devices.

        Args:
          labels: (B,) int in [0, num_classes).
          schedule: a `Schedule` or the name of a preset; names bring the published guidance of the model's depth.
          cfg, temperature, top_k, top_p, noise: override the schedule's, as in `Schedule.from_counts`; changing them
            compiles nothing, unless guidance appears or vanishes in a pass.
          seed: of the random numbers. numbers: (B,) int in [0, 2³²), which of the seed's samples each is; 0 to B-1 by
            default. greedy: argmax of the guided logits, no filters.
          record: give every pass's draw.
        """
        labels, _ = self._check(labels, classes=self.config.num_classes - 1)
        assert self.config.transformer is not None
        if isinstance(schedule, str):
            schedule = Schedule.preset(schedule, self.config.ladder, self.config.transformer.depth)
        schedule = schedule.replace(cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p, noise=noise)
        schedule.check_ladder(self.config.ladder)
        if schedule.has_masked_steps:
            self._check_mask_branch("A schedule with masked steps")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed is {seed}; expected 0 to {2**32 - 1}.")
        number = labels.shape[0]
        numbers = np.arange(number, dtype=np.uint32) if numbers is None else _check_numbers(numbers, number)
        options = program.Options(self.config, self.dtype, schedule.plan, greedy, record)
        mesh = _mesh()
        with jax.set_mesh(mesh):
            spread = [_over_devices(array, mesh) for array in (labels, numbers)]
            images, tokens, draws = program.sample(options, self.params, *spread, schedule.controls, np.uint32(seed))
        records = None
        if record:
            passes = [at for scale in range(len(schedule.counts)) for at in schedule.plan.passes(scale)]
            records = [
                DrawRecord(at.scale, at.step, on_host(draw.tokens)[:number], on_host(draw.masked)[:number])
                for at, draw in zip(passes, draws, strict=True)
            ]
        return Sample(on_host(images)[:number], on_host(tokens)[:number], records)

    def _check(
        self, labels: ArrayLike, tokens: ArrayLike | None = None, classes: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Labels, and tokens if any, as int32; labels may go up to `classes`, by default the null class."""
        if self.config.transformer is None:
            raise InputError("This model is a tokenizer alone; give a model directory that has a transformer.")
        labels = np.asarray(labels)
        highest = self.config.num_classes if classes is None else classes
        if labels.ndim != 1 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"Labels are {labels!r}; expected a list of integers from 0 to {highest}.")
        if labels.min() < 0 or labels.max() > highest:
            wrong = labels[(labels < 0) | (labels > highest)][0]
            raise InputError(
                f"Label {wrong} is out of range; this model has classes 0 to {self.config.num_classes - 1}."
            )
        checked = jnp.zeros((0,), jnp.int32) if tokens is None else check_tokens(self.config, tokens)
        if tokens is not None and checked.shape[0] != labels.shape[0]:
            raise InputError(f"There are {labels.shape[0]} labels but tokens of {checked.shape[0]} pictures.")
        return jnp.asarray(labels, jnp.int32), checked

    def _check_mask_branch(self, what: str) -> None:
        if not (self.config.transformer and self.config.transformer.masked):
            raise InputError(
                f"{what} needs a mask branch, which this model has not; train stage `masked`, or use 'next-scale'."
            )


def check_tokens(config: ModelConfig, tokens: ArrayLike) -> jax.Array:
    """Tokens as int32, or InputError where they are not (B,L) in [0,V)."""
    tokens = np.asarray(tokens)
    length, size = config.ladder.length, config.tokenizer.codebook_size
    if tokens.ndim != 2 or tokens.shape[1] != length or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"Tokens are {tokens.dtype} {tokens.shape}; this model's ladder has integers (B, {length}).")
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < size):
        raise InputError(f"Tokens range from {tokens.min()} to {tokens.max()}; the codebook has 0 to {size - 1}.")
    return jnp.asarray(tokens, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config: ModelConfig, dtype: str, params: Any, images: jax.Array) -> jax.Array:
    return networks(config, params, dtype).tokenizer.encode(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config: ModelConfig, dtype: str, params: Any, tokens: jax.Array) -> jax.Array:
    return networks(config, params, dtype).tokenizer.decode(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _growth(config: ModelConfig, dtype: str, params: Any, tokens: jax.Array) -> jax.Array:
    tokenizer = networks(config, params, dtype).tokenizer
    return jax.lax.map(tokenizer.decode_latents, tokenizer.quantizer.reconstruct(tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_scale_logits(config: ModelConfig, dtype: str, params: Any, labels: jax.Array, tokens: jax.Array) -> jax.Array:
    nets = networks(config, params, dtype)
    return teacher_forcing.next_scale_logits(nets.transformer, nets.tokenizer.quantizer, labels, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _masked_logits(
    config: ModelConfig, dtype: str, params: Any, labels: jax.Array, tokens: jax.Array, masked: jax.Array
) -> jax.Array:
    nets = networks(config, params, dtype)
    leak_free = config.transformer is not None and config.transformer.leak_free
    return teacher_forcing.masked_logits(
        nets.transformer, nets.tokenizer.quantizer, labels, tokens, masked, leak_free=leak_free
    )


def on_host(array: jax.Array) -> np.ndarray:
    """The whole of an array; where other processes hold parts of it, all of them must ask for it together."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def _mesh() -> Mesh:
    """The mesh in use, or else one of all local devices."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        return mesh
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def _check_numbers(numbers: ArrayLike, batch: int) -> np.ndarray:
    """Numbers of samples as uint32."""
    array = np.asarray(numbers)
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= 2**32:
        raise InputError(f"numbers are {numbers!r}; expected {batch} integers from 0 to {2**32 - 1}, one a label.")
    return array.astype(np.uint32)


def _over_devices(array: ArrayLike, mesh: Mesh) -> jax.Array:
    """An array (B,…) split as batches are; padded with repeats so that it divides, which no sample notices."""
    array = np.asarray(array)
    axes = tuple(name for name in mesh.axis_names if name != "tensor")
    ways = math.prod(mesh.shape[name] for name in axes)
    padded = np.resize(array, (-(-array.shape[0] // ways) * ways, *array.shape[1:]))
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])
