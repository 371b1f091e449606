"""two pictures → distance as people see it: LPIPS (Zhang et al. 2018, arXiv 1801.03924), VGG16 variant.

Axis letters: B batch, S pixels a side, h, w feature map, C feature channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hmar_jax.errors import InputError

PerceptualParams = dict[str, jax.Array]

# torchvision's numbers of VGG16's 3x3 convolutions. A stage ends in the features LPIPS compares; a max-pool follows.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_CHANNELS = (64, 128, 256, 512, 512)
# LPIPS's scaling layer: mean and standard deviation of ImageNet in [-1,1] units.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def file_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every entry of a weights file: OIHW convolutions, their biases, and (1,C,1,1) heads."""
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for stage, (convs, channels) in enumerate(zip(_STAGES, _CHANNELS, strict=True)):
        for conv in convs:
            shapes[f"features.{conv}.weight"] = (channels, inputs, 3, 3)
            shapes[f"features.{conv}.bias"] = (channels,)
            inputs = channels
        shapes[f"lin{stage}.model.1.weight"] = (1, channels, 1, 1)
    return shapes


def perceptual_distance(params: PerceptualParams, a: jax.Array, b: jax.Array) -> jax.Array:
    """LPIPS v0.1: per stage, the weighted squared difference of unit-length features, averaged over space; summed.

    Args:
      params: from `lpips_files.load_perceptual`.
      a, b: (B,S,S,3) float in [-1,1], S at least 16 (four max-pools). The gradient reaches both.

    Returns:
      (B,) float32 ≥ 0; 0 up to rounding where the pictures are equal.

    Raises:
      InputError: shapes differ, are not pictures', or are too small.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < 16:
        raise InputError(
            f"Perceptual distance got pictures of shapes {a.shape} and {b.shape}; it needs two equal (B,S,S,3) with "
            "S at least 16."
        )
    # Apart, not joined along B: joining would move pictures between devices, and a constant b needs no backward pass.
    pairs = zip(_features(params, a), _features(params, b), strict=True)
    distance = jnp.zeros(a.shape[0], jnp.float32)
    for stage, (x, y) in enumerate(pairs):
        head = params[f"lin{stage}.model.1.weight"].reshape(-1)
        distance += jnp.mean(jnp.sum(jnp.square(_unit(x) - _unit(y)) * head, axis=-1), axis=(1, 2))
    return distance


def _features(params: PerceptualParams, images: jax.Array) -> list[jax.Array]:
    """Each stage's last activations, (B,h,w,C) float32 with h = floor(S / 2^stage)."""
    x = (images.astype(jnp.float32) - _SHIFT) / _SCALE
    features = []
    for stage, convs in enumerate(_STAGES):
        if stage:
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        for conv in convs:
            kernel, bias = params[f"features.{conv}.weight"], params[f"features.{conv}.bias"]
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        features.append(x)
    return features


def _unit(x: jax.Array) -> jax.Array:
    """`x` at unit length along C. The epsilon keeps the gradient finite where all channels are 0."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)
