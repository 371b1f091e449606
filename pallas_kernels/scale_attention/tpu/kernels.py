"""What a TPU core computes of one pair of tiles, forward and backward.

Axis letters: N queries and M keys of a tile, G groups of heads of a step, W lanes of a group, P heads of a group, D
head size, C = G·W channels of a step. `attention` says why things lie as they do.

A tile may reach beyond L. What was read there is undefined, NaN for all we know, which a zero weight does not keep
out of a sum: `_zero_beyond` does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.scale_attention.tpu import tiles
from pallas_kernels.scale_attention.tpu.problem import Problem

LOG2E = math.log2(math.e)  # is folded into q, so that logits are in base 2 and exp2 gives weights
LOWEST = -1e30  # where running maxima start: finite, so that a hidden logit, -inf, weighs exp2(-inf) = 0 from the start

Ref = Any  # what Pallas passes to a kernel


class _Pair(NamedTuple):
    """The pair of tiles that a step of the grid works on: the step's number, two indices of tiles, and flags."""

    step: jax.Array
    query: jax.Array
    key: jax.Array
    flags: jax.Array

    @classmethod
    def of_this_step(cls, pairs: Ref) -> _Pair:
        """From the list in SMEM, (3,T) int32, see `tile_list`."""
        step = pl.program_id(2)
        return cls(step, *(pairs[row, step] for row in (tiles.QUERY, tiles.KEY, tiles.FLAGS)))

    def has(self, flag: int) -> jax.Array:
        return self.flags & flag != 0


def forward_kernel(problem: Problem, pairs: Ref, *refs: Ref) -> None:
    """A running softmax over the key tiles of a query tile; pairs are listed by queries.

    Steps, where queries 0 see keys 0 to 2 and queries 1 see keys 1 to 2:

        pair       q0 k0   q0 k1   q0 k2   q1 k1   q1 k2
        begin        x                       x             scale queries, clear sums
        visit        x       x       x       x       x     logits → weights → sums
        finish                       x               x     sums → out, lse

    Args:
      problem: the static rest.
      pairs: (3,T) int32 in SMEM, see `tile_list`.
      refs: the references of `_Forward`, in its order.
    """
    pair = _Pair.of_this_step(pairs)
    kernel = _Forward(problem, pair, *refs)
    pl.when(pair.has(tiles.FIRST_OF_QUERIES))(kernel.begin)
    _masked_if_needed(problem, kernel.visit, kernel.ranges, pair)
    pl.when(pair.has(tiles.LAST_OF_QUERIES))(kernel.finish)


@dataclasses.dataclass(frozen=True, eq=False)  # JAX looks up bodies of loops by their hash
class _Forward:
    """The parts of a step of `forward_kernel`.

    Attributes:
      factors: (1,C) float32, what q is multiplied by.
      ranges: (2,N) int32, first key of each query and the one after its last.
      q, out: (N,C).
      k, v: (M,C).
      lse: (G,P,N) float32, base 2.
      q_heads: (G,P,N,W) scratch, each head of q with zeros in the lanes of the others.
      highest, total: (G,P,N) float32 scratch, maximum of the logits and sum of weights so far.
      values: (G,W,N) float32 scratch, sum of weighted values so far.
    """

    problem: Problem
    pair: _Pair
    factors: Ref
    ranges: Ref
    q: Ref
    k: Ref
    v: Ref
    out: Ref
    lse: Ref
    q_heads: Ref
    highest: Ref
    total: Ref
    values: Ref

    def begin(self) -> None:
        """Scales the queries and clears the sums."""

        @pl.loop(0, self.problem.groups)
        def _(group: jax.Array) -> None:
            scaled = _scaled_queries(self.problem, self.q, self.factors, group, self.pair.query)
            for head in range(self.problem.per_group):
                self.q_heads[group, head] = _only_head(scaled, head, self.problem.size)

        self.highest[...] = jnp.full_like(self.highest, LOWEST)
        self.total[...] = jnp.zeros_like(self.total)
        self.values[...] = jnp.zeros_like(self.values)

    def visit(self, hidden: jax.Array | None) -> None:
        """Adds the keys and values of the pair to the sums; `hidden` is (M,N), None where all is visible."""
        problem, highest, total, values = self.problem, self.highest, self.total, self.values

        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            k_group, v_group = _scaled_keys(problem, self.k, group), self.v[:, _lanes(problem, group)]
            if hidden is not None:  # the tile with the last keys never goes without a mask
                v_group = _zero_beyond(v_group, problem.length, self.pair.key)
            v_transposed = v_group.T
            for head in range(problem.per_group):
                row, own = pl.ds(head, 1), slice(head * problem.size, (head + 1) * problem.size)
                logits = _logits(k_group, self.q_heads[group, head], hidden)
                peak = jnp.maximum(highest[group, row], jnp.max(logits, axis=0, keepdims=True))
                decay, weights = jnp.exp2(highest[group, row] - peak), jnp.exp2(logits - peak)
                highest[group, row] = peak
                total[group, row] = decay * total[group, row] + jnp.sum(weights, axis=0, keepdims=True)
                attended = _dot(v_transposed[own], weights.astype(problem.dtype), (1, 0))
                values[group, own] = decay * values[group, own] + attended

    def finish(self) -> None:
        """Stores the weighted means of values, and logsumexp."""
        problem = self.problem

        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            heads = self.values[group].reshape(problem.per_group, problem.size, -1) / self.total[group][:, None]
            self.out[:, _lanes(problem, group)] = heads.reshape(problem.width, -1).T.astype(self.out.dtype)
            self.lse[group] = self.highest[group] + jnp.log2(self.total[group])


