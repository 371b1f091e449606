"""q, k, v of a token pyramid → attended values: the functions that choose among all implementations.

Axis letters: B batch, L tokens, H heads, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels import devices
from pallas_kernels.devices import BATCH_AXES, HEAD_AXES
from pallas_kernels.scale_attention.reference import reference_attention
from pallas_kernels.scale_attention.xla import xla_attention

logger = logging.getLogger(__name__)

Implementation = Literal["reference", "xla", "hopper", "triton", "tpu"]
Pattern = Literal["block_diagonal", "block_causal"]

# From how many tokens on a kernel is taken: below, launching costs more than computing. The Hopper kernel is ahead even
# so, of the eight that XLA needs: 6.6 against 11 µs for 4 tokens, 18 against 96 for 256 (H200, B=16, H=16, QK-norm).
_KERNEL_TOKENS = {"hopper": 1, "triton": 512, "tpu": 512}


class Ladder(Protocol):
    """What attention must know of the geometry; `hmar_jax.ScaleLadder` is one."""

    @property
    def length(self) -> int:
        """L."""

    def key_ranges(self, pattern: Any) -> np.ndarray:
        """(L,2) int32: query i attends to keys in [start, end)."""


def scale_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ladder: Ladder,
    *,
    pattern: Pattern,
    q_scale: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attention among the tokens of one scale (`block_diagonal`) or of all scales so far (`block_causal`).

    Under a mesh (`jax.set_mesh`) whose axes are of type Auto, each device runs the kernels on its own part: B is split
    over the axes `data` and `fsdp`, H over `tensor`; over an axis of another name nothing is. Within `jax.shard_map`
    the arrays are such parts.

    Args:
      q, k, v: (B,L,H,D), all bfloat16, float16 or float32. q may hold the last tokens alone, as when sampling with the
        keys and values of coarser scales kept.
      ladder: the scales that the L tokens are joined from; static.
      pattern: which keys a query sees.
      q_scale: optional (H,) float32. With it q and k are L2-normalised along D, q is multiplied by it, and the softmax
        scale is 1 (QK-norm, Henry et al. 2020); without it the softmax scale is D^-0.5.
      implementation: `reference` (dense, float32), `xla` (scale by scale, anywhere), `hopper` (H100 and H200; 16 bits,
        D of 32 or 64), `triton` (NVIDIA GPUs since Ampere, with the extra of that name) or `tpu`; None takes the
        fastest known for the device, `xla` where the mesh divides B or H unevenly.

    Returns:
      As q, in shape and dtype.

    Raises:
      ValueError: shapes or dtypes are not these; the forced implementation is unknown, or not for this device, mesh or
        these arrays; or a kernel would run under a mesh with axes of type Explicit.
    """
    length = ladder.length
    whole = q.ndim == 4 and (q.shape[0], length, *q.shape[2:]) == k.shape == v.shape
    if not whole or not 0 < q.shape[1] <= length:
        raise ValueError(
            f"q, k, v are {q.shape}, {k.shape}, {v.shape}; expected thrice (B, {length}, H, D) for {ladder}, q perhaps "
            "with the last tokens alone."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype.")
    _check(q, q_scale)
    chosen = choose(q, length, implementation)
    if implementation is None:
        _announce(chosen)
    ranges = ladder.key_ranges(pattern)[length - q.shape[1] :]
    match chosen:
        case "xla":
            return xla_attention(q, k, v, ranges, q_scale)
        case "reference":
            return reference_attention(q, k, v, ranges, q_scale)
    attend = _kernel(chosen, packed=False)
    return _on_each_device(lambda *qkv, scale: attend(*qkv, ranges, scale), q, k, v, scale=q_scale)


def packed_scale_attention(
    qkv: jax.Array,
    ladder: Ladder,
    *,
    pattern: Pattern,
    q_scale: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """As `scale_attention`, of (B,L,3,H,D): q, k and v as one projection gives them, which kernels read in place."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv is {qkv.shape}; expected (B, {ladder.length}, 3, H, D).")
    _check(qkv, q_scale)
    q, k, v = (qkv[:, :, i] for i in range(3))
    chosen = choose(q, ladder.length, implementation)
    if chosen in ("xla", "reference") or qkv.shape[1] != ladder.length:
        return scale_attention(q, k, v, ladder, pattern=pattern, q_scale=q_scale, implementation=implementation)
    if implementation is None:
        _announce(chosen)
    attend, ranges = _kernel(chosen, packed=True), ladder.key_ranges(pattern)
    return _on_each_device(lambda qkv, scale: attend(qkv, ranges, scale), qkv, scale=q_scale)


def _check(array: jax.Array, q_scale: jax.Array | None) -> None:
    """Raises ValueError unless an array (…,H,D) has a dtype that all implementations know, and the scale is (H,)."""
    if array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"q, k, v are {array.dtype}; expected bfloat16, float16 or float32.")
    heads, given = array.shape[-2], getattr(q_scale, "shape", type(q_scale).__name__)
    if q_scale is not None and given != (heads,):
        raise ValueError(f"q_scale is {given}; expected an array ({heads},), a number for each head.")


def choose(
    q: jax.Array | jax.ShapeDtypeStruct, length: int, implementation: Implementation | None = None
) -> Implementation:
    """What `scale_attention` runs as on the devices that are compiled for: the fastest known, unless one is forced.

    Args:
      q: (B,N,H,D), or its shape and dtype.
      length: L, tokens of the ladder.
      implementation: the one to force.

    Raises:
      ValueError: the forced one is unknown, or not for this device or mesh or q.
    """
    platform, kind = devices.device()
    batch, queries, heads, size = q.shape
    batch_ways, head_ways = devices.ways(BATCH_AXES), devices.ways(HEAD_AXES)
    suits = queries == length and batch % batch_ways == heads % head_ways == 0  # any kernel
    fit: dict[Implementation, bool] = {
        "reference": True,
        "xla": True,
        "hopper": suits and devices.is_hopper(platform, kind) and q.dtype.itemsize == 2 and size in (32, 64),
        "triton": suits and platform == "gpu" and devices.has_triton() and 16 <= size <= 128,
        "tpu": suits and platform == "tpu" and (size % 128 == 0 or 128 % size == 0),
    }
    if implementation is not None:
        if implementation not in fit:
            raise ValueError(f"scale_attention has no implementation {implementation!r}; use one of {', '.join(fit)}.")
        if implementation == "triton" and platform == "gpu" and not devices.is_installed("jax_triton"):
            raise ValueError(
                "scale_attention cannot run as 'triton' without jax_triton; install it by "
                "`pip install -c constraints.txt -e '.[triton]'`."
            )
        if not fit[implementation]:
            raise ValueError(
                f"scale_attention cannot run as {implementation!r} on {kind} with q of {q.dtype}{list(q.shape)} among "
                f"{length} tokens, B split by {batch_ways} and H by {head_ways}; use 'xla', or None for the fastest."
            )
        return implementation
    kernels: tuple[Implementation, ...] = ("hopper", "triton", "tpu")
    return next((name for name in kernels if fit[name] and length >= _KERNEL_TOKENS[name]), "xla")


def _kernel(name: Implementation, *, packed: bool) -> Callable[..., jax.Array]:
    """Imported when first used: each wants its own part of Pallas."""
    if name == "tpu":
        from pallas_kernels.scale_attention.tpu.attention import tpu_attention, tpu_attention_packed

        return tpu_attention_packed if packed else tpu_attention
    if name == "triton":
        from pallas_kernels.scale_attention.triton.attention import triton_attention, triton_attention_packed

        return triton_attention_packed if packed else triton_attention
    from pallas_kernels.scale_attention.hopper.attention import hopper_attention, hopper_attention_packed

    return hopper_attention_packed if packed else hopper_attention


def _on_each_device(attend: Callable[..., jax.Array], *arrays: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Runs a kernel on every device's own images and heads; the arrays have heads in their last axis but one."""
    batch, heads = devices.automatic_axes(BATCH_AXES), devices.automatic_axes(HEAD_AXES)

    def spec(array: jax.Array) -> P:
        return P(batch, *[None] * (array.ndim - 3), heads, None)

    split = devices.on_each_device(
        lambda *arrays_and_scale: attend(*arrays_and_scale[:-1], scale=arrays_and_scale[-1]),
        in_specs=(*map(spec, arrays), None if scale is None else P(heads)),
        out_specs=P(batch, None, heads, None),
    )
    return split(*arrays, scale)


@functools.cache
def _announce(implementation: str) -> None:
    """Says once which implementation runs."""
    logger.info("scale_attention runs as %s.", implementation)
