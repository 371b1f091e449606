"""reconstruction, latents, logits → scalars: what the tokenizer and its discriminator are trained on.

Axis letters: B batch, S pixels a side, s logits a side, h, w latent map, Z latent channels, K scales. Every loss is a
float32 scalar, a mean over its elements, so that weights mean the same at every resolution and batch size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient

from hmar_jax.config import TokenizerLossConfig
from hmar_jax.errors import InputError
from hmar_jax.params import Tree

Metrics = dict[str, jax.Array]


class Discriminator(nnx.Module):
    """PatchGAN (Isola et al. 2017, §3.2.2): each logit judges one patch of the picture.

    `layers` 4x4 convolutions halve the side, widths doubling from `channels` up to eight times it; one more of stride 1
    and a last one to a single channel follow. Normalised by GroupNorm where the original has BatchNorm: it keeps no
    running statistics, and a picture's logits depend neither on its batch nor on how the mesh splits that batch.

    Args:
      channels: width after the first convolution. layers: convolutions that halve the side.
      dtype: of compute; parameters are float32.

    Raises:
      InputError: channels or layers below 1.
    """

    def __init__(self, channels: int, layers: int, *, dtype: Any, rngs: nnx.Rngs):
        if channels < 1 or layers < 1:
            raise InputError(
                f"A discriminator of {channels} channels and {layers} layers is empty; use at least 1 of each."
            )
        self.layers = layers

        def conv(inputs: int, outputs: int, stride: int, use_bias: bool) -> nnx.Conv:
            return nnx.Conv(
                inputs, outputs, (4, 4), stride, padding=1, use_bias=use_bias, dtype=dtype,
                kernel_init=nnx.initializers.normal(0.02), rngs=rngs,
            )  # fmt: skip

        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        self.first = conv(3, channels, 2, True)
        # The norm that follows has a bias of its own.
        self.convs = nnx.List(
            conv(a, b, 2 if i < layers else 1, False) for i, (a, b) in enumerate(itertools.pairwise(widths), start=1)
        )
        # Groups divide the width and hold two channels or more: alone, a channel of a 1x1 map would normalise to 0.
        self.norms = nnx.List(
            nnx.GroupNorm(width, math.gcd(32, width // 2), use_fast_variance=False, dtype=dtype, rngs=rngs)
            for width in widths[1:]  # the fast variance is E[x²] - E[x]², which cancels
        )
        self.last = conv(widths[-1], 1, 1, True)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, positive where a patch looks real.

        Args:
          images: (B,S,S,3) float in [-1,1].

        Returns:
          (B,s,s,1) float32, s = floor(S / 2^layers) - 2.

        Raises:
          InputError: not RGB pictures, or too small for one logit.
        """
        smallest = 3 * 2**self.layers
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < smallest:
            raise InputError(
                f"A discriminator of {self.layers} layers got images of shape {images.shape}; it needs (B,S,S,3) with "
                f"S at least {smallest}, so use larger pictures or fewer discriminator_layers."
            )
        x = nnx.leaky_relu(self.first(images), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.leaky_relu(norm(conv(x)), 0.2)
        return self.last(x).astype(jnp.float32)


def hinge_discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """Half of the hinge loss (Lim & Ye 2017), as in VQGAN: real logits want to exceed 1, fake ones to be below -1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits)))


def generator_loss(fake_logits: jax.Array) -> jax.Array:
    """The generator's side of the hinge loss: minus the mean logit of its pictures."""
    return -jnp.mean(fake_logits)


def adversarial_factor(step: jax.Array | int, config: TokenizerLossConfig) -> jax.Array:
    """Weight of the generator's term at a step, float32 scalar: 0 before `adversarial_start`, then a linear rise.

    During the rise the discriminator, which knew nothing at the start, learns what its gradients are to mean.
    """
    risen = (jnp.asarray(step) - config.adversarial_start + 1) / (config.adversarial_ramp + 1)
    return config.adversarial * jnp.clip(risen, 0, 1).astype(jnp.float32)


def adaptive_weight(reconstruction_gradient: jax.Array, adversarial_gradient: jax.Array) -> jax.Array:
    """Weight that makes both losses pull equally hard on the decoder's last layer (Esser et al. 2021, VQGAN eq. 7).

    Args:
      reconstruction_gradient, adversarial_gradient: of the losses by the kernel of the decoder's last convolution.

    Returns:
      ‖reconstruction‖ / (‖adversarial‖ + 1e-4), between 0 and 1e4: float32 scalar.
    """
    norms = [jnp.linalg.norm(g.astype(jnp.float32).ravel()) for g in (reconstruction_gradient, adversarial_gradient)]
    return jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, 1e4)


