"""logits → tokens and their confidence: guidance, top-k, top-p, draw, order of commitment.

Axis letters: B batch, N tokens of one scale, V codebook. Random numbers are per sample: `keys` is (B,).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# From so many tokens of a scale on a GPU searches for thresholds; below, it sorts.
_FEW_TOKENS = 16


def guide(cond: jax.Array, null: jax.Array, cfg: jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans 2022) as VAR scales it: (1+t)·cond - t·null."""
    return (1 + cfg) * cond - cfg * null


@jax.named_scope("filters")
def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Top-k, then top-p of what is left: (…,V) float32, dropped logits -inf.

    Both filters keep a run at the top, so that each is a threshold. It is searched for bit by bit: a sort takes longer.

    Args:
      top_k: int32, logits kept, with all that tie with the last; 0 or V keeps all.
      top_p: float32 in (0,1]; the ascending tail of mass at most 1 - top_p goes, with no tie between kept and dropped
        (a value equal to a kept one is kept). The largest stays always.
    """
    # A digit is read off every reading of the logits. A GPU reads them as fast as it compares them with 7 values, and
    # launching a loop's kernels one by one would take it longer than the small scales need; a CPU's time is comparing.
    # For few tokens XLA makes 183 kernels of the search on a GPU, which take longer than a sort does. What is few says
    # the scale, not the batch, on which no picture may depend.
    search = functools.partial(_filter_logits, bits=3)
    few = math.prod(logits.shape[1:-1]) < _FEW_TOKENS
    return jax.lax.platform_dependent(
        logits,
        top_k,
        top_p,
        cpu=functools.partial(_filter_logits, bits=1),
        cuda=_filter_by_sorting if few else functools.partial(search, unroll=True),
        default=search,
    )


def _filter_logits(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, *, bits: int, unroll: bool = False
) -> jax.Array:
    size, largest = logits.shape[-1], jnp.max(logits, axis=-1, keepdims=True)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)

    def number_suffices(threshold: jax.Array) -> jax.Array:
        return jnp.sum(~(logits < threshold), axis=-1, keepdims=True) >= kept

    search = functools.partial(_greatest, highest=largest, bits=bits, unroll=unroll)
    kth = search(number_suffices)
    spare = (1 - top_p) * jnp.sum(jnp.where(logits < kth, 0, jnp.exp(logits - largest)), axis=-1, keepdims=True)

    def tail_is_spared(threshold: jax.Array) -> jax.Array:
        in_tail = (logits >= kth) & (logits < threshold)
        return jnp.sum(jnp.where(in_tail, jnp.exp(logits - largest), 0), axis=-1, keepdims=True) <= spare

    return jnp.where(logits >= search(tail_is_spared), logits, -jnp.inf)


def _filter_by_sorting(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    size, ascending = logits.shape[-1], jnp.sort(logits, axis=-1)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    ascending = jnp.where(ascending < jnp.take(ascending, size - kept, axis=-1)[..., None], -jnp.inf, ascending)
    tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    dropped = (tail <= 1 - top_p).at[..., -1].set(False)
    threshold = jnp.min(jnp.where(dropped, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _greatest(holds: Callable[[jax.Array], jax.Array], highest: jax.Array, bits: int, unroll: bool) -> jax.Array:
    """The greatest float32 up to `highest` (…,1) for which `holds` is true, as it is for -inf and then no longer.

    Args:
      holds: (…,1) float32 → (…,1) bool, true for NaN. It is asked 2^bits - 1 times for as many bits of the answer.
    """
    last, digits = _rank(highest), -(-32 // bits)

    def add_digit(i: jax.Array, found: jax.Array) -> jax.Array:
        place = jnp.uint32(bits) * jnp.asarray(digits - 1 - i, jnp.uint32)
        count = jnp.zeros_like(found)
        for digit in map(jnp.uint32, range(1, 2**bits)):
            rank = found + (digit << place)
            is_whole = digit << place >> place == digit  # the first digit has what 32 leaves
            count += (holds(_value(rank)) & (rank <= last) & is_whole).astype(jnp.uint32)
        return found + (count << place)

    return _value(jax.lax.fori_loop(0, digits, add_digit, jnp.zeros_like(last), unroll=unroll))


def _rank(value: jax.Array) -> jax.Array:
    """float32 → uint32 in the same order: its bits, where the sign turns the order of the others around."""
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _value(rank: jax.Array) -> jax.Array:
    """The float32 of a rank; NaN below that of -inf."""
    bits = jnp.where(rank >> 31 == 1, rank & jnp.uint32(2**31 - 1), ~rank)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.named_scope("filters")
def draw(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples every token: (B,N,V) filtered logits → tokens (B,N) int32, their probabilities (B,N) float32."""
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)
    return tokens, _probability(logits, tokens)


@jax.named_scope("filters")
def argmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens, and their probabilities, as `draw` gives them."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, _probability(logits, tokens)


def _probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Softmax at the tokens alone: (B,N,V) logits, (B,N) → (B,N) float32."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def least_confident(confidence: jax.Array, candidates: jax.Array, number: jax.Array | int) -> jax.Array:
    """Which `number` of the candidates have the least confidence, the lowest index first among ties: (B,N) bool.

    Args:
      confidence: (B,N) float32. candidates: (B,N) bool. number: int32 () or (B,), at most a row's candidates.
    """
    order = jnp.lexsort((confidence, ~candidates), axis=-1)  # candidates first, whatever the others' confidence
    rows = jnp.arange(confidence.shape[0])[:, None]
    among_least = jnp.arange(confidence.shape[1]) < jnp.asarray(number)[..., None]
    return jnp.zeros_like(candidates).at[rows, order].set(among_least)
