"""logits → the threshold of top-k and top-p for every row, on Hopper (H100, H200), by Mosaic GPU.

Axis letters: B batch, R rows, V codebook.

A row is read once and stays in the registers of one warpgroup. Both filters drop a tail, all below the greatest
threshold whose tail weighs no more than is to spare. For top-k a logit weighs 1 and V - k are to spare; for top-p it
weighs exp(logit), 0 if top-k dropped it, and 1 - p of the sum is to spare. Such a threshold is enclosed between two
floats: the tail below `low` is spared, that below `high` is not. A probe halfway replaces one of them, until `high` has
one more logit below it than `low`: no float between them would separate other logits than `low` does.

Halfway is the mean of the two at first, which soon comes near. Then it is the float halfway in the order of floats, so
that 32 more probes are enough for any logits: equal, infinite, of all magnitudes. Of random ones, 4096 in a row, top-k
takes 14 probes and top-p 12. Each waits for the sums of the one before; other rows fill the time.

Microseconds on an H200 for rows of 4096 random logits, k of 900 and p of 0.96, against what XLA makes of a search that
reads off 3 bits at a time, unrolled, and of a sort:

| rows   | kernel | search | sort |
| 8      | 8      | 239    | 132  |
| 128    | 9      | 112    | 55   |
| 2,048  | 49     | 342    | 670  |
| 16,384 | 357    | 2246   | 5072 |

65,536 rows take 1407 µs, 924 of them with top-p alone, and 235 to read. Logits of bfloat16 have ties, for which a
search goes on to the last bit: 633 rather than 357 µs. Probing where the weights of `low` and `high` suggest saves
another 14%, not thought worth its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.devices import BATCH_AXES, automatic_axes, on_each_device, ways

THREADS = 128  # of a warpgroup, each of which has V / THREADS logits and as many weights
LARGEST_ROW = 8192  # that leaves half of the registers for the rest
PROBES_BY_VALUE = 8

Scalar = Any  # of the kernel


def fits(logits: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `logit_threshold` takes logits of this shape and dtype, under the mesh in use."""
    if logits.ndim < 2 or not logits.size or logits.shape[0] % ways(BATCH_AXES):
        return False
    return logits.dtype == jnp.float32 and logits.shape[-1] <= LARGEST_ROW and logits.shape[-1] % THREADS == 0