def pixel_loss(reconstruction: jax.Array, images: jax.Array, *, l1: float, l2: float) -> jax.Array:
    """`l1`·mean |d| + `l2`·mean d² of the difference d, in [-1,1] units.

    Args:
      reconstruction, images: (B,S,S,3) float.

    Raises:
      InputError: their shapes differ.
    """
    if reconstruction.shape != images.shape:
        raise InputError(
            f"A reconstruction of shape {reconstruction.shape} cannot be compared with {images.shape} images."
        )
    difference = reconstruction.astype(jnp.float32) - images.astype(jnp.float32)
    return l1 * jnp.mean(jnp.abs(difference)) + l2 * jnp.mean(jnp.square(difference))


def vq_loss(latents: jax.Array, fhats: jax.Array | Sequence[jax.Array], commitment: float) -> jax.Array:
    """Codebook and commitment terms, averaged over scales (Tian et al. 2024, VAR; van den Oord et al. 2017).

    Each scale adds `commitment`·mse(sg fhat, f), which draws the encoder to the codes, and mse(fhat, sg f), which draws
    codes and phis to the encoder.

    Args:
      latents: (B,h,w,Z) f, what the encoder gave.
      fhats: (K,B,h,w,Z), or K of (B,h,w,Z): running reconstruction after each scale, differentiable in the codebook.

    Raises:
      InputError: no scales, or a scale's shape is not the latents'.
    """
    if not len(fhats) or any(fhat.shape != latents.shape for fhat in fhats):
        raise InputError(
            f"vq_loss got reconstructions of shapes {[fhat.shape for fhat in fhats]}; it needs one or more of the "
            f"latents' shape {latents.shape}."
        )
    f = latents.astype(jnp.float32)

    def scale_loss(fhat: jax.Array) -> jax.Array:
        fhat = fhat.astype(jnp.float32)
        return commitment * _mse(stop_gradient(fhat), f) + _mse(fhat, stop_gradient(f))

    return jnp.mean(jnp.stack([scale_loss(fhat) for fhat in fhats]))


def _mse(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(a - b))


class Adversary(NamedTuple):
    """The discriminator of a training step.

    Attributes:
      judge: its parameters, pictures (B,S,S,3) → logits. params: those parameters.
      to_kernel: gradient of a loss by the reconstruction (B,S,S,3) → by the kernel of the decoder's last convolution.
      step: of training, which decides whether the adversarial terms are on yet.
    """

    judge: Callable[[Tree, jax.Array], jax.Array]
    params: Tree
    to_kernel: Callable[[jax.Array], jax.Array]
    step: jax.Array | int


