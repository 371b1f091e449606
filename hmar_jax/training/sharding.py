"""device mesh → where every array lives. The axes are `data` and `fsdp`; a batch is split over both.

Parameters and optimizer state are split over `fsdp` along their largest axis that divides, the rest is replicated.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hmar_jax.config import MeshConfig, TrainConfig
from hmar_jax.errors import InputError


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices; an axis of -1 takes those that the other leaves."""
    count, shape = jax.device_count(), [config.data, config.fsdp]
    if -1 in shape:
        free = shape.index(-1)
        shape[free] = count // max(shape[1 - free], 1)
    if min(shape) < 1 or int(np.prod(shape)) != count:
        raise InputError(
            f"mesh.data={config.data} times mesh.fsdp={config.fsdp} does not make the {count} devices here; change one."
        )
    return jax.make_mesh(tuple(shape), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises InputError unless every part of a batch divides among the devices."""
    part = config.batch_size // config.accumulate
    if part % mesh.size:
        raise InputError(
            f"batch_size={config.batch_size} in accumulate={config.accumulate} parts gives {part} examples to "
            f"{mesh.size} devices, which does not divide; make it a multiple of {mesh.size * config.accumulate}."
        )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    ways = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis in np.argsort(leaf.shape)[::-1] if leaf.shape[axis] % ways == 0]
        if ways == 1 or leaf.ndim < 2 or not axes:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(("fsdp" if axis == axes[0] else None) for axis in range(leaf.ndim))))

    return jax.tree.map(sharding, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The part of a batch that this host read, as part of the global one, split over all devices by example."""
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
