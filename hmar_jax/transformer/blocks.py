"""(B,L,C), condition → (B,L,C): transformer blocks with AdaLN and QK-norm, stacked along a leading depth axis.

Axis letters: B batch, L tokens, C width, H heads, D head size, V codebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from hmar_jax.config import TransformerConfig
from hmar_jax.scales import ScaleLadder
from hmar_jax.transformer import fused
from hmar_jax.transformer.fused import Residual
from pallas_kernels import token_passes
from pallas_kernels.devices import BATCH_AXES, HEAD_AXES, automatic_axes, ways
from pallas_kernels.scale_attention import packed_scale_attention, scale_attention

Remat = Literal["dots", "all"]
# VAR's cap on the learned temperature of QK-norm.
_MAX_LOG_SCALE = math.log(100.0)
# What a condition makes of norms and gates: some (…,B,1,C) float32.
Modulation = tuple[jax.Array, ...]


def weight_init(width: int, factor: float = 1.0) -> nnx.Initializer:
    """Normal of standard deviation sqrt(1/(3C)), times `factor`; VAR's truncation at ±2 lies beyond 39 deviations."""
    init = jax.nn.initializers.normal(math.sqrt(1 / (3 * width)))
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: factor * init(key, shape, dtype)


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Stochastic depth: zeroes a branch for a share `rate` of the samples, scaling the others to keep the mean."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


def split_by_sample[T](arrays: T) -> T:
    """A tree of arrays (B,…), each split over the mesh in use as a batch is, where there is one and it divides.

    XLA, left to choose, may split them as the parameters are instead, and then exchanges activations.
    """
    if not automatic_axes():
        return arrays
    parts, spec = ways(BATCH_AXES), PartitionSpec(automatic_axes(BATCH_AXES))
    return jax.tree.map(lambda x: x if x.shape[0] % parts else jax.lax.with_sharding_constraint(x, spec), arrays)


def _by_head(columns: jax.Array, heads: int) -> jax.Array:
    """(…,3HD), q, k and v of all heads → those of the first heads, of the next …: a part for each way of `tensor`.

    The columns of a product are then split as attention splits heads, where the mesh in use has that axis.
    """
    count = _tensor_ways(heads)
    if count == 1:
        return columns
    parts = columns.reshape(*columns.shape[:-1], 3, count, -1).swapaxes(-3, -2).reshape(columns.shape)
    free = [PartitionSpec.UNCONSTRAINED] * (columns.ndim - 1)
    return jax.lax.with_sharding_constraint(parts, PartitionSpec(*free, HEAD_AXES))


def _from_by_head(columns: jax.Array, heads: int) -> jax.Array:
    """What `_by_head` gives → (…,3,H,D)."""
    parts = columns.reshape(*columns.shape[:-1], _tensor_ways(heads), 3, -1).swapaxes(-3, -2)
    return parts.reshape(*columns.shape[:-1], 3, heads, -1)


def _tensor_ways(heads: int) -> int:
    """Parts that the mesh in use splits heads into."""
    count = ways(HEAD_AXES)
    return count if heads % count == 0 else 1


class KeysValues(NamedTuple):
    """What attention remembers of tokens, before any normalisation: (B,N,H,D) each in one block, and with a leading
    depth axis in a stack.
    """

    k: jax.Array
    v: jax.Array


class Stream(NamedTuple):
    """The residual stream between two blocks: tokens, and perhaps a branch whose addition to them is deferred.

    A block ends in the sum x + gate·(y + bias), and the next block begins with a norm of that sum:

        added at once   x, y ─[add]─► sum ─┬───────────► residual stream      two kernels: the sum is written,
                                           └─[norm]────► matrix product       and read again for its norm

        deferred        x, y ─[add and norm]─┬─► sum ──► residual stream      one kernel
                                             └─────────► matrix product

    Attributes:
      x: (B,L,C). deferred: y, bias and gate of the branch; None where x is the sum.
    """

    x: jax.Array
    deferred: Residual | None = None

    def added(self) -> jax.Array:
        """The sum, (B,L,C)."""
        return self.x if self.deferred is None else split_by_sample(fused.add_gated(self.x, self.deferred))


