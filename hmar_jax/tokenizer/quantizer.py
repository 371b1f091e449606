"""latent map ⇄ tokens of every scale: multi-scale residual quantization (VAR §3.2, Algorithms 1 and 2).

All arithmetic is float32 at highest matmul precision: anything less flips argmins.
Axis letters: B batch, h side of the latent map (= p_K), L tokens, K scales, Z latent channels, V codebook.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hmar_jax import resize
from hmar_jax.config import TokenizerConfig
from hmar_jax.scales import ScaleLadder


def phi_of_scale(num_scales: int, phis: int) -> tuple[int, ...]:
    """Which of the phi convolutions each scale uses, by VAR's rule: the one whose tick is nearest to k/(K-1).

    The ticks are evenly spread, the first 1/(2n) from 0 for n convolutions and, for 4 alone, 1/(3n). Many are equally
    far in exact arithmetic, so that the published lists rest on how float64 rounds here.
    """
    return _nearest_ticks(num_scales, phis, 1 / 3 / phis if phis == 4 else 1 / 2 / phis)


def unrecorded_phi_of_scale(num_scales: int, phis: int) -> tuple[int, ...]:
    """`phi_of_scale` of configs that do not record it: the first tick was 1/(3n) for every n."""
    return _nearest_ticks(num_scales, phis, 1 / 3 / phis)


def recorded_phis(config: TokenizerConfig, num_scales: int, *, recorded: bool) -> TokenizerConfig:
    """A tokenizer's config as it was stored → with the phi of each scale that it was trained with.

    Args:
      recorded: whether the stored config had `phi_of_scale`; else it is `unrecorded_phi_of_scale`.

    Returns:
      The config, whose `phi_of_scale` is empty where it is VAR's rule.
    """
    used = config.phi_of_scale if recorded else unrecorded_phi_of_scale(num_scales, config.phis)
    rule = phi_of_scale(num_scales, config.phis)
    return dataclasses.replace(config, phi_of_scale=() if used == rule else used)


def _nearest_ticks(num_scales: int, phis: int, first: float) -> tuple[int, ...]:
    ticks = np.linspace(first, 1 - first, phis)
    places = np.arange(num_scales) / max(num_scales - 1, 1)
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


class Quantized(NamedTuple):
    """What `Quantizer.quantize` gives.

    Attributes:
      tokens: (B,L) int32. queries: (B,L,Z) float32, the vectors that codes were looked up for.
      lifts: K arrays u_k (B,h,h,Z); their running sum is the reconstruction of f.
    """

    tokens: jax.Array
    queries: jax.Array
    lifts: list[jax.Array]


class Quantizer(nnx.Module):
    """Codebook and phi convolutions.

    Attributes:
      codebook: (V,Z) float32, the codes E.
      phis: 3x3 convolutions Z → Z; `phi(h) = 0.5 h + 0.5 conv(h)`.
      phi_of_scale: which of them each scale uses, coarse to fine.
    """

    def __init__(self, config: TokenizerConfig, ladder: ScaleLadder, *, rngs: nnx.Rngs):
        size, channels = config.codebook_size, config.latent_channels
        self.ladder = ladder
        self.phi_of_scale = config.phi_of_scale or phi_of_scale(ladder.num_scales, config.phis)
        self.codebook = nnx.Param(
            jax.random.uniform(rngs.params(), (size, channels), minval=-1 / size, maxval=1 / size)
        )
        self.phis = nnx.List(
            nnx.Conv(channels, channels, (3, 3), padding=1, precision="highest", rngs=rngs) for _ in range(config.phis)
        )

    def nearest(self, latents: jax.Array) -> jax.Array:
        """The code with the least squared distance: (…,Z) float32 → (…) int32."""
        codebook = self.codebook[...]
        dots = jnp.einsum("...z,vz->...v", latents, codebook, precision="highest")
        # |x - e|² = |x|² - 2x·e + |e|², and |x|² is the same for all codes. Rounding may swap codes whose distances
        # differ by less than 1e-7 (|x|² + |e|²); the published models' tokens come from this formula.
        return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * dots, axis=-1).astype(jnp.int32)

    @jax.named_scope("quantizer")
    def lift(self, tokens: jax.Array, scale: int, keep: jax.Array | None = None) -> jax.Array:
        """u_k, what one scale adds to the reconstruction.

        Args:
          tokens: (B,p²) int32 of this scale.
          scale: k from 0.
          keep: optional (B,p²) bool; the other tokens contribute nothing (leak-free masked inputs).

        Returns:
          (B,h,h,Z) float32.
        """
        side, full = self.ladder.sides[scale], self.ladder.sides[-1]
        codes = self.codebook[...][tokens]
        if keep is not None:
            codes = jnp.where(keep[..., None], codes, 0)
        maps = codes.reshape(tokens.shape[0], side, side, codes.shape[-1])
        lifted = resize.apply(resize.bicubic_matrix(side, full), maps)
        phi = self.phis[self.phi_of_scale[scale]]
        # By cuDNN on a GPU, which ends XLA's CUDA graph: no loss, a graph begins when the GPU has been sent all of it.
        return 0.5 * lifted + 0.5 * phi(lifted)

    @jax.named_scope("quantizer")
    def pool(self, maps: jax.Array, scale: int) -> jax.Array:
        """A map at the resolution of a scale: (B,h,h,Z) → (B,p²,Z) float32."""
        pooled = resize.apply(resize.area_matrix(maps.shape[1], self.ladder.sides[scale]), maps)
        return pooled.reshape(maps.shape[0], -1, maps.shape[-1])

    def quantize(self, latents: jax.Array) -> Quantized:
        """Codes every scale on what the coarser ones left over; latents are f, (B,h,h,Z) float32."""
        rest, queries, tokens, lifts = latents, [], [], []
        for scale in range(self.ladder.num_scales):
            queries.append(self.pool(rest, scale))
            tokens.append(self.nearest(queries[-1]))
            lifts.append(self.lift(tokens[-1], scale))
            rest = rest - lifts[-1]
        return Quantized(jnp.concatenate(tokens, axis=1), jnp.concatenate(queries, axis=1), lifts)

    def split(self, tokens: jax.Array) -> Sequence[jax.Array]:
        """Joined tokens or masks, scale by scale: (B,L,…) → K arrays (B,p_k²,…)."""
        return [tokens[:, where] for where in self.ladder.slices]

    def reconstruct(self, tokens: jax.Array) -> jax.Array:
        """The latent map after each scale, the last being that of all: (B,L) int32 → (K,B,h,h,Z) float32."""
        lifts = [self.lift(of_scale, scale) for scale, of_scale in enumerate(self.split(tokens))]
        return jnp.stack(list(itertools.accumulate(lifts)))