def adversarial_terms(
    config: TokenizerLossConfig,
    adversary: Adversary,
    reconstruction: jax.Array,
    images: jax.Array,
    reconstruction_gradient: jax.Array,
) -> tuple[Metrics, jax.Array, jax.Array, Tree]:
    """What generator and discriminator learn from each other, gradients and all; nothing is computed before the start.

    One `lax.cond` decides, and computes the gradients inside, so that it hands over neither activations nor zeros in
    place of them, but a gradient by the reconstruction and the discriminator's own. It is preferred to two programs,
    one for before and one for after the start: the second would be compiled, and may first be out of memory, hours
    into a run.

    Args:
      reconstruction, images: (B,S,S,3), constants.
      reconstruction_gradient: of the picture terms by the reconstruction.

    Returns:
      `generator`, `discriminator` and `adaptive_weight`, 0 before the start; the weighted term of the generator; its
      gradient by the reconstruction; the gradient of the discriminator's loss by its parameters.
    """
    judge, params, to_kernel, step = adversary

    def on() -> tuple[Metrics, jax.Array, jax.Array, Tree]:
        term, gradient = jax.value_and_grad(lambda picture: generator_loss(judge(params, picture)))(reconstruction)
        weight = adaptive_weight(to_kernel(reconstruction_gradient), to_kernel(gradient))

        def own_loss(params: Tree) -> jax.Array:
            return hinge_discriminator_loss(judge(params, images), judge(params, reconstruction))

        loss, own_gradient = jax.value_and_grad(own_loss)(params)
        metrics = {"generator": term, "discriminator": loss, "adaptive_weight": weight}
        factor = adversarial_factor(step, config) * weight
        return metrics, factor * term, factor * gradient, own_gradient

    def off() -> tuple[Metrics, jax.Array, jax.Array, Tree]:
        return jax.tree.map(lambda made: jnp.zeros(made.shape, made.dtype), jax.eval_shape(on))

    return jax.lax.cond(jnp.asarray(step) >= config.adversarial_start, on, off)


@jax.custom_vjp
def _with_gradient(value: jax.Array, inputs: Any, gradient: Any) -> jax.Array:
    """`value`, whose gradient by the tree `inputs` is `gradient`, which has been computed with it."""
    return value


_with_gradient.defvjp(
    lambda value, inputs, gradient: (value, gradient),
    lambda gradient, d: (None, jax.tree.map(lambda g: d * g, gradient), None),
)


def generator_terms(
    config: TokenizerLossConfig,
    reconstruction: jax.Array,
    images: jax.Array,
    latents: jax.Array,
    fhats: jax.Array | Sequence[jax.Array],
    *,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    adversary: Adversary | None = None,
) -> tuple[jax.Array, Metrics]:
    """The tokenizer's whole loss: pixels + vq + perceptual + adversarial, each with its weight from `config`.

    Args:
      config: the weights.
      reconstruction, images: (B,S,S,3), the first one differentiable.
      latents, fhats: see `vq_loss`.
      perceptual: (reconstruction, images) → (B,) distances; None leaves the term out.
      adversary: None leaves the adversarial terms out. The gradient of the loss by its parameters is that of the
        discriminator's own loss, which is no part of the value.

    Returns:
      loss, and the terms before weighting by name: `pixel`, `vq`, and where on `perceptual`, `generator`,
      `discriminator`, `adaptive_weight`. All float32 scalars.
    """

    def picture_loss(picture: jax.Array) -> tuple[jax.Array, Metrics]:
        terms = {"pixel": pixel_loss(picture, images, l1=config.l1, l2=config.l2)}
        if perceptual is None:
            return terms["pixel"], terms
        terms["perceptual"] = jnp.mean(perceptual(picture, images))
        return terms["pixel"] + config.perceptual * terms["perceptual"], terms

    if adversary is None:
        loss, metrics = picture_loss(reconstruction)
    else:
        picture, still = stop_gradient(reconstruction), adversary._replace(params=stop_gradient(adversary.params))
        (loss, metrics), gradient = jax.value_and_grad(picture_loss, has_aux=True)(picture)
        terms, term, more, own = adversarial_terms(config, still, picture, images, gradient)
        loss = _with_gradient(loss + term, (reconstruction, adversary.params), (gradient + more, own))
        metrics |= terms
    metrics["vq"] = vq_loss(latents, fhats, config.commitment)
    return loss + config.vq * metrics["vq"], metrics