class Attention(nnx.Module):
    """Multi-head scale attention; q and k are L2-normalised and q scaled by a learned factor per head."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, init = config.width, weight_init(config.width)
        self.pattern, self.heads = config.pattern, config.heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((width,)))
        self.v_bias = nnx.Param(jnp.zeros((width,)))
        self.log_scale = nnx.Param(jnp.full((config.heads,), math.log(4.0)))
        proj_init = weight_init(width, 1 / math.sqrt(2 * config.depth))
        self.proj = nnx.Linear(width, width, kernel_init=proj_init, dtype=dtype, rngs=rngs)

    def __call__(self, qkv: jax.Array, ladder: ScaleLadder, past: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        """Attention among tokens x, without the bias of `proj`, which `fused.norm_linear` adds.

        Args:
          qkv: x @ `qkv`, (B,N,3C). past: keys and values of all tokens before x.

        Returns:
          (B,N,C); and the keys and values of x.
        """
        q_bias, v_bias = (bias[...].astype(jnp.float32) for bias in (self.q_bias, self.v_bias))
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        qkv = _from_by_head(fused.add_bias(qkv, _by_head(bias, self.heads)), self.heads)
        q_scale = jnp.exp(jnp.minimum(self.log_scale[...], _MAX_LOG_SCALE))
        own = KeysValues(qkv[:, :, 1], qkv[:, :, 2])
        if ladder.length == 1:
            attended = own.v  # a token by itself attends to itself
        elif past is None:
            attended = packed_scale_attention(qkv, ladder, pattern=self.pattern, q_scale=q_scale)
        else:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, own, strict=True))
            attended = scale_attention(qkv[:, :, 0], k, v, ladder, pattern=self.pattern, q_scale=q_scale)
        return attended.reshape(*qkv.shape[:2], -1) @ _kernel(self.proj), own


class Block(nnx.Module):
    """Attention and feed-forward, both modulated and gated by the condition (AdaLN-Zero, Peebles & Xie 2023).

    x += g1·attn(LN(x)(1+s1)+b1); x += g2·ffn(LN(x)(1+s2)+b2), where (g1,g2,s1,s2,b1,b2) is Linear(SiLU(cond)), or a
    projection that all blocks share plus this block's own offset.
    """

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = config.width, config.mlp_ratio * config.width
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, hidden, kernel_init=weight_init(width), dtype=dtype, rngs=rngs)
        out_init = weight_init(width, 1 / math.sqrt(2 * config.depth))
        self.fc2 = nnx.Linear(hidden, width, kernel_init=out_init, dtype=dtype, rngs=rngs)
        rows = jnp.asarray([config.gate_init] * 2 + [0.5] * 4)[:, None]
        if config.shared_adaln:  # an offset has no fan-in to add up: a deviation of 1/√C before the factors
            self.adaln_offset = nnx.Param(weight_init(width, math.sqrt(3))(rngs.params(), (6, width)) * rows)
        else:
            init = weight_init(width)(rngs.params(), (width, 6, width)) * rows
            self.adaln = nnx.Linear(width, 6 * width, dtype=jnp.float32, rngs=rngs)
            self.adaln.kernel[...] = init.reshape(width, 6 * width)

    def modulation(self, cond: jax.Array) -> Modulation:
        """g1, g2, s1, s2, b1, b2, (B,1,C) float32 each, of SiLU(cond) (B,C) or its shared projection (B,6C)."""
        six = self.adaln(cond) if hasattr(self, "adaln") else cond + self.adaln_offset[...].reshape(-1)
        return tuple(fused.row_major(part) for part in jnp.split(six[:, None], 6, axis=-1))

    def __call__(
        self,
        tokens: Stream,
        modulation: Modulation,
        ladder: ScaleLadder,
        *,
        drop: tuple[jax.Array, jax.Array] | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Stream, KeysValues]:
        """One block; the addition of its last branch is deferred.

        Args:
          tokens: (B,L,C), or with `past` the last of the L tokens. ladder: the scales that L is joined from.
          modulation: what the method of that name gives.
          drop: rate and key of drop-path; None when not training.
          past: this block's keys and values of all tokens before these.

        Returns:
          As tokens; and the keys and values of its tokens.
        """
        g1, g2, s1, s2, b1, b2 = modulation
        if drop is not None:  # a dropped branch has closed gates
            g1, g2 = (drop_path(gate, drop[0], jax.random.fold_in(drop[1], i)) for i, gate in enumerate((g1, g2)))
        x, qkv = fused.norm_linear(*tokens, s1, b1, _by_head(_kernel(self.attention.qkv), self.attention.heads))
        attended, own = self.attention(qkv, ladder, past)
        branch = Residual(attended, _bias(self.attention.proj), g1)
        x, hidden = fused.norm_linear(x, branch, s2, b2, _kernel(self.fc1))
        x = split_by_sample(x)
        out = fused.gelu_linear(hidden, _bias(self.fc1), _kernel(self.fc2))
        return Stream(x, Residual(out, _bias(self.fc2), g2)), own


def _kernel(layer: nnx.Linear) -> jax.Array:
    """The weights of a layer in its compute dtype."""
    return layer.kernel[...].astype(layer.dtype)


def _bias(layer: nnx.Linear) -> jax.Array:
    assert layer.bias is not None
    return layer.bias[...].astype(jnp.float32)


class Stack(nnx.Module):
    """Blocks one after the other; their parameters carry a leading axis of length `depth`.

    Args:
      remat: see `TrainConfig`. scan: run them as one loop.
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
        scan: bool,
        rngs: nnx.Rngs,
    ):
        self.remat, self.scan, self.depth = remat, scan, depth
        ramp = max(config.depth - 1, 1)
        self.drop_rates = tuple(config.drop_path * (first + i) / ramp for i in range(depth))
        if depth:
            create = nnx.vmap(lambda rngs: Block(config, dtype=dtype, rngs=rngs))
            self.blocks = create(rngs.split(depth))

    def __call__(
        self, x: jax.Array, modulations: Modulation, ladder: ScaleLadder, key: jax.Array | None = None
    ) -> jax.Array:
        """(B,L,C) → (B,L,C), with `modulations` of all blocks. With `key` it is training: drop-path is on."""
        if not self.depth:
            return x
        graphdef, stacked = nnx.split(self.blocks)
        drops = None if key is None else (jnp.asarray(self.drop_rates), jax.random.split(key, self.depth))
        layers = (stacked, modulations, drops)
        # The gradient stores what goes from block to block: in training the sum alone, not x and a branch.
        defers = key is None and self._defers(x)

        def step(carry: Stream, layer: tuple) -> tuple[Stream, None]:
            x, deferred = carry
            params, modulation, drop = layer
            x, modulation = split_by_sample((x, modulation))
            after, _ = nnx.merge(graphdef, params)(Stream(fused.row_major(x), deferred), modulation, ladder, drop=drop)
            x, deferred = after if defers else Stream(after.added())
            # Without the barrier XLA also keeps the sum in float32, or computes earlier sums again in each block.
            return Stream(jax.lax.optimization_barrier(x), deferred), None

        if self.remat == "all":
            step = jax.checkpoint(step, prevent_cse=not self.scan)
        return self._run(step, Stream(x), layers).added()

    def _defers(self, x: jax.Array) -> bool:
        """Whether blocks defer their last branch: where one kernel computes a sum and its norm, and blocks do not run
        in a loop, whose carry would need a branch before the first block.
        """
        return not self.scan and token_passes.adds(x)

    def _run[T](self, step: Callable[[T, Any], tuple[T, None]], carry: T, layers: Any) -> T:
        """Applies a step to each block's slice of `layers` (leading axis: depth) in turn, in a loop if `scan`."""
        if self.scan:
            return jax.lax.scan(step, carry, layers)[0]
        step = jax.jit(step)  # traced once, or twice if the first carry has no branch, instead of once a block
        leaves, treedef = jax.tree.flatten(layers)
        for layer in zip(*map(jnp.unstack, leaves), strict=True):
            carry, _ = step(carry, jax.tree.unflatten(treedef, layer))
        return carry

    def modulations(self, cond: jax.Array) -> Modulation:
        """`Block.modulation` of all blocks at once, with a leading depth axis."""
        if not self.depth:
            return ()
        graphdef, stacked = nnx.split(self.blocks)
        # Else XLA makes one product of all blocks' and transposes their weights for it.
        conds = jax.lax.optimization_barrier(jnp.broadcast_to(cond, (self.depth, *cond.shape)))
        return jax.vmap(lambda params, cond: nnx.merge(graphdef, params).modulation(cond))(stacked, conds)

    def extend(
        self, x: jax.Array, modulations: Modulation, ladder: ScaleLadder, cache: KeysValues
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
        known, defers = ladder.length - x.shape[1], self._defers(x)

        def step(carry: tuple[Stream, KeysValues], layer: tuple) -> tuple[tuple[Stream, KeysValues], None]:
            tokens, cache = carry
            params, modulation, i = layer
            here = (i, 0, 0, 0, 0)
            past = [jax.lax.dynamic_slice(c, here, (1, c.shape[1], known, *c.shape[3:]))[0] for c in cache]
            after, own = nnx.merge(graphdef, params)(tokens, modulation, ladder, past=KeysValues(*past))
            after = after if defers else Stream(after.added())
            # Carried, not stacked by a scan, the cache is written where it is.
            where = (i, 0, known, 0, 0)
            pairs = zip(cache, own, strict=True)
            return (after, KeysValues(*(jax.lax.dynamic_update_slice(c, o[None], where) for c, o in pairs))), None

        layers = (stacked, modulations, jnp.arange(self.depth))
        tokens, cache = self._run(step, (Stream(x), cache), layers)
        return tokens.added(), cache


class Head(nnx.Module):
    """LN(x)(1+scale)+shift with (scale, shift) = Linear(SiLU(cond)), then Linear(V), which sums in float32."""

    def __init__(self, config: TransformerConfig, codebook_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.width
        self.adaln = nnx.Linear(width, 2 * width, kernel_init=weight_init(width, 0.5), dtype=jnp.float32, rngs=rngs)
        self.linear = nnx.Linear(width, codebook_size, kernel_init=weight_init(width, 0.02), dtype=dtype, rngs=rngs)

    def modulation(self, cond: jax.Array) -> Modulation:
        """Scale and shift, (B,1,C) float32 each, of SiLU(cond) (B,C)."""
        return tuple(fused.row_major(part) for part in jnp.split(self.adaln(cond)[:, None], 2, axis=-1))

    def __call__[T](self, x: jax.Array, modulation: Modulation, output: fused.Output[T]) -> T:
        """The output for tokens (B,N,C)."""
        with jax.named_scope("head"):  # as profiles call it
            x = fused.modulated_norm(*split_by_sample((x, *modulation)))
            return output(x, _kernel(self.linear), _bias(self.linear))
