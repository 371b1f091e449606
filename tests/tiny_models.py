"""Tiny models and what goes into them, made by name; tests/conftest.py shares one of each kind as fixtures."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.formats.model_directory import tokenizer_fingerprint
from hmar_jax.model import Model
from hmar_jax.networks import structure
from hmar_jax.scales import ScaleLadder

TINY = ModelConfig(
    ladder=ScaleLadder((1, 2, 3)),
    tokenizer=TokenizerConfig(
        channels=8,
        multipliers=(1, 2),
        encoder_blocks=1,
        decoder_blocks=1,
        norm_groups=4,
        latent_channels=4,
        codebook_size=16,
        downsampling=2,
    ),
    transformer=TransformerConfig(depth=3, width=32, heads=4, num_classes=5, branch_depth=1, masked=True),
    class_names=("a", "b", "c", "d", "e"),
)


def tiny(**transformer):
    """`TINY` with other transformer fields."""
    return dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, **transformer))


def lively_params(config, seed=0):
    """Random parameters under which every path matters: fresh ones have closed gates and a head near zero."""
    rng = np.random.default_rng(seed)
    _, abstract = structure(config)
    flat = {}
    for path, leaf in sorted(nnx.to_flat_state(abstract), key=lambda item: str(item[0])):
        name, noise = ".".join(map(str, path)), rng.standard_normal(leaf.shape).astype(np.float32)
        match path[-1]:
            case "kernel":
                fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) == 4 else leaf.shape[-2]
                flat[name] = noise / np.sqrt(fan_in, dtype=np.float32)
            case "scale":
                flat[name] = 1 + np.float32(0.1) * noise
            case "log_scale":
                flat[name] = np.float32(np.log(4.0)) + np.float32(0.1) * noise
            case "bias" | "q_bias" | "v_bias" | "word_bias":
                flat[name] = np.float32(0.1) * noise
            case "codebook":
                flat[name] = noise
            case _:
                flat[name] = np.float32(0.5) * noise
    return trees.unflatten({name: jnp.asarray(leaf) for name, leaf in flat.items()})


def lively_model(config, seed=0, dtype="float32"):
    return Model(config, lively_params(config, seed), dtype)


def random_tokens(config, batch, seed=0):
    size = (batch, config.ladder.length)
    return np.random.default_rng(seed).integers(0, config.tokenizer.codebook_size, size, dtype=np.int32)


def fingerprint(model):
    """SHA-256 of a model's tokenizer, as token caches record it."""
    return tokenizer_fingerprint(model.config, model.params)
