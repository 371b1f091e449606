"""pictures ⇄ tokens of a Model: checked, jitted.

Axis letters: B batch, S pixels a side, K scales, L tokens, T pictures asked for, V codebook.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from hmar_jax.config import ModelConfig
from hmar_jax.errors import InputError
from hmar_jax.networks import networks


class TokenizerDoor:
    """image ⇄ tokens of a `Model`."""

    def __init__(self, config: ModelConfig, params: Any, dtype: str):
        self._config, self._params, self._dtype = config, params, dtype

    def encode(self, images: ArrayLike) -> jax.Array:
        """(B,S,S,3) float in [-1,1] → (B,L) int32; B is 1 or more in all that follows."""
        pictures, size = jnp.asarray(images), self._config.image_size
        # Whole numbers would be bytes that nobody has scaled.
        whole = not jnp.issubdtype(pictures.dtype, jnp.floating)
        if whole or pictures.ndim != 4 or pictures.shape[1:] != (size, size, 3) or not len(pictures):
            raise InputError(
                f"Images are {pictures.dtype} {pictures.shape}; this model takes floats (B, {size}, {size}, 3) in "
                "[-1, 1], B being 1 or more."
            )
        return _encode(self._config, self._dtype, self._params, pictures.astype(jnp.float32))

    def decode(self, tokens: ArrayLike) -> jax.Array:
        """(B,L) int → (B,S,S,3) float32 in [-1,1]."""
        return _decode(self._config, self._dtype, self._params, check_tokens(self._config, tokens))

    def growth(self, tokens: ArrayLike) -> jax.Array:
        """The picture after each scale: (B,L) int → (K,B,S,S,3) float32 in [-1,1]; the last is `decode`'s."""
        checked = check_tokens(self._config, tokens)
        count = self._config.ladder.num_scales
        return self.decode_until(np.broadcast_to(checked, (count, *checked.shape)), range(count))

    def decode_until(self, tokens: ArrayLike, scales: Sequence[int]) -> jax.Array:
        """Pictures of the coarser scales alone: tokens (T,B,L) int, whatever those of scales after scales[t] (T,) are →
        (T,B,S,S,3) float32 in [-1,1].
        """  # fmt: skip
        tokens, count = np.asarray(tokens), self._config.ladder.num_scales
        if tokens.ndim != 3 or len(tokens) != len(scales) or not all(0 <= scale < count for scale in scales):
            raise InputError(
                f"Tokens are {tokens.shape} and scales {list(scales)}; expected (T, B, L), and T of 0 to {count - 1}."
            )
        checked = check_tokens(self._config, tokens.reshape(-1, tokens.shape[-1])).reshape(tokens.shape)
        return _decode_until(self._config, self._dtype, self._params, checked, jnp.asarray(scales, jnp.int32))


def check_tokens(config: ModelConfig, tokens: ArrayLike) -> jax.Array:
    """Tokens as int32, or InputError where they are not (B,L) in [0,V), B being 1 or more."""
    tokens = np.asarray(tokens)
    length, size = config.ladder.length, config.tokenizer.codebook_size
    whole = np.issubdtype(tokens.dtype, np.integer)
    if not whole or tokens.ndim != 2 or tokens.shape[1] != length or not len(tokens):
        raise InputError(
            f"Tokens are {tokens.dtype} {tokens.shape}; this model's ladder has integers (B, {length}), B being 1 or "
            "more."
        )
    if not (tokens.min() >= 0 and tokens.max() < size):
        raise InputError(f"Tokens range from {tokens.min()} to {tokens.max()}; the codebook has 0 to {size - 1}.")
    return jnp.asarray(tokens, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config: ModelConfig, dtype: str, params: Any, images: jax.Array) -> jax.Array:
    return networks(config, params, dtype).tokenizer.encode(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config: ModelConfig, dtype: str, params: Any, tokens: jax.Array) -> jax.Array:
    return networks(config, params, dtype).tokenizer.decode(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_until(config: ModelConfig, dtype: str, params: Any, tokens: jax.Array, scales: jax.Array) -> jax.Array:
    tokenizer = networks(config, params, dtype).tokenizer

    def picture(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        of_all, scale = at
        return tokenizer.decode_latents(tokenizer.quantizer.reconstruct(of_all)[scale])

    return jax.lax.map(picture, (tokens, scales))