def backward_kernel(problem: Problem, pairs: Ref, *refs: Ref) -> None:
    """Cotangents, key tile by key tile; those of all queries grow meanwhile. Pairs are listed by keys.

    Steps, where queries 0 see keys 0, queries 1 see keys 0 to 1, and queries 2 see keys 0 to 2:

        pair              q0 k0   q1 k0   q2 k0   q1 k1   q2 k1   q2 k2
        begin               x                                             clear dfactors
        begin_queries       x       x       x                             clear their part of dq_sum
        begin_keys          x                       x               x     scale keys, clear dk_sum and dv_sum
        visit               x       x       x       x       x       x     add to dq_sum, dk_sum, dv_sum
        finish_queries      x                       x               x     dq_sum → dq, dfactors
        finish_keys                         x               x       x     dk_sum, dv_sum → dk, dv

    Args:
      problem: the static rest.
      pairs: (3,T) int32 in SMEM, see `tile_list`.
      refs: the references of `_Backward`, in its order.
    """
    pair = _Pair.of_this_step(pairs)
    kernel = _Backward(problem, pair, *refs)
    pl.when(pair.step == 0)(kernel.begin)
    pl.when(pair.has(tiles.FIRST_OF_QUERIES))(kernel.begin_queries)
    pl.when(pair.has(tiles.FIRST_OF_KEYS))(kernel.begin_keys)
    _masked_if_needed(problem, kernel.visit, kernel.ranges, pair)
    pl.when(pair.has(tiles.LAST_OF_QUERIES))(kernel.finish_queries)
    pl.when(pair.has(tiles.LAST_OF_KEYS))(kernel.finish_keys)


