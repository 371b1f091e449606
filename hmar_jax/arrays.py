"""Arrays of Python calls: arguments checked on the host, batches split over devices, results gathered from them.

Axis letters: B batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from hmar_jax.errors import InputError, shown


def host_array(name: str, value: Any, expected: str) -> np.ndarray:
    """A caller's argument as a NumPy array of numbers or booleans; what several processes hold is gathered (`on_host`).

    Args:
      name: what a sentence calls it, with its verb, e.g. `Labels are`. expected: what it should be.

    Raises:
      InputError: it is a ragged list, or holds no numbers.
    """
    if isinstance(value, jax.core.Tracer):  # JAX's own error says more
        return np.asarray(value)
    try:
        array = on_host(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # ragged; a PyTorch tensor with a gradient; 10**400
        array = np.asarray(None)
    if not (jax.dtypes.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise InputError(f"{name} {shown(value)}; expected {expected}.")
    if array.dtype == np.longdouble:  # which JAX does not have, like the byte order of other machines
        array = array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`, or InputError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        ends = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {shown(value)}; expected a whole number, {ends}.")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, or InputError."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {shown(value)}; expected True or False.")
    return bool(value)


def on_host(array: ArrayLike) -> np.ndarray:
    """The whole of an array; where other processes hold parts of it, all of them must ask for it together."""
    in_parts = (
        isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and not (array.is_fully_addressable or array.is_fully_replicated)
    )
    return np.asarray(multihost_utils.process_allgather(array, tiled=True) if in_parts else array)


def mesh_in_use() -> Mesh:
    """The mesh in use, or else one of all local devices; InputError where XLA is not to split arrays by itself."""
    mesh = jax.sharding.get_mesh()
    if AxisType.Explicit in mesh.axis_types:
        raise InputError(
            f"The mesh in use, {dict(mesh.shape)}, has axes of type Explicit; make it with axis_types=(AxisType.Auto,) "
            f"* {len(mesh.shape)}."
        )
    if not mesh.empty:
        return mesh
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def over_devices(array: ArrayLike, mesh: Mesh) -> jax.Array:
    """An array (B,…) split as batches are; padded with repeats so that it divides, which no sample notices."""
    array = np.asarray(array)
    axes = tuple(name for name in mesh.axis_names if name != "tensor")
    ways = math.prod(mesh.shape[name] for name in axes)
    padded = np.resize(array, (-(-array.shape[0] // ways) * ways, *array.shape[1:]))
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])


def one_ahead[C, T](dispatch: Callable[[C], T], chunks: Iterable[C]) -> Iterator[tuple[C, T]]:
    """Each chunk with what is dispatched for it, once the next is under way: devices don't wait for the caller."""
    ahead = None
    for chunk in chunks:
        this, ahead = ahead, (chunk, dispatch(chunk))
        if this is not None:
            yield this
    if ahead is not None:
        yield ahead
