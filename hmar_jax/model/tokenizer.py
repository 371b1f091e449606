"""pictures ⇄ tokens of a Model: checked, jitted.

Axis letters: B batch, S pixels a side, K scales, L tokens, T pictures asked for, V codebook.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from hmar_jax.arrays import host_array, on_host
from hmar_jax.config import ModelConfig
from hmar_jax.errors import InputError, shown
from hmar_jax.networks import networks


class ModelTokenizer:
    """image ⇄ tokens of a `Model`."""

    def __init__(self, config: ModelConfig, params: Any, dtype: str):
        self._config, self._params, self._dtype = config, params, dtype

    def encode(self, images: ArrayLike) -> jax.Array:
        """(B,S,S,3) float in [-1,1] → (B,L) int32; B is 1 or more in all that follows.

        Raises:
          InputError: another shape or type, or a pixel that is not a number or outside [-1,1] by more than 0.01, the
            rounding of 8 bits. Within a program of the caller's, pixels are not looked at.
        """
        size = self._config.image_size
        if not isinstance(images, jax.Array):
            images = host_array("Images are", images, f"floats (B, {size}, {size}, 3) in [-1, 1]")
        with np.errstate(over="ignore"):  # infinities are refused below
            pictures = jnp.asarray(images)
        # Whole numbers would be bytes that nobody has scaled.
        whole = not jnp.issubdtype(pictures.dtype, jnp.floating)
        if whole or pictures.ndim != 4 or pictures.shape[1:] != (size, size, 3) or not len(pictures):
            raise InputError(
                f"Images are {pictures.dtype} {pictures.shape}; this model takes floats (B, {size}, {size}, 3) in "
                "[-1, 1], B being 1 or more."
            )
        if not isinstance(pictures, jax.core.Tracer):
            low, high = on_host(_range(pictures)).tolist()
            if not -1.01 <= low <= high <= 1.01:
                raise InputError(
                    f"Images range from {low:.4g} to {high:.4g}; this model takes floats in [-1, 1], which bytes are "
                    "after / 127.5 - 1."
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

    def decode_until(self, tokens: ArrayLike, scales: ArrayLike) -> jax.Array:
        """Pictures of the coarser scales alone: tokens (T,B,L) int, whatever those of scales after scales[t] (T,) are →
        (T,B,S,S,3) float32 in [-1,1].
        """  # fmt: skip
        count = self._config.ladder.num_scales
        tokens = host_array("Tokens are", tokens, "integers (T, B, L)")
        until = host_array("Scales are", scales, f"T of 0 to {count - 1}")
        whole = np.issubdtype(until.dtype, np.integer) and not np.any((until < 0) | (until >= count))
        if tokens.ndim != 3 or 0 in tokens.shape or until.shape != tokens.shape[:1] or not (whole or until.size == 0):
            raise InputError(
                f"Tokens are {tokens.shape} and scales {shown(scales)}; expected (T, B, L), and T of 0 to {count - 1}."
            )
        checked = check_tokens(self._config, tokens.reshape(-1, tokens.shape[-1])).reshape(tokens.shape)
        return _decode_until(self._config, self._dtype, self._params, checked, jnp.asarray(until, jnp.int32))

    def here(self) -> ModelTokenizer:
        """The same for calls of this process alone: of parameters that several processes hold, with its own copies.

        Raises:
          InputError: each process holds a part of them.
        """

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
                return leaf
            if not leaf.is_fully_replicated:
                raise InputError("Several processes share the parameters; place them whole on each, or stream tokens.")
            return leaf.addressable_data(0)

        return ModelTokenizer(self._config, jax.tree.map(own, self._params), self._dtype)


def check_tokens(config: ModelConfig, tokens: ArrayLike) -> jax.Array:
    """Tokens as int32, or InputError where they are not (B,L) in [0,V), B being 1 or more."""
    tokens = host_array("Tokens are", tokens, f"integers (B, {config.ladder.length})")
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


@jax.jit
def _range(images: jax.Array) -> jax.Array:
    """(2,) float32, the least and the greatest pixel; not a number where a pixel is not."""
    return jnp.stack([jnp.min(images), jnp.max(images)]).astype(jnp.float32)


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
