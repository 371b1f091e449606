"""arrays of a state, plain values → digests that a checkpoint records, and that tell when it gives back others.

TensorStore checks its tree of keys (CRC-32C), not the values: a flipped bit in one would be restored as it is.

The digest of an array is Σ_p mix(w_p ⊕ p · 0x9E3779B1) mod 2³², where w_p is the element at row-major position p as an
unsigned word and mix is the finalizer of MurmurHash3. That is one-to-one, so a change of one element always changes the
sum; a change of several leaves it as it was once in 2³² times, whatever the pattern. (A sum of w_p times weights would
not tell that an even number of elements was negated.) Sums of integers depend neither on their order nor on how devices
and processes share the array, so a run may go on on another mesh.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

_GOLDEN = np.uint32(0x9E3779B1)  # spreads positions over all 32 bits
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SMALL = 2**18  # elements: NumPy sums fewer sooner than XLA compiles a program for their shape


def of_arrays(tree: Any) -> list[int]:
    """The digest of every array of a tree, in its order. All processes call it together, and all get the same."""
    leaves = jax.tree.leaves(tree)
    sums = [[_of_shard(shard, x.shape) for shard in x.addressable_shards if not shard.replica_id] for x in leaves]
    found = np.array([np.sum(np.asarray(parts, np.uint32), dtype=np.uint32) for parts in jax.device_get(sums)])
    if jax.process_count() > 1:
        found = np.sum(multihost_utils.process_allgather(found), axis=0, dtype=np.uint32)
    return [int(digest) for digest in found]


def of_value(value: Any) -> str:
    """SHA-256 of a value of JSON types, however it is laid out as a text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_shard(shard: Any, shape: tuple[int, ...]) -> Any:
    """What a device's part of an array of this shape adds to its digest."""
    starts = np.array([(part.start or 0) % 2**32 for part in shard.index], np.uint32)
    strides = np.array([math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))], np.uint32)
    words = _WORDS[shard.data.dtype.itemsize]
    if shard.data.size < _SMALL:
        host = np.asarray(shard.data)
        with np.errstate(over="ignore"):  # NumPy warns of scalars that wrap around, not of arrays
            return _mixed_sum(np, np.frombuffer(host.tobytes(), words).reshape(host.shape), starts, strides)
    return _on_device(shard.data, starts, strides)


@jax.jit
def _on_device(x: jax.Array, starts: jax.Array, strides: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    return _mixed_sum(jnp, words, starts, strides)


def _mixed_sum(xp: Any, words: Any, starts: Any, strides: Any) -> Any:
    """Σ mix(w_p ⊕ p · _GOLDEN) of words at `starts` of an array with these strides; `xp` is NumPy or jax.numpy."""
    position = xp.uint32(0)
    for axis, size in enumerate(words.shape):
        along = (xp.arange(size, dtype=xp.uint32) + starts[axis]) * strides[axis]
        position = position + along.reshape([-1 if i == axis else 1 for i in range(words.ndim)])
    return xp.sum(_mix(words.astype(xp.uint32) ^ (position * _GOLDEN)), dtype=xp.uint32)


def _mix(x: Any) -> Any:
    """MurmurHash3's finalizer of uint32 words: one-to-one, and every bit of x changes half of the result's."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
