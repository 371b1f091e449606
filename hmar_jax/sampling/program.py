"""labels + schedule → pictures as one compiled program: sampler, transformer, quantizer and decoder.

    request = Request.of(config, dtype, schedule, params, labels).on(mesh)
    with jax.set_mesh(mesh):
        images, tokens, draws = sample(request)

Axis letters: B batch, S pixels a side, L tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from hmar_jax.arrays import over_devices
from hmar_jax.config import ModelConfig
from hmar_jax.images import from_signed
from hmar_jax.networks import networks
from hmar_jax.sampling import predictors, progress, sampler
from hmar_jax.sampling.schedule import Controls, Plan, Schedule
from hmar_jax.xla import COMPILER_OPTIONS

_STATIC = ("config", "dtype", "plan", "greedy", "record", "decode")
_ARRAYS = ("params", "labels", "numbers", "controls", "seed", "kept", "ticket")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of the sampling program: a pytree, whose static fields and shapes decide what is compiled.

    Attributes:
      config, dtype, plan: the model, its compute dtype, and the static part of the schedule.
      params: of the model, on devices.
      labels: (B,) int32 in [0, num_classes]. numbers: (B,) uint32, which of the seed's samples each is.
      controls: the traced part of the schedule. seed: uint32 ().
      kept: tokens (B,L) that are not to be drawn, when editing.
      ticket: uint32 () of a request whose finished scales are posted (`progress`); None posts none.
      greedy: argmax in place of draws. record: give every pass's draw. decode: give pictures, not tokens alone.
    """

    config: ModelConfig
    dtype: str
    plan: Plan
    params: Any
    labels: Any
    numbers: Any
    controls: Controls
    seed: Any
    kept: sampler.Kept | None = None
    ticket: Any = None
    greedy: bool = False
    record: bool = False
    decode: bool = True

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: str,
        schedule: Schedule,
        params: Any,
        labels: ArrayLike,
        *,
        numbers: ArrayLike | None = None,
        seed: int = 0,
        **others: Any,
    ) -> Request:
        """A request of NumPy arrays, with the numbers 0 to B-1 unless others are given."""
        labels = np.asarray(labels, np.int32)
        numbers = np.arange(len(labels), dtype=np.uint32) if numbers is None else np.asarray(numbers, np.uint32)
        plan, controls = schedule.plan, schedule.controls
        return cls(config, dtype, plan, params, labels, numbers, controls, np.uint32(seed), **others)

    def mapped(
        self, of_samples: Callable[[Any], Any], of_others: Callable[[Any], Any] = lambda array: array
    ) -> Request:
        """The request with other arrays: functions of those that have a row for each sample, and of those of all.

        The parameters stay as they are.
        """
        samples = {name: jax.tree.map(of_samples, getattr(self, name)) for name in ("labels", "numbers", "kept")}
        others = {name: jax.tree.map(of_others, getattr(self, name)) for name in ("controls", "seed", "ticket")}
        return dataclasses.replace(self, **samples, **others)

    def on(self, mesh: Mesh) -> Request:
        """The request with its samples split over the devices, padded with repeats so that they divide."""
        return self.mapped(lambda array: over_devices(array, mesh))


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def sample(request: Request) -> tuple[jax.Array | None, jax.Array, list[sampler.Draw]]:
    """Label to picture.

    Returns:
      Images (B,S,S,3) float32 in [0,1], or None without `decode`; tokens (B,L) int32; recorded draws.
    """
    config = request.config
    assert config.transformer is not None
    nets = networks(config, request.params, request.dtype)
    key = jax.random.key(request.seed)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(request.numbers)
    make = predictors.cached_predictor if config.transformer.is_var else predictors.predictor
    predict = make(nets.transformer, request.labels, config.transformer.num_classes, request.plan)
    tokens, latents, draws = sampler.sample_tokens(
        predict,
        nets.tokenizer.quantizer,
        request.plan,
        request.controls,
        keys,
        greedy=request.greedy,
        leak_free=config.transformer.leak_free,
        kept=request.kept,
        tell=None if request.ticket is None else functools.partial(progress.tell, request.ticket),
    )
    images = from_signed(nets.tokenizer.decode_latents(latents)) if request.decode else None
    return images, tokens, draws if request.record else []
