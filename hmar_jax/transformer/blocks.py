"""(B,L,C), condition → (B,L,C): transformer blocks with AdaLN and QK-norm, stacked along a leading depth axis.

Axis letters: B batch, L tokens, C width, H heads, D head size, V codebook.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hmar_jax.config import TransformerConfig
from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention import packed_scale_attention, scale_attention

Remat = Literal["none", "dots", "all"]
_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "all": None}
# VAR's cap on the learned temperature of QK-norm.
_MAX_LOG_SCALE = math.log(100.0)


def weight_init(width: int, factor: float = 1.0) -> nnx.Initializer:
    """Normal of standard deviation sqrt(1/(3C)), times `factor`; VAR's truncation at ±2 lies beyond 39 deviations."""
    init = jax.nn.initializers.normal(math.sqrt(1 / (3 * width)))
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: factor * init(key, shape, dtype)


def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """LN(x)(1+scale)+shift without affine parameters, eps 1e-6, in float32; scale and shift are (B,1,C)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * (1 + scale) + shift


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Stochastic depth: zeroes a branch for a share `rate` of the samples, scaling the others to keep the mean."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


class KeysValues(NamedTuple):
    """What attention remembers of tokens, before any normalisation: (B,N,H,D) each in one block, and with a leading
    depth axis in a stack.
    """

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """Multi-head scale attention; q and k are L2-normalised and q scaled by a learned factor per head."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, init = config.width, weight_init(config.width)
        self.pattern, self.heads, self.dtype = config.pattern, config.heads, dtype
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((width,)))
        self.v_bias = nnx.Param(jnp.zeros((width,)))
        self.log_scale = nnx.Param(jnp.full((config.heads,), math.log(4.0)))
        proj_init = weight_init(width, 1 / math.sqrt(2 * config.depth))
        self.proj = nnx.Linear(width, width, kernel_init=proj_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, ladder: ScaleLadder, past: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        """(B,N,C) → (B,N,C), and the keys and values of these tokens; `past` are those of all tokens before them."""
        bias = jnp.concatenate([self.q_bias[...], jnp.zeros_like(self.q_bias[...]), self.v_bias[...]])
        qkv = self.qkv(x) + bias.astype(self.dtype)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
        scale = jnp.exp(jnp.minimum(self.log_scale[...], _MAX_LOG_SCALE))
        own = KeysValues(qkv[:, :, 1], qkv[:, :, 2])
        if past is None:
            attended = packed_scale_attention(qkv, ladder, pattern=self.pattern, q_scale=scale)
        else:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, own, strict=True))
            attended = scale_attention(qkv[:, :, 0], k, v, ladder, pattern=self.pattern, q_scale=scale)
        return self.proj(attended.reshape(x.shape)), own


