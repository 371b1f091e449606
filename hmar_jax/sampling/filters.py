"""logits → tokens and their confidence: guidance, top-k, top-p, draw, order of commitment.

Axis letters: B batch, N tokens of one scale, V codebook. Random numbers are per sample: `keys` is (B,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.devices import device, is_hopper

_GROUP = 128  # tokens drawn from together; numbers side by side in a TPU's registers


def guide(cond: jax.Array, null: jax.Array, cfg: jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans 2022) as VAR scales it: (1+t)·cond - t·null."""
    return (1 + cfg) * cond - cfg * null


@jax.named_scope("filters")
def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Top-k, then top-p of what is left: (…,V) float32, dropped logits -inf.

    Both filters keep a run at the top, so that each is a threshold. How it is found depends on what reading the logits
    costs: on Hopper a kernel reads them once; other GPUs sort; a TPU and a CPU search for it digit by digit, and read
    them for every digit.

    Args:
      logits: without NaN; those of -inf stay so.
      top_k: int32, logits kept, with all that tie with the last; 0 or V keeps all.
      top_p: float32 in (0,1]; the ascending tail of mass at most 1 - top_p goes, with no tie between kept and dropped
        (a value equal to a kept one is kept). The largest stays always; 1 keeps all. Platforms sum in orders of their
        own: a tail within rounding of 1 - top_p may go on one and stay on another.
    """
    return jax.lax.platform_dependent(
        logits,
        top_k,
        top_p,
        cpu=functools.partial(_filter_by_search, bits=1),  # its time is comparing
        cuda=_filter_on_gpu(logits),
        default=functools.partial(_filter_by_search, bits=3),  # 7 comparisons take as long as reading
    )


def _filter_on_gpu(like: jax.Array) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """What filters such logits: where the kernel cannot, a sort. XLA makes a hundred small kernels of a search."""
    if is_hopper(*device()):
        from pallas_kernels import logit_threshold as kernel  # wants a part of Pallas that others do without

        if kernel.fits(like):
            return lambda logits, k, p: jnp.where(logits >= kernel.logit_threshold(logits, k, p), logits, -jnp.inf)
    return _filter_by_sorting


def _filter_by_sorting(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    size, ascending = logits.shape[-1], jnp.sort(logits, axis=-1)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    kth = jnp.take(ascending, size - kept, axis=-1)[..., None]
    tail = jnp.cumsum(jax.nn.softmax(jnp.where(ascending < kth, -jnp.inf, ascending), axis=-1), axis=-1)
    dropped = ((tail <= 1 - top_p) & (top_p < 1)).at[..., -1].set(False)
    least = jnp.min(jnp.where(dropped, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(kth, least), logits, -jnp.inf)


def _filter_by_search(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, *, bits: int) -> jax.Array:
    size, largest = logits.shape[-1], jnp.max(logits, axis=-1, keepdims=True)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)

    def number_suffices(threshold: jax.Array) -> jax.Array:
        return jnp.sum(~(logits < threshold), axis=-1, keepdims=True) >= kept

    kth = _greatest(number_suffices, largest, bits)
    spare = (1 - top_p) * jnp.sum(jnp.where(logits < kth, 0, jnp.exp(logits - largest)), axis=-1, keepdims=True)

    def tail_is_spared(threshold: jax.Array) -> jax.Array:
        in_tail = (logits >= kth) & (logits < threshold)
        return jnp.sum(jnp.where(in_tail, jnp.exp(logits - largest), 0), axis=-1, keepdims=True) <= spare

    threshold = jnp.where(top_p < 1, _greatest(tail_is_spared, largest, bits), kth)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _greatest(holds: Callable[[jax.Array], jax.Array], highest: jax.Array, bits: int) -> jax.Array:
    """The greatest float32 up to `highest` (…,1) for which `holds` is true, as it is for -inf and then no longer.

    Args:
      holds: (…,1) float32 → (…,1) bool, true for NaN. It is asked 2^bits - 1 times for as many bits of the answer.
    """
    last, digits = _rank(highest), -(-32 // bits)

    def add_digit(i: jax.Array, found: jax.Array) -> jax.Array:
        place = jnp.uint32(bits) * (digits - 1 - i).astype(jnp.uint32)
        count = jnp.zeros_like(found)
        for digit in map(jnp.uint32, range(1, 2**bits)):
            rank = found + (digit << place)
            is_whole = digit << place >> place == digit  # the first digit has what 32 leaves
            count += (holds(_value(rank)) & (rank <= last) & is_whole).astype(jnp.uint32)
        return found + (count << place)

    return _value(jax.lax.fori_loop(0, digits, add_digit, jnp.zeros_like(last)))


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
    """Samples every token: (B,N,V) filtered logits → tokens (B,N) int32, their probabilities (B,N) float32.

    First a group of tokens by its mass, then a token of that group: 160 random numbers for 4096 logits instead of 4096.
    """
    padding = -logits.shape[-1] % _GROUP
    padded = jnp.pad(logits, [(0, 0), (0, 0), (0, padding)], constant_values=-jnp.inf)
    groups = padded.reshape(*logits.shape[:2], -1, _GROUP)
    masses = jax.nn.logsumexp(groups, axis=-1)
    group_keys, token_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    group = _categorical(masses, group_keys)
    chosen = jnp.take_along_axis(groups, group[..., None, None], axis=2)[:, :, 0]
    within = _categorical(chosen, token_keys)
    logit = jnp.take_along_axis(chosen, within[..., None], axis=-1)[..., 0]
    return group * _GROUP + within, jnp.exp(logit - jax.nn.logsumexp(masses, axis=-1))


def _categorical(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws from softmax(logits) by the Gumbel-max trick: (B,N,V) → (B,N) int32."""
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)


@jax.named_scope("filters")
def argmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens, and their probabilities, as `draw` gives them."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    largest = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return tokens, jnp.exp(largest - jax.nn.logsumexp(logits, axis=-1))


def least_confident(confidence: jax.Array, candidates: jax.Array, number: jax.Array | int) -> jax.Array:
    """Which `number` of the candidates have the least confidence, the lowest index first among ties: (B,N) bool.

    Args:
      confidence: (B,N) float32. candidates: (B,N) bool. number: int32 () or (B,), at most a row's candidates.
    """
    rank = jax.lax.platform_dependent(confidence, candidates, cuda=_rank_by_comparing, default=_rank_by_sorting)
    return candidates & (rank < jnp.asarray(number)[..., None])


def _rank_by_sorting(confidence: jax.Array, candidates: jax.Array) -> jax.Array:
    """(B,N) int32, how many candidates are before each one, the earlier first of equals; of others it says nothing."""
    order = jnp.lexsort((confidence, ~candidates), axis=-1)  # candidates first, whatever the others' confidence
    return jnp.argsort(order, axis=-1)


def _rank_by_comparing(confidence: jax.Array, candidates: jax.Array) -> jax.Array:
    """As `_rank_by_sorting`, in one kernel: XLA:GPU does not write the (B,N,N) down."""
    value = jnp.where(jnp.isnan(confidence), jnp.inf, confidence)  # NaN would be before none and after none
    index, own, other = jnp.arange(value.shape[1]), value[:, :, None], value[:, None]
    before = (other < own) | ((other == own) & (index < index[:, None]))
    return jnp.sum(before & candidates[:, None], axis=-1)
