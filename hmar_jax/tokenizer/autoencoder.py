"""image → latent map → image: the VQGAN-shaped CNN on both sides of the quantizer (Esser et al. 2021).

Arrays are NHWC. Axis letters: B batch, S pixels a side, h latents a side, Z latent channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hmar_jax.config import TokenizerConfig
from hmar_jax.tokenizer.layers import GroupNorm, PointwiseConv, ThinConv, UpsampleConv


def _conv(inputs: int, outputs: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (size, size), padding=size // 2, dtype=dtype, rngs=rngs)


def _downsample(channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    padding = [(0, 1), (0, 1)]  # right and bottom only
    return nnx.Conv(channels, channels, (3, 3), strides=(2, 2), padding=padding, dtype=dtype, rngs=rngs)


def _pointwise(inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> PointwiseConv:
    return PointwiseConv(inputs, outputs, (1, 1), dtype=dtype, rngs=rngs)


def _upsample(channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> UpsampleConv:
    return UpsampleConv(channels, channels, (3, 3), dtype=dtype, rngs=rngs)


def _norm(config: TokenizerConfig, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> GroupNorm:
    return GroupNorm(channels, config.norm_groups, epsilon=1e-6, dtype=dtype, rngs=rngs)


class ResidualBlock(nnx.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), through a 1x1 shortcut where the width changes."""

    def __init__(self, config: TokenizerConfig, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = _norm(config, inputs, dtype=dtype, rngs=rngs)
        self.conv1 = _conv(inputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(config, outputs, dtype=dtype, rngs=rngs)
        self.conv2 = _conv(outputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.shortcut = None if inputs == outputs else _pointwise(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(self.norm1(x, nnx.silu))
        h = self.conv2(self.norm2(h, nnx.silu))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
    """x + proj(attend(qkv(norm(x)))): one head over all positions of the map, softmax in float32."""

    def __init__(self, config: TokenizerConfig, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = _norm(config, channels, dtype=dtype, rngs=rngs)
        self.qkv = _pointwise(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = _pointwise(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, 1, channels)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, scale=channels**-0.5)
        return x + self.proj(attended.reshape(x.shape))


class Level(nnx.Module):
    """The residual blocks of one resolution, each followed by attention where `attention`, then its `resample`."""

    def __init__(
        self,
        config: TokenizerConfig,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        attention: bool,
        resample: nnx.Conv | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            ResidualBlock(config, inputs if j == 0 else outputs, outputs, dtype=dtype, rngs=rngs) for j in range(blocks)
        )
        self.attentions = nnx.List(
            SpatialAttention(config, outputs, dtype=dtype, rngs=rngs) for _ in range(blocks if attention else 0)
        )
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for j, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[j](x)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the deepest resolution."""

    def __init__(self, config: TokenizerConfig, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(config, channels, channels, dtype=dtype, rngs=rngs)
        self.attention = SpatialAttention(config, channels, dtype=dtype, rngs=rngs)
        self.block2 = ResidualBlock(config, channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nnx.Module):
    """Image to latents before `quant_conv`: (B,S,S,3) in [-1,1] → (B,h,h,Z)."""

    def __init__(self, config: TokenizerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.multipliers]
        deepest = len(widths) - 1
        make = functools.partial(Level, config, dtype=dtype, rngs=rngs)
        self.conv_in = _conv(3, config.channels, 3, dtype=dtype, rngs=rngs)
        self.levels: nnx.List[Level] = nnx.List()
        for i, (inputs, width) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            down = _downsample(width, dtype=dtype, rngs=rngs) if i < config.halvings else None
            self.levels.append(make(inputs, width, config.encoder_blocks, attention=i == deepest, resample=down))
        self.middle = Middle(config, widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = _norm(config, widths[-1], dtype=dtype, rngs=rngs)
        self.conv_out = _conv(widths[-1], config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(self.norm_out(self.middle(x), nnx.silu))


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` to the features of an image. Levels run deepest first."""

    def __init__(self, config: TokenizerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.multipliers]
        deepest = len(widths) - 1
        make = functools.partial(Level, config, dtype=dtype, rngs=rngs)
        self.conv_in = _conv(config.latent_channels, widths[-1], 3, dtype=dtype, rngs=rngs)
        self.middle = Middle(config, widths[-1], dtype=dtype, rngs=rngs)
        self.levels: nnx.List[Level] = nnx.List()
        for i, (inputs, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            up = _upsample(width, dtype=dtype, rngs=rngs) if 0 < i <= config.halvings else None
            self.levels.append(make(inputs, width, config.decoder_blocks, attention=i == deepest, resample=up))
        self.norm_out = _norm(config, widths[0], dtype=dtype, rngs=rngs)
        self.conv_out = ThinConv(widths[0], 3, (3, 3), padding=1, dtype=dtype, rngs=rngs)

    def features(self, latents: jax.Array) -> jax.Array:
        """(B,h,h,Z) → (B,S,S,channels): all but `conv_out`, which the adaptive weight needs to apply by itself."""
        x = self.middle(self.conv_in(latents))
        for level in reversed(self.levels):
            x = level(x)
            if level.resample is not None:
                x = level.resample(x)
        return self.norm_out(x, nnx.silu)