def logit_threshold(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Of every row, the least logit that top-k, and then top-p of what is left, keep, or a float just below it.

    Args:
      logits: (B,…,V) float32, each -inf or finite and below 1e38; V is a multiple of 128 up to 8192. B is split over
        the mesh in use, which must divide it.
      top_k: int32 (), logits kept, with all that tie with the last; 0 or V keeps all.
      top_p: float32 () in (0,1]; the ascending tail of mass at most 1 - top_p goes, with no tie between kept and
        dropped (a value equal to a kept one is kept). The largest stays always; 1 keeps all. Mass is summed in float32,
        in an order of the kernel's own, the same on every run: compared with another sum, a tail within about 1e-6 of
        1 - top_p may go here and stay there.

    Returns:
      (B,…,1) float32: kept is what is not below it. No logit lies between it and the least that is kept.

    Raises:
      ValueError: shape or dtype are not supported.
    """
    if not fits(logits):
        raise ValueError(
            f"logits are {logits.dtype}{list(logits.shape)}; expected float32 (B, …, V), at least one row, V a "
            f"multiple of {THREADS} up to {LARGEST_ROW}, B of {ways(BATCH_AXES)}."
        )
    batch = P(automatic_axes(BATCH_AXES))
    return on_each_device(_thresholds, (batch, P(), P()), batch)(logits, top_k, top_p)


def _thresholds(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """As `logit_threshold`, of what one device has."""
    rows = logits.reshape(-1, logits.shape[-1])
    kernel = plgpu.kernel(
        _search_row,
        out_type=jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32),
        grid=rows.shape[:1],
        grid_names=("row",),
        kernel_name="logit_threshold",
        # Others cannot branch on what they have summed over all threads.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    # One array, which XLA makes of slices in one kernel; it would copy two. Float32 has whole numbers far beyond V.
    return kernel(rows, jnp.stack([top_k.astype(jnp.float32), top_p])).reshape(*logits.shape[:-1], 1)


class _Bracket(NamedTuple):
    """Two floats, as `_rank` numbers them; how many logits are below each, float32; how often they were moved."""

    low: Scalar
    high: Scalar
    below_low: Scalar
    below_high: Scalar
    probes: Scalar


def _search_row(logits_ref: Any, filters_ref: Any, thresholds_ref: Any) -> None:
    """The kernel: references to (R,V), (2,) for top-k and top-p, and (R,); all float32."""
    row, size = lax.axis_index("row"), logits_ref.shape[1]
    logits = plgpu.load(logits_ref.at[row], layout=_layout(size), optimized=False)
    top_k, top_p = filters_ref[0], filters_ref[1]
    largest = jnp.max(logits)

    def begin(low: Scalar, below_low: Scalar, dropping: Scalar) -> _Bracket:
        """From a float to above all logits; closed if none is to be dropped."""
        return _Bracket(low, jnp.where(dropping, _rank(largest) + 1, low), below_low, jnp.float32(size), jnp.int32(0))

    def search(bracket: _Bracket, weigh: Callable[[jax.Array, Scalar], Scalar], spare: Scalar) -> _Bracket:
        """Closes in on the greatest float whose tail, 1 at (V,) logits below it, weighs no more than is to spare.

        Args:
          weigh: of the tail, and the number in it.
        """

        def probe(at: _Bracket) -> _Bracket:
            mean = _rank(0.5 * _value(at.low) + 0.5 * _value(at.high))
            middle = jnp.where(at.probes < PROBES_BY_VALUE, mean, _halfway(at.low, at.high))
            tail = jnp.where(logits < _value(middle), 1.0, 0.0)
            below = jnp.sum(tail)
            spared = weigh(tail, below) <= spare
            return _Bracket(
                jnp.where(spared, middle, at.low),
                jnp.where(spared, at.high, middle),
                jnp.where(spared, below, at.below_low),
                jnp.where(spared, at.below_high, below),
                at.probes + 1,
            )

        def is_open(at: _Bracket) -> Scalar:
            # Greater, not unequal: NaN, below nothing and above nothing, may have exchanged the two.
            return (at.below_high - at.below_low > 1) & (_halfway(at.low, at.high) > at.low)

        return lax.while_loop(is_open, probe, bracket)

    among = begin(_rank(jnp.min(logits)), jnp.float32(0), (top_k > 0) & (top_k < size))
    among = search(among, lambda _, below: below, size - top_k)
    mass = jnp.where(logits < _value(among.low), 0.0, jnp.exp(logits - largest))
    spare = (1 - top_p) * jnp.sum(mass)
    among = search(begin(among.low, among.below_low, top_p < 1), lambda tail, _: jnp.sum(tail * mass), spare)
    thresholds_ref[row] = _value(among.low)


def _layout(size: int) -> Any:
    """How (V,) is spread over a warpgroup: as many side by side to a thread as it can load at once."""
    width = next(width for width in (4, 2, 1) if size % (THREADS * width) == 0)
    tiling = plgpu.Tiling(((THREADS * width,), (THREADS // 4 * width,), (width,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _rank(value: Scalar) -> Scalar:
    """float32 → int32 in the same order: its bits, where a sign turns the order of the others around."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))


def _value(rank: Scalar) -> Scalar:
    """The float32 of a rank."""
    return lax.bitcast_convert_type(rank ^ ((rank >> 31) & jnp.int32(2**31 - 1)), jnp.float32)


def _halfway(low: Scalar, high: Scalar) -> Scalar:
    """The mean of two int32, rounded down; their sum would overflow."""
    return (low & high) + ((low ^ high) >> 1)