@dataclasses.dataclass(frozen=True, eq=False)  # JAX looks up bodies of loops by their hash
class _Backward:
    """The parts of a step of `backward_kernel`.

    Attributes:
      factors, ranges, q, k, v, lse: as in `_Forward`.
      dout: (N,C).
      delta: (G,P,N) float32, products of out and dout summed over D.
      dq: (L,C), all queries.
      dk, dv: (M,C).
      dfactors: (1,C) float32.
      k_scaled, v_clean: (M,C) scratch, keys as they enter products, values with zeros beyond L.
      dq_sum: (tiles of queries, G, W, N) float32 scratch, cotangents of scaled queries.
      dk_sum, dv_sum: (M,C) float32 scratch, cotangents of scaled keys and of values.
    """

    problem: Problem
    pair: _Pair
    factors: Ref
    ranges: Ref
    q: Ref
    k: Ref
    v: Ref
    dout: Ref
    lse: Ref
    delta: Ref
    dq: Ref
    dk: Ref
    dv: Ref
    dfactors: Ref
    k_scaled: Ref
    v_clean: Ref
    dq_sum: Ref
    dk_sum: Ref
    dv_sum: Ref

    def begin(self) -> None:
        self.dfactors[...] = jnp.zeros_like(self.dfactors)

    def begin_queries(self) -> None:
        self.dq_sum[self.pair.query] = jnp.zeros(self.dq_sum.shape[1:], jnp.float32)

    def begin_keys(self) -> None:
        """Scales the keys, cleans the values and clears their sums."""
        problem, key = self.problem, self.pair.key

        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            self.k_scaled[:, lanes] = _zero_beyond(_scaled_keys(problem, self.k, group), problem.length, key)
            self.v_clean[:, lanes] = _zero_beyond(self.v[:, lanes], problem.length, key)

        self.dk_sum[...] = jnp.zeros_like(self.dk_sum)
        self.dv_sum[...] = jnp.zeros_like(self.dv_sum)

    def visit(self, hidden: jax.Array | None) -> None:
        """Adds what the pair contributes to all sums; `hidden` is (M,N), None where all is visible."""
        problem, query = self.problem, self.pair.query

        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            q_group = _scaled_queries(problem, self.q, self.factors, group, query)
            dout_group = _zero_beyond(self.dout[:, lanes], problem.length, query)
            k_group, v_group = self.k_scaled[:, lanes], self.v_clean[:, lanes]
            k_transposed = k_group.T
            for head in range(problem.per_group):
                row, own = pl.ds(head, 1), slice(head * problem.size, (head + 1) * problem.size)
                q_head, dout_head = (_only_head(x, head, problem.size) for x in (q_group, dout_group))
                weights = jnp.exp2(_logits(k_group, q_head, hidden) - self.lse[group, row])
                dweights = _dot(v_group, dout_head, (1, 1))
                dlogits = (weights * (dweights - self.delta[group, row])).astype(problem.dtype)
                # Zeros in the lanes of other heads keep this head's sums in its own.
                self.dv_sum[:, lanes] += _dot(weights.astype(problem.dtype), dout_head, (1, 0))
                self.dk_sum[:, lanes] += _dot(dlogits, q_head, (1, 0))
                self.dq_sum[query, group, own] += _dot(k_transposed[own], dlogits, (1, 0))

    def finish_queries(self) -> None:
        """Stores the cotangents of queries, and adds theirs of the factors."""
        problem, query = self.problem, self.pair.query

        @pl.loop(0, problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(problem, group)
            x = _zero_beyond(self.q[:, lanes], problem.length, query).astype(jnp.float32)
            dscaled = self.dq_sum[query, group].T
            unit, dx = _unscale(problem, x, dscaled, self.factors[:, lanes])
            self.dfactors[:, lanes] += jnp.sum(unit * dscaled, axis=0, keepdims=True)
            _store_queries(problem, self.dq, dx.astype(self.dq.dtype), query, lanes)

    def finish_keys(self) -> None:
        """Stores the cotangents of keys and values."""

        @pl.loop(0, self.problem.groups)
        def _(group: jax.Array) -> None:
            lanes = _lanes(self.problem, group)
            # The queries carried LOG2E, and the cotangents of logits are of base e.
            x, dscaled = self.k[:, lanes].astype(jnp.float32), self.dk_sum[:, lanes]
            _, dx = _unscale(self.problem, x, dscaled, 1 / LOG2E)
            self.dk[:, lanes] = dx.astype(self.dk.dtype)

        self.dv[...] = self.dv_sum[...].astype(self.dv.dtype)


def _masked_if_needed(problem: Problem, visit: Callable[[jax.Array | None], None], ranges: Ref, pair: _Pair) -> None:
    """Runs `visit` on (M,N), which keys are hidden from which queries, or on None where none is."""

    @pl.when(pair.has(tiles.MASKED))
    def _() -> None:
        shape = problem.blocks.keys, problem.blocks.queries
        index = lax.broadcasted_iota(jnp.int32, shape, 0) + pair.key * problem.blocks.keys
        visit((index < ranges[pl.ds(0, 1)]) | (index >= ranges[pl.ds(1, 1)]))

    @pl.when(pair.flags & tiles.MASKED == 0)
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
