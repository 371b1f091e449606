"""residual vectors, tokens → a codebook whose codes are all drawn: k-means start, usage, revival, scale dropout.

Axis letters: B batch, L tokens of all scales, N vectors, V codes, Z latent channels, K scales.

A code that is never drawn gets no gradient and stays dead; at the 1x1 to 3x3 scales a whole codebook can die that way.
The cures here are those of Jukebox (Dhariwal et al. 2020: start from data, restart dead codes) and SoundStream
(Zeghidour et al. 2021: k-means start, quantizer dropout). All functions are pure and have static shapes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

# Rows whose distances to all V codes exist at a time: 4096 x 4096 float32 is 64 MB.
_CHUNK = 4096
# k-means++ draws one code after another; this many rounds of several draws come close at a fraction of the cost.
_ROUNDS = 32


@functools.partial(jax.jit, static_argnames=("num_codes", "iterations"))
def kmeans(vectors: jax.Array, num_codes: int, key: jax.Array, iterations: int = 10) -> jax.Array:
    """Codes that stand for `vectors`: Lloyd's iterations from a k-means++ start (Arthur & Vassilvitskii 2007).

    A code left without vectors moves to one that its nearest code fits badly. Where there are fewer vectors than codes,
    copies with a little noise fill up.

    Args:
      vectors: (N,Z) float.
      num_codes: V. key: PRNG key. iterations: of Lloyd; 0 gives the start.

    Returns:
      (V,Z) float32.

    Raises:
      InputError: no vectors, not (N,Z), or no codes.
    """
    if vectors.ndim != 2 or not vectors.shape[0] or num_codes < 1:
        raise InputError(
            f"kmeans got vectors of shape {vectors.shape} for {num_codes} codes; it needs (N,Z) and 1 or more."
        )
    pad_key, start_key, key = jax.random.split(key, 3)
    vectors = _fill_up(vectors.astype(jnp.float32), num_codes, pad_key)

    def lloyd(codes: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        nearest, distances = _nearest(vectors, codes)
        counts = jax.ops.segment_sum(jnp.ones_like(distances), nearest, num_codes)
        means = jax.ops.segment_sum(vectors, nearest, num_codes) / jnp.maximum(counts, 1)[:, None]
        empty = counts == 0
        # The i-th empty code takes the i-th draw, so that no two take the same vector.
        reseeds = vectors[_draw_far(key, distances, num_codes)][jnp.cumsum(empty) - 1]
        return jnp.where(empty[:, None], reseeds, means), None

    return jax.lax.scan(lloyd, _start(vectors, num_codes, start_key), jax.random.split(key, iterations))[0]


def _fill_up(vectors: jax.Array, rows: int, key: jax.Array) -> jax.Array:
    """`vectors` (N,Z) with noisy copies appended until there are `rows`; the originals unchanged."""
    n = vectors.shape[0]
    if n >= rows:
        return vectors
    copies = vectors[jnp.arange(n, rows) % n]
    noise = 0.01 * jnp.std(vectors) * jax.random.normal(key, copies.shape)
    return jnp.concatenate([vectors, copies + noise])


def _start(vectors: jax.Array, num_codes: int, key: jax.Array) -> jax.Array:
    """(V,Z) rows of `vectors`, far from each other: k-means++, with several draws a round where V is large."""
    per_round = -(-num_codes // _ROUNDS)
    rounds = -(-num_codes // per_round)

    def draw(distances: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = vectors[_draw_far(key, distances, per_round)]
        return jnp.minimum(distances, _nearest(vectors, codes)[1]), codes

    uniform = jnp.full(vectors.shape[0], jnp.inf)
    return jax.lax.scan(draw, uniform, jax.random.split(key, rounds))[1].reshape(-1, vectors.shape[1])[:num_codes]


def _draw_far(key: jax.Array, distances: jax.Array, count: int) -> jax.Array:
    """(count,) indices drawn without replacement, chances as the squared distances (N,), equal where all are inf."""
    weights = jnp.where(jnp.isinf(distances), 0.0, jnp.log(distances))
    return jax.lax.top_k(weights + jax.random.gumbel(key, distances.shape), count)[1]


def _nearest(vectors: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of (N,) int32 and squared distance to (N,) each vector's nearest code, in chunks of vectors."""
    half_norms = 0.5 * jnp.sum(jnp.square(codes), axis=-1)

    def one(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.argmax(jnp.dot(codes, vector, precision="highest") - half_norms)
        # From the difference itself: expanding the square would leave rounding where a vector is a code.
        return index, jnp.sum(jnp.square(vector - codes[index]))

    return jax.lax.map(one, vectors, batch_size=_CHUNK)


def update_usage(usage: jax.Array, tokens: jax.Array, decay: float) -> jax.Array:
    """Moving average of the share of all draws that each code gets.

    Args:
      usage: (V,) float32, summing to 1; start with 1/V each.
      tokens: int, any shape, in [0,V): this step's draws.
      decay: share of the old average that stays.

    Returns:
      (V,) float32.
    """
    shares = jnp.bincount(tokens.ravel(), length=usage.shape[0]) / tokens.size
    return decay * usage + (1 - decay) * shares.astype(jnp.float32)


def revive_dead_codes(
    codebook: jax.Array, usage: jax.Array, candidates: jax.Array, key: jax.Array, *, dead_below: float | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes drawn less than `dead_below` of the fair share 1/V move to random candidates, and count as fairly drawn.

    That gives them time to be drawn; until it decays, the usage sums to a little more than 1. Each takes a candidate of
    its own as long as there are enough. Optimizer moments of a revived code are the caller's to keep or clear.

    Args:
      codebook: (V,Z). usage: (V,) float32 from `update_usage`.
      candidates: (N,Z): vectors the quantizer looks codes up for, residuals of this batch.
      key: PRNG key. dead_below: 0 revives none.

    Returns:
      codebook (V,Z) in its dtype, usage (V,) float32, number of codes revived (int32 scalar).

    Raises:
      InputError: shapes that don't fit each other, or no candidates.
    """
    if usage.shape != codebook.shape[:1] or candidates.shape[1:] != codebook.shape[1:] or not candidates.shape[0]:
        raise InputError(
            f"To revive codes, a codebook of shape {codebook.shape} needs usage {codebook.shape[:1]} and candidates "
            f"(N,{codebook.shape[-1]}), not {usage.shape} and {candidates.shape}."
        )
    fair = 1 / codebook.shape[0]
    dead = usage < dead_below * fair
    order = jax.random.permutation(key, candidates.shape[0])
    fresh = candidates[order[(jnp.cumsum(dead) - 1) % candidates.shape[0]]].astype(codebook.dtype)
    return jnp.where(dead[:, None], fresh, codebook), jnp.where(dead, fair, usage), jnp.sum(dead, dtype=jnp.int32)


def codes_in_use(tokens: jax.Array, ladder: ScaleLadder, codebook_size: int) -> jax.Array:
    """How much of the codebook each scale of this batch draws: distinct codes over as many as it could have drawn.

    Args:
      tokens: (B,L) int in [0,V).
      ladder: of L tokens. codebook_size: V.

    Returns:
      (K,) float32 in (0,1]; scale k could draw min(V, B·p_k²) codes.

    Raises:
      InputError: tokens are not (B,L).
    """
    if tokens.ndim != 2 or tokens.shape[1] != ladder.length:
        raise InputError(
            f"Tokens of shape {tokens.shape} are not (B,{ladder.length}), as sides {ladder.sides} want them."
        )

    def share(scale_tokens: jax.Array) -> jax.Array:
        drawn = jnp.zeros(codebook_size, bool).at[scale_tokens.ravel()].set(True)
        return jnp.sum(drawn) / min(codebook_size, scale_tokens.size)

    return jnp.stack([share(tokens[:, scale]) for scale in ladder.slices]).astype(jnp.float32)


def truncate_scales(key: jax.Array, batch: int, num_scales: int, rate: float | jax.Array) -> jax.Array:
    """Scales each sample keeps, coarse to fine: quantizer dropout (SoundStream; DAC, Kumar et al. 2023).

    With probability `rate` a sample keeps 1 … K of them, each number as likely, else all K; so the coarse scales must
    give a picture by themselves.

    Returns:
      (B,) int32 in [1,K].
    """
    which_key, number_key = jax.random.split(key)
    number = jax.random.randint(number_key, (batch,), 1, num_scales + 1, jnp.int32)
    return jnp.where(jax.random.bernoulli(which_key, rate, (batch,)), number, jnp.int32(num_scales))
