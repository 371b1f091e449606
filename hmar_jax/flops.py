"""config → the FLOPs that a training step is worth, and those that Pallas kernels hide from XLA.

A multiplication and an addition are two FLOPs. Axis letters: B batch, L tokens, C width, V codebook, p side of a scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.config import ModelConfig, TrainConfig, TransformerConfig
from hmar_jax.sampling.schedule import Plan
from pallas_kernels.scale_attention import api

# A backward pass is two forward passes; FlashAttention's computes the logits anew besides.
_BACKWARD, _KERNEL_BACKWARD = 2.0, 2.5


def model_flops(config: TrainConfig, model: ModelConfig) -> dict[str, float]:
    """What a step of a transformer stage computes at least, over all devices, by part.

    `blocks`: 2(4+2r)C² a token and block forward (r is mlp_ratio; 24C² at 4), `attention`: 4C for each query and key
    that see each other, `head`: 2CV a token. The backward pass counts twice the forward one, and nothing in the frozen
    trunk of stage `masked`. Nothing counts twice because it is recomputed; AdaLN (under 0.1%), embeddings, norms and
    the quantizer do not count at all. Empty for stage `tokenizer`.
    """
    if model.transformer is None:
        return {}
    transformer, tokens = model.transformer, config.batch_size * model.ladder.length
    return {
        "blocks": _block(transformer) * tokens * _passes(config, transformer, _BACKWARD),
        "attention": _attention(model, config.batch_size) * _passes(config, transformer, _BACKWARD),
        "head": _head(model, transformer) * tokens * (1 + _BACKWARD),
    }


def sample_flops(model: ModelConfig, plan: Plan) -> list[dict[str, float]]:
    """What each pass computes at least to draw one picture, in the order of passes, by part, as `model_flops` counts.

    `trunk`, `branch`, `attention` (of both) and `head` are the conditional half; `null` is all that guidance adds, in
    VAR to every pass if any is guided, since its null half has keys of its own to keep.
    """
    transformer = model.transformer
    assert transformer is not None
    passes = []
    for scale, length in enumerate(model.ladder.lengths):
        half = {
            "trunk": _block(transformer) * length * transformer.trunk_depth,
            "branch": _block(transformer) * length * transformer.branch_depth,
            "attention": 4.0 * transformer.width * length * _seen(model, scale) * transformer.depth,
            "head": _head(model, transformer) * length,
        }
        for step in plan.passes(scale):
            guided = any(map(any, plan.guided)) if transformer.is_var else step.guided
            passes.append(half | {"null": sum(half.values()) if guided else 0.0})
    return passes


def train_kernel_flops(config: TrainConfig, model: ModelConfig) -> tuple[str, float]:
    """How attention runs on the mesh in use, and the FLOPs of its kernels in a step: 0 where XLA sees them itself."""
    if model.transformer is None:
        return "", 0.0
    chosen = _chosen(model.transformer, config.dtype, config.batch_size, model.ladder.length)
    if chosen in ("xla", "reference"):
        return chosen, 0.0
    return chosen, _attention(model, config.batch_size) * _passes(config, model.transformer, _KERNEL_BACKWARD)


def sample_kernel_flops(model: ModelConfig, plan: Plan, dtype: str, batch: int) -> tuple[str, float]:
    """As `train_kernel_flops`, of drawing `batch` pictures: scale by scale, where small ones may be left to XLA."""
    assert model.transformer is not None
    names, total = [], 0.0
    for scale, length in enumerate(model.ladder.lengths):
        seen = _seen(model, scale)
        chosen = _chosen(model.transformer, dtype, batch, seen, length)
        names.append(chosen)
        if chosen not in ("xla", "reference"):
            halves = sum(2 if step.guided else 1 for step in plan.passes(scale))
            total += halves * 4.0 * batch * model.transformer.width * length * seen * model.transformer.depth
    return " and ".join(dict.fromkeys(names)), total


def _passes(config: TrainConfig, transformer: TransformerConfig, backward: float) -> float:
    """Runs of one block that a step comes to, in forward passes, summed over blocks."""
    trained = transformer.branch_depth if config.stage == "masked" else transformer.depth
    return transformer.depth + trained * backward


def _block(transformer: TransformerConfig) -> float:
    """FLOPs of one block's products for one token, forward."""
    return 2.0 * (4 + 2 * transformer.mlp_ratio) * transformer.width**2


def _head(model: ModelConfig, transformer: TransformerConfig) -> float:
    """FLOPs of the head for one token, forward."""
    return 2.0 * transformer.width * model.tokenizer.codebook_size


def _seen(model: ModelConfig, scale: int) -> int:
    """Keys that a query of one scale attends to."""
    assert model.transformer is not None
    return (model.ladder.until if model.transformer.is_var else model.ladder.only)(scale).length


def _attention(model: ModelConfig, batch: int) -> float:
    """FLOPs of one block's attention, forward."""
    assert model.transformer is not None
    ranges = model.ladder.key_ranges(model.transformer.pattern)
    return 4.0 * batch * model.transformer.width * float(np.sum(ranges[:, 1] - ranges[:, 0]))


def _chosen(transformer: TransformerConfig, dtype: str, batch: int, keys: int, queries: int | None = None) -> str:
    shape = (batch, queries or keys, transformer.heads, transformer.width // transformer.heads)
    return api.choose(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), keys)