class Block(nnx.Module):
    """Attention and feed-forward, both modulated and gated by the condition (AdaLN-Zero, Peebles & Xie 2023).

    x += g1·attn(LN(x)(1+s1)+b1); x += g2·ffn(LN(x)(1+s2)+b2), where (g1,g2,s1,s2,b1,b2) is Linear(SiLU(cond)), or a
    projection that all blocks share plus this block's own offset.
    """

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = config.width, config.mlp_ratio * config.width
        self.dtype = dtype
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, hidden, kernel_init=weight_init(width), dtype=dtype, rngs=rngs)
        out_init = weight_init(width, 1 / math.sqrt(2 * config.depth))
        self.fc2 = nnx.Linear(hidden, width, kernel_init=out_init, dtype=dtype, rngs=rngs)
        rows = jnp.asarray([config.gate_init] * 2 + [0.5] * 4)[:, None]
        if config.shared_adaln:
            self.adaln_offset = nnx.Param(weight_init(width)(rngs.params(), (6, width)) * rows)
        else:
            init = weight_init(width)(rngs.params(), (width, 6, width)) * rows
            self.adaln = nnx.Linear(width, 6 * width, dtype=jnp.float32, rngs=rngs)
            self.adaln.kernel[...] = init.reshape(width, 6 * width)

    def __call__(
        self,
        x: jax.Array,
        modulation: jax.Array,
        ladder: ScaleLadder,
        *,
        drop: tuple[jax.Array, jax.Array] | None = None,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """One block.

        Args:
          x: (B,L,C), or with `past` the last of the L tokens. ladder: the scales that L is joined from.
          modulation: SiLU(cond) (B,C), or with a shared AdaLN its projection (B,6C), float32.
          drop: rate and key of drop-path; None when not training.
          past: this block's keys and values of all tokens before x.

        Returns:
          As x; and the keys and values of its tokens.
        """
        if hasattr(self, "adaln"):
            six = self.adaln(modulation).reshape(x.shape[0], 6, 1, -1)
        else:
            six = (modulation.reshape(x.shape[0], 6, -1) + self.adaln_offset[...])[:, :, None]
        g1, g2, s1, s2, b1, b2 = jnp.moveaxis(six, 1, 0)
        h, own = self.attention(layer_norm(x, s1, b1).astype(self.dtype), ladder, past)
        h = h * g1.astype(self.dtype)
        x = x + (h if drop is None else drop_path(h, drop[0], jax.random.fold_in(drop[1], 0)))
        h = self.fc1(layer_norm(x, s2, b2).astype(self.dtype))
        h = self.fc2(nnx.gelu(h, approximate=True)) * g2.astype(self.dtype)
        return x + (h if drop is None else drop_path(h, drop[0], jax.random.fold_in(drop[1], 1))), own


class Stack(nnx.Module):
    """Blocks run one after the other by `scan`; their parameters carry a leading axis of length `depth`.

    Args:
      first: index of the first block in the whole model, for its share of the linear drop-path ramp.
    """

    def __init__(
        self,
        config: TransformerConfig,
        depth: int,
        first: int,
        *,
        dtype: DTypeLike,
        remat: Remat,
        rngs: nnx.Rngs,
    ):
        self.remat, self.depth = remat, depth
        ramp = max(config.depth - 1, 1)
        self.drop_rates = tuple(config.drop_path * (first + i) / ramp for i in range(depth))
        if depth:
            create = nnx.vmap(lambda rngs: Block(config, dtype=dtype, rngs=rngs))
            self.blocks = create(rngs.split(depth))

    def __call__(
        self, x: jax.Array, modulation: jax.Array, ladder: ScaleLadder, key: jax.Array | None = None
    ) -> jax.Array:
        """(B,L,C) → (B,L,C). With `key` it is training: drop-path is on."""
        if not self.depth:
            return x
        graphdef, stacked = nnx.split(self.blocks)
        drops = None if key is None else (jnp.asarray(self.drop_rates), jax.random.split(key, self.depth))

        def step(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            params, drop = layer
            return nnx.merge(graphdef, params)(x, modulation, ladder, drop=drop)[0], None

        if self.remat != "none":
            step = jax.checkpoint(step, policy=_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(step, x, (stacked, drops))[0]

    def extend(
        self, x: jax.Array, modulation: jax.Array, ladder: ScaleLadder, cache: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        """As `__call__` for the last tokens of `ladder` alone, those before being in the cache.

        Args:
          x: (B,N,C). cache: (depth,B,·,H,D) each, with room for all tokens to come.

        Returns:
          (B,N,C), and the cache with these tokens in it.
        """
        if not self.depth:
            return x, cache
        graphdef, stacked = nnx.split(self.blocks)
        known = ladder.length - x.shape[1]

        def step(carry: tuple[jax.Array, KeysValues], layer: tuple) -> tuple[tuple[jax.Array, KeysValues], None]:
            x, cache = carry
            params, i = layer
            here = (i, 0, 0, 0, 0)
            past = [jax.lax.dynamic_slice(c, here, (1, x.shape[0], known, *c.shape[3:]))[0] for c in cache]
            x, own = nnx.merge(graphdef, params)(x, modulation, ladder, past=KeysValues(*past))
            # Carried, not stacked by the scan, the cache is written where it is.
            after = (i, 0, known, 0, 0)
            pairs = zip(cache, own, strict=True)
            return (x, KeysValues(*(jax.lax.dynamic_update_slice(c, o[None], after) for c, o in pairs))), None

        return jax.lax.scan(step, (x, cache), (stacked, jnp.arange(self.depth)))[0]


class Head(nnx.Module):
    """Logits in float32: LN(x)(1+scale)+shift with (scale, shift) = Linear(SiLU(cond)), then Linear(V)."""

    def __init__(self, config: TransformerConfig, codebook_size: int, *, rngs: nnx.Rngs):
        width = config.width
        linear = functools.partial(nnx.Linear, dtype=jnp.float32, rngs=rngs)
        self.adaln = linear(width, 2 * width, kernel_init=weight_init(width, 0.5))
        self.linear = linear(width, codebook_size, kernel_init=weight_init(width, 0.02))

    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.adaln(nnx.silu(cond))[:, None], 2, axis=-1)
        return self.linear(layer_norm(x, scale, shift))
