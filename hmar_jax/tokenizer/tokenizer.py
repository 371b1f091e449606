"""image ⇄ tokens: encoder, quantizer and decoder as one module.

Axis letters: B batch, S pixels a side, h latents a side, L tokens, Z latent channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hmar_jax.config import TokenizerConfig
from hmar_jax.scales import ScaleLadder
from hmar_jax.tokenizer.autoencoder import Decoder, Encoder
from hmar_jax.tokenizer.quantizer import Quantizer
from pallas_kernels.devices import BATCH_AXES, ways

# Pixels that a device decodes at a time; 3.8 GiB in bfloat16 with 160 channels.
_PIXELS_AT_ONCE = 2**22


class Tokenizer(nnx.Module):
    """The multi-scale residual VQ-VAE (VAR §3.2).

    Args:
      config: its sizes. ladder: sides of the token maps; the last is the latent map's.
      dtype: compute dtype of the CNN; the quantizer is float32 always.
    """

    def __init__(self, config: TokenizerConfig, ladder: ScaleLadder, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        channels, self.downsampling = config.latent_channels, config.downsampling
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = nnx.Conv(channels, channels, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.quantizer = Quantizer(config, ladder, rngs=rngs)
        self.post_quant_conv = nnx.Conv(channels, channels, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def latents(self, images: jax.Array) -> jax.Array:
        """f: (B,S,S,3) in [-1,1] → (B,h,h,Z) float32."""
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """(B,S,S,3) in [-1,1] → (B,L) int32."""
        return self.quantizer.quantize(self.latents(images)).tokens

    def decode_latents(self, latents: jax.Array) -> jax.Array:
        """A (reconstructed) f to its picture: (B,h,h,Z) → (B,S,S,3) float32 in [-1,1]; large batches in slices."""

        def decode(latents: jax.Array) -> jax.Array:
            with jax.named_scope("decoder"):
                return jnp.clip(self.render(self.features(latents)), -1, 1)

        batch, devices = latents.shape[0], ways(BATCH_AXES)
        pixels = (latents.shape[1] * self.downsampling) ** 2
        slices = -(-batch // (devices * max(1, _PIXELS_AT_ONCE // pixels)))
        if slices == 1:
            return decode(latents)
        rows = devices * -(-batch // (devices * slices))
        padded = jnp.resize(latents, (rows * slices, *latents.shape[1:]))
        # Every slices-th picture, so that a slice has pictures of all devices that the batch is spread over.
        pictures = jax.lax.map(decode, jnp.moveaxis(padded.reshape(rows, slices, *latents.shape[1:]), 1, 0))
        return jnp.moveaxis(pictures, 1, 0).reshape(rows * slices, *pictures.shape[2:])[:batch]

    def features(self, latents: jax.Array) -> jax.Array:
        """The decoder up to its last convolution: (B,h,h,Z) → (B,S,S,channels)."""
        return self.decoder.features(self.post_quant_conv(latents))

    def render(self, features: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """The decoder's last convolution, perhaps with another kernel: → (B,S,S,3) float32, not clipped."""
        return self.decoder.conv_out(features, kernel)

    def decode(self, tokens: jax.Array) -> jax.Array:
        """(B,L) int32 → (B,S,S,3) float32 in [-1,1]."""
        return self.decode_latents(self.quantizer.reconstruct(tokens)[-1])
