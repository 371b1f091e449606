"""labels + schedule → pictures as one compiled program: sampler, transformer, quantizer and decoder.

Axis letters: B batch, S pixels a side, L tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from hmar_jax.config import ModelConfig
from hmar_jax.images import from_signed
from hmar_jax.networks import networks
from hmar_jax.sampling import predictors, progress, sampler
from hmar_jax.sampling.schedule import Controls, Plan
from hmar_jax.xla import COMPILER_OPTIONS


@dataclasses.dataclass(frozen=True)
class Options:
    """All that a compiled sampler depends on, beside the shape of its labels and whether tokens are kept."""

    config: ModelConfig
    dtype: str
    plan: Plan
    greedy: bool = False
    record: bool = False


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def sample(
    options: Options,
    params: Any,
    labels: jax.Array,
    numbers: jax.Array,
    controls: Controls,
    seed: jax.Array,
    kept: sampler.Kept | None = None,
    ticket: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, list[sampler.Draw]]:
    """Label to picture.

    Args:
      labels: (B,) int32 in [0, num_classes]. numbers: (B,) uint32, which of the seed's samples each is.
      kept: tokens (B,L) that are not to be drawn, when editing.
      ticket: uint32 () of a request that is told of every finished scale (`progress.relay`); None for no telling.

    Returns:
      Images (B,S,S,3) float32 in [0,1], tokens (B,L) int32, recorded draws.
    """
    config = options.config
    assert config.transformer is not None
    nets = networks(config, params, options.dtype)
    key = jax.random.key(seed)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    make = predictors.cached_predictor if config.transformer.is_var else predictors.predictor
    predict = make(nets.transformer, labels, config.transformer.num_classes, options.plan)
    tokens, latents, draws = sampler.sample_tokens(
        predict,
        nets.tokenizer.quantizer,
        options.plan,
        controls,
        keys,
        greedy=options.greedy,
        leak_free=config.transformer.leak_free,
        kept=kept,
        tell=None if ticket is None else functools.partial(progress.tell, ticket),
    )
    images = from_signed(nets.tokenizer.decode_latents(latents))
    return images, tokens, draws if options.record else []
