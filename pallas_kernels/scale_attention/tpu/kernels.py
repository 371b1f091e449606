"""What a TPU core computes of one pair of tiles, forward and backward.

Axis letters: N queries and M keys of a tile, G groups of heads of a step, W lanes of a group, P heads of a group, D
head size, C = G·W channels of a step. `tpu` says why things lie as they do.

A tile may reach beyond L. What was read there is undefined, NaN for all we know, which a zero weight does not keep
out of a sum: `_zero_beyond` does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.scale_attention.tpu import tiles
from pallas_kernels.scale_attention.tpu.tiles import TpuBlocks

LOG2E = math.log2(math.e)  # is folded into q, so that logits are in base 2 and exp2 gives weights
LOWEST = -1e30  # where running maxima start: finite, so that a hidden logit, -inf, weighs exp2(-inf) = 0 from the start

Ref = Any  # what Pallas passes to a kernel


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static of a call, and the sizes that follow.

    Attributes:
      ranges: the bytes of key_ranges, (L,2) int32.
      heads, size: H, filled up to whole groups, and D.
      dtype: of q, k, v and the operands of products.
      normalize: whether q and k are L2-normalised.
      blocks: sizes of the tiles.
      interpret: for `pl.pallas_call`.
    """

    ranges: bytes
    heads: int
    size: int
    dtype: np.dtype
    normalize: bool
    blocks: TpuBlocks
    interpret: Any

    @functools.cached_property
    def key_ranges(self) -> np.ndarray:
        return np.frombuffer(self.ranges, np.int32).reshape(-1, 2)

    @property
    def length(self) -> int:
        """L."""
        return len(self.key_ranges)

    @property
    def padded(self) -> int:
        """L up to whole tiles of queries."""
        return -(-self.length // self.blocks.queries) * self.blocks.queries

    @property
    def width(self) -> int:
        """W."""
        return max(self.size, 128)

    @property
    def per_group(self) -> int:
        """P."""
        return self.width // self.size

    @property
    def all_groups(self) -> int:
        return self.heads // self.per_group

    @property
    def groups(self) -> int:
        """G: as the blocks say, or the next smaller number that divides all groups."""
        return max(n for n in range(1, min(self.blocks.groups, self.all_groups) + 1) if self.all_groups % n == 0)

    def tile_list(self, order: tiles.Order) -> np.ndarray:
        return tiles.tile_list(self.key_ranges, self.blocks.queries, self.blocks.keys, order)


def forward_kernel(
    problem: Problem,
    pairs: Ref,
    factors: Ref,
    ranges: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    out: Ref,
    lse: Ref,
    q_heads: Ref,
    highest: Ref,
    total: Ref,
    values: Ref,
) -> None:
    """A running softmax over the key tiles of a query tile.

    Args:
      problem: the static rest.
      pairs: (3,T) int32 in SMEM, see `tile_list`, by queries.
      factors: (1,C) float32, what q is multiplied by.
      ranges: (2,N) int32, first key of each query and the one after its last.
      q, out: (N,C).
      k, v: (M,C).
      lse: (G,P,N) float32, base 2.
      q_heads: (G,P,N,W) scratch, each head of q with zeros in the lanes of the others.
      highest, total: (G,P,N) float32 scratch, maximum of the logits and sum of weights so far.
      values: (G,W,N) float32 scratch, sum of weighted values so far.
    """
    step = pl.program_id(2)
    query, key, flags = (pairs[row, step] for row in (tiles.QUERY, tiles.KEY, tiles.FLAGS))

    @pl.when(flags & tiles.FIRST_OF_QUERIES != 0)
    def _() -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            scaled = _scaled_queries(problem, q, factors, group, query)
            for head in range(problem.per_group):
                q_heads[group, head] = _only_head(scaled, head, problem.size)

        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def visit(hidden: jax.Array | None) -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            k_group, v_group = _scaled_keys(problem, k, group), v[:, _lanes(problem, group)]
            if hidden is not None:  # the tile with the last keys never goes without a mask
                v_group = _zero_beyond(v_group, problem.length, key)
            v_transposed = v_group.T
            for head in range(problem.per_group):
                row, own = pl.ds(head, 1), slice(head * problem.size, (head + 1) * problem.size)
                logits = _logits(k_group, q_heads[group, head], hidden)
                peak = jnp.maximum(highest[group, row], jnp.max(logits, axis=0, keepdims=True))
                decay, weights = jnp.exp2(highest[group, row] - peak), jnp.exp2(logits - peak)
                highest[group, row] = peak
                total[group, row] = decay * total[group, row] + jnp.sum(weights, axis=0, keepdims=True)
                attended = _dot(v_transposed[own], weights.astype(problem.dtype), (1, 0))
                values[group, own] = decay * values[group, own] + attended

    _masked_if_needed(problem, visit, ranges, key, flags)

    @pl.when(flags & tiles.LAST_OF_QUERIES != 0)
    def _() -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            heads = values[group].reshape(problem.per_group, problem.size, -1) / total[group][:, None]
            out[:, _lanes(problem, group)] = heads.reshape(problem.width, -1).T.astype(out.dtype)
            lse[group] = highest[group] + jnp.log2(total[group])


def backward_kernel(
    problem: Problem,
    pairs: Ref,
    factors: Ref,
    ranges: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    dout: Ref,
    lse: Ref,
    delta: Ref,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    dfactors: Ref,
    k_scaled: Ref,
    v_clean: Ref,
    dq_sum: Ref,
    dk_sum: Ref,
    dv_sum: Ref,
) -> None:
    """Cotangents, key tile by key tile; those of all queries grow meanwhile.

    Args:
      problem, factors, ranges, q, k, v, lse: as forward.
      pairs: (3,T) int32 in SMEM, see `tile_list`, by keys.
      dout: (N,C).
      delta: (G,P,N) float32, products of out and dout summed over D.
      dq: (L,C), all queries.
      dk, dv: (M,C).
      dfactors: (1,C) float32.
      k_scaled, v_clean: (M,C) scratch, keys as they enter products, values with zeros beyond L.
      dq_sum: (tiles of queries, G, W, N) float32 scratch, cotangents of scaled queries.
      dk_sum, dv_sum: (M,C) float32 scratch, cotangents of scaled keys and of values.
    """
    step = pl.program_id(2)
    query, key, flags = (pairs[row, step] for row in (tiles.QUERY, tiles.KEY, tiles.FLAGS))

    @pl.when(step == 0)
    def _() -> None:
        dfactors[...] = jnp.zeros_like(dfactors)

    @pl.when(flags & tiles.FIRST_OF_QUERIES != 0)
    def _() -> None:
        dq_sum[query] = jnp.zeros(dq_sum.shape[1:], jnp.float32)

    @pl.when(flags & tiles.FIRST_OF_KEYS != 0)
    def _() -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            k_scaled[:, lanes] = _zero_beyond(_scaled_keys(problem, k, group), problem.length, key)
            v_clean[:, lanes] = _zero_beyond(v[:, lanes], problem.length, key)

        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def visit(hidden: jax.Array | None) -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            q_group = _scaled_queries(problem, q, factors, group, query)
            dout_group = _zero_beyond(dout[:, lanes], problem.length, query)
            k_group, v_group = k_scaled[:, lanes], v_clean[:, lanes]
            k_transposed = k_group.T
            for head in range(problem.per_group):
                row, own = pl.ds(head, 1), slice(head * problem.size, (head + 1) * problem.size)
                q_head, dout_head = (_only_head(x, head, problem.size) for x in (q_group, dout_group))
                weights = jnp.exp2(_logits(k_group, q_head, hidden) - lse[group, row])
                dweights = _dot(v_group, dout_head, (1, 1))
                dlogits = (weights * (dweights - delta[group, row])).astype(problem.dtype)
                # Zeros in the lanes of other heads keep this head's sums in its own.
                dv_sum[:, lanes] += _dot(weights.astype(problem.dtype), dout_head, (1, 0))
                dk_sum[:, lanes] += _dot(dlogits, q_head, (1, 0))
                dq_sum[query, group, own] += _dot(k_transposed[own], dlogits, (1, 0))

    _masked_if_needed(problem, visit, ranges, key, flags)

    @pl.when(flags & tiles.LAST_OF_QUERIES != 0)
    def _() -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            x = _zero_beyond(q[:, lanes], problem.length, query).astype(jnp.float32)
            dscaled = dq_sum[query, group].T
            unit, dx = _unscale(problem, x, dscaled, factors[:, lanes])
            dfactors[:, lanes] += jnp.sum(unit * dscaled, axis=0, keepdims=True)
            _store_queries(problem, dq, dx.astype(dq.dtype), query, lanes)

    @pl.when(flags & tiles.LAST_OF_KEYS != 0)
    def _() -> None:
        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            # The queries carried LOG2E, and the cotangents of logits are of base e.
            _, dx = _unscale(problem, k[:, lanes].astype(jnp.float32), dk_sum[:, lanes], 1 / LOG2E)
            dk[:, lanes] = dx.astype(dk.dtype)

        dv[...] = dv_sum[...].astype(dv.dtype)


def _masked_if_needed(
    problem: Problem, visit: Callable[[jax.Array | None], None], ranges: Ref, key: jax.Array, flags: jax.Array
) -> None:
    """Runs `visit` on (M,N), which keys are hidden from which queries, or on None where none is."""

    @pl.when(flags & tiles.MASKED != 0)
    def _() -> None:
        shape = problem.blocks.keys, problem.blocks.queries
        index = lax.broadcasted_iota(jnp.int32, shape, 0) + key * problem.blocks.keys
        visit((index < ranges[pl.ds(0, 1)]) | (index >= ranges[pl.ds(1, 1)]))

    @pl.when(flags & tiles.MASKED == 0)
    def _() -> None:
        visit(None)


def _logits(k_group: jax.Array, q_head: jax.Array, hidden: jax.Array | None) -> jax.Array:
    """(M,N), base 2."""
    logits = _dot(k_group, q_head, (1, 1))
    return logits if hidden is None else jnp.where(hidden, -jnp.inf, logits)


def _scaled_queries(problem: Problem, q: Ref, factors: Ref, group: jax.Array, tile: jax.Array) -> jax.Array:
    """(N,W): a group's queries, such that their products with `_scaled_keys` are base-2 logits."""
    lanes = _lanes(problem, group)
    x = _zero_beyond(q[:, lanes], problem.length, tile).astype(jnp.float32)
    if problem.normalize:
        x *= _inverse_norms(x, problem.size)
    return (x * (factors[:, lanes] * LOG2E)).astype(problem.dtype)


def _scaled_keys(problem: Problem, k: Ref, group: jax.Array) -> jax.Array:
    """(M,W): a group's keys, normalised if asked."""
    keys = k[:, _lanes(problem, group)]
    if not problem.normalize:
        return keys
    x = keys.astype(jnp.float32)
    return (x * _inverse_norms(x, problem.size)).astype(problem.dtype)


def _unscale(
    problem: Problem, x: jax.Array, dscaled: jax.Array, factor: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """For scaled = factor·unit(x), unit(x) and the cotangent of x; unit changes nothing unless asked to normalise."""
    dunit = dscaled * factor
    if not problem.normalize:
        return x, dunit
    inverse = _inverse_norms(x, problem.size)
    unit = x * inverse
    along = jnp.where(inverse < 1e12, _sum_heads(unit * dunit, problem.size), 0)  # |x| below 1e-12 is no divisor
    return unit, inverse * (dunit - unit * along)


def _inverse_norms(x: jax.Array, size: int) -> jax.Array:
    """1 / max(|x|, 1e-12) of each head, in all of its lanes."""
    return lax.rsqrt(jnp.maximum(_sum_heads(x * x, size), 1e-24))


def _sum_heads(x: jax.Array, size: int) -> jax.Array:
    """Each head's sum over its lanes, in all of them."""
    sums = jnp.zeros_like(x)
    for head in range(x.shape[1] // size):
        own = jnp.sum(_only_head(x, head, size), axis=1, keepdims=True)
        sums = jnp.where(_of_head(x, head, size), own, sums)
    return sums


def _only_head(x: jax.Array, head: int, size: int) -> jax.Array:
    """Puts zeros into the lanes of the group's other heads."""
    return x if x.shape[1] == size else jnp.where(_of_head(x, head, size), x, jnp.zeros_like(x))


def _of_head(x: jax.Array, head: int, size: int) -> jax.Array:
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return (lane >= head * size) & (lane < (head + 1) * size)


def _zero_beyond(x: jax.Array, length: int, tile: jax.Array) -> jax.Array:
    """The rows of a tile, with zeros in place of those beyond L."""
    if length % len(x) == 0:
        return x
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + tile * len(x)
    return jnp.where(row < length, x, jnp.zeros_like(x))


def _store_queries(problem: Problem, target: Ref, x: jax.Array, tile: jax.Array, lanes: Any) -> None:
    """Writes the rows (N,W) of a tile, but for those beyond L, to their place among all."""
    rows = problem.blocks.queries
    whole, rest = divmod(problem.length, rows)

    def store_rows() -> None:
        target[pl.ds(pl.multiple_of(tile * rows, rows), rows), lanes] = x

    def store_rest() -> None:
        target[pl.ds(whole * rows, rest), lanes] = x[:rest]

    if whole:
        pl.when(tile < whole)(store_rows)
    if rest:
        pl.when(tile == whole)(store_rest)


def _lanes(problem: Problem, group: jax.Array) -> Any:
    """Where a group lies among the channels of a step."""
    return pl.ds(pl.multiple_of(group * problem.width, problem.width), problem.width)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contracts an axis of a with one of b, into float32; float32 operands keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
