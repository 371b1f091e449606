"""setting → the inputs of one attention, and the output and gradients to expect.

Axis letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.scale_attention.api import Ladder
from pallas_kernels.scale_attention.ranges import Run, runs
from pallas_kernels.scale_attention.reference import reference_attention


class Pyramid(Ladder, Protocol):
    """What a table must say of the geometry besides; `hmar_jax.ScaleLadder` is one."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the scales, coarse to fine."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One attention to measure; `norm` is QK-norm, with the learned scale of each head."""

    ladder: Pyramid
    batch: int
    heads: int
    head_size: int
    dtype: str
    pattern: Literal["block_diagonal", "block_causal"]
    norm: bool

    @property
    def key_ranges(self) -> np.ndarray:
        return self.ladder.key_ranges(self.pattern)

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(runs(self.key_ranges))

    @property
    def pairs(self) -> int:
        """Query and key that see each other, of one head of one sequence."""
        return sum((run.last - run.first) * (run.end - run.start) for run in self.runs)

    def flops(self, name: str) -> float:
        """Useful ones of a pass: two products of visible pairs forward; backward five, one of them a recomputation."""
        forward = 4.0 * self.batch * self.heads * self.head_size * self.pairs
        return forward * {"forward": 1, "backward": 2.5, "both": 3.5}[name]

    def least_bytes(self, name: str) -> int:
        """What a pass must move: q, k, v, out forward; these, their gradients and that of out backward."""
        tensor = self.batch * self.heads * self.ladder.length * self.head_size * jnp.dtype(self.dtype).itemsize
        return tensor * {"forward": 4, "backward": 8, "both": 12}[name]

    def visible(self, length: int, numpy: Any = np) -> Any:
        """Dense boolean mask (length,length) by NumPy or `jax.numpy`; padding, behind all tokens, sees itself alone."""
        own = self.ladder.length
        padding = np.tile([[own, length]], (length - own, 1))
        ranges, keys = np.concatenate([self.key_ranges, padding]), numpy.arange(length)
        return (keys >= ranges[:, :1]) & (keys < ranges[:, 1:])

    def __str__(self) -> str:
        sides = ",".join(map(str, self.ladder.sides))
        shape = f"N={self.ladder.length} B={self.batch} H={self.heads} D={self.head_size} {self.dtype}"
        return f"{shape} {self.pattern}, {'with' if self.norm else 'without'} QK-norm, sides {sides}"


class Case(NamedTuple):
    """A setting's inputs, (B,N,H,D), with QK-norm also (H,) scales; and the float32 output and gradients to expect."""

    setting: Setting
    operands: tuple[jax.Array, ...]
    cotangent: jax.Array
    truth: list[jax.Array]


def make_case(setting: Setting, seed: int = 0) -> Case:
    """Random inputs, and the truth about all of them."""
    shape = (setting.batch, setting.ladder.length, setting.heads, setting.head_size)
    *qkv, cotangent = (
        jax.random.normal(key, shape, setting.dtype) for key in jax.random.split(jax.random.key(seed), 4)
    )
    scale = jnp.linspace(3, 5, setting.heads) if setting.norm else None
    # Tuning the products of the truth would take longer than what is measured.
    quickly = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    find = jax.jit(_truth, compiler_options=quickly)
    truth = [x for x in find(setting.key_ranges, qkv, scale, cotangent) if x is not None]
    return Case(setting, tuple(qkv) if scale is None else (*qkv, scale), cotangent, truth)


def _truth(key_ranges: jax.Array, qkv: Any, scale: jax.Array | None, cotangent: jax.Array) -> tuple[Any, ...]:
    """Output and gradients by the reference in float32, one head of one sequence after the other.

    The logits of all might not fit; and a few dense products compile in a fifth of the time of those of all scales.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array | None) -> jax.Array:
        return reference_attention(q, k, v, key_ranges, scale)

    def one_head(inputs: Any) -> tuple[Any, ...]:
        tensors, scale = inputs  # each (B,N,D), ()

        def one_sequence(inputs: Any) -> tuple[Any, ...]:
            q, k, v, g = (x.astype(jnp.float32)[None, :, None] for x in inputs)  # (1,N,1,D)
            out, pull = jax.vjp(attend, q, k, v, None if scale is None else scale[None])
            dq, dk, dv, dscale = pull(g)
            return *(x[0, :, 0] for x in (out, dq, dk, dv)), dscale

        *found, dscale = jax.lax.map(one_sequence, tensors)
        return *found, None if dscale is None else dscale.sum()

    heads_first = [jnp.moveaxis(x, 2, 0) for x in (*qkv, cotangent)]
    *tensors, dscale = jax.lax.map(one_head, (heads_first, scale))
    return *(jnp.moveaxis(x, 0, 2) for x in tensors), dscale
