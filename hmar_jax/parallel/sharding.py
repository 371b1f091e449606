"""device mesh → where every array lives. The axes are `data`, `fsdp` and `tensor`.

* A batch is split over `data` and `fsdp`. `data` is the outermost axis: slices of a multislice TPU job, which only the
  slow data-center network joins, exchange nothing but gradients.
* `fsdp` also splits parameters and optimizer state (Rajbhandari et al. 2020, ZeRO-3), gathered as they are used.
* `tensor` splits heads and hidden units (Shoeybi et al. 2019, Megatron-LM): the first matrix of a pair by its columns,
  the second by its rows; and the head by the codebook.

Axis letters: B batch, K scales, L tokens, C width, H heads, D head size, V codebook, Z latent channels.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from hmar_jax.config import MeshConfig, TrainConfig
from hmar_jax.errors import InputError
from pallas_kernels.scale_attention import BATCH_AXES

AXES = ("data", "fsdp", "tensor")

# The end of a dotted name → the mesh axes of the array's last axes. Axes before those, such as the depth of stacked
# layers, are whole. An axis that its mesh axis does not divide is whole too.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"fc1\.bias|head\.linear\.bias", ("tensor",)),  # (4C), (V)
    # Small enough to be everywhere: other vectors, the quantizer, LPIPS's networks, and what is no parameter.
    (r"bias|\w+_bias|scale|log_scale|mask_embed|quantizer\..*|perceptual\..*|usage|key", ()),
    (r"(tokenizer|discriminator)\..*\.kernel", ("fsdp", "tensor")),  # (…,in,out)
    (r"attention\.qkv\.kernel", ("fsdp", "tensor")),  # (C,3HD)
    (r"attention\.proj\.kernel", ("tensor", "fsdp")),  # (HD,C)
    (r"fc1\.kernel", ("fsdp", "tensor")),  # (C,4C)
    (r"fc2\.kernel", ("tensor", "fsdp")),  # (4C,C)
    (r"adaln\.kernel", ("fsdp", "tensor")),  # (C,6C)
    (r"adaln_offset", (None, "fsdp")),  # (6,C)
    (r"head\.linear\.kernel", ("fsdp", "tensor")),  # (C,V)
    (r"word\.kernel", (None, "fsdp")),  # (Z,C)
    (r"class_embed\.embedding|pos_start|pos|level", (None, "fsdp")),  # (·,C)
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; an axis of -1 takes those that the others leave.

    Args:
      devices: those to use, real or not; by default all of all processes.

    Raises:
      InputError: the axes do not make that many devices, or `data` does not divide among the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    given = "mesh.data={} times mesh.fsdp={} times mesh.tensor={}".format(*shape)
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = len(devices) // max(-math.prod(shape), 1)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise InputError(f"{given} does not make the {len(devices)} devices here; change one.")
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: list[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in an array of that shape, neighbours on its last axes being neighbours in the network."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise InputError(f"mesh.data={shape[0]} does not divide among {slices} TPU slices; make it a multiple of that.")
    if slices > 1:
        inner = [shape[0] // slices, *shape[1:]]
        arrange = functools.partial(mesh_utils.create_hybrid_device_mesh, inner, [slices, 1, 1], devices)
    else:
        arrange = functools.partial(mesh_utils.create_device_mesh, shape, devices)
    try:
        return arrange()
    except NotImplementedError:  # no axes of the torus, whole, make these axes
        return arrange(allow_split_physical_axes=True)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises InputError unless every part of a batch divides among the devices that split it."""
    part, number = config.batch_size // config.accumulate, ways(mesh)
    if part % number:
        raise InputError(
            f"batch_size={config.batch_size} in accumulate={config.accumulate} parts gives {part} examples to "
            f"{number} devices, which does not divide; make it a multiple of {number * config.accumulate}."
        )


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes: parameters, their moments, or a whole state.

    Raises:
      LookupError: no rule is for a leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_name(path), tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def shardings_in_use(tree: Any) -> Any:
    """`tree_shardings` on the mesh in use (`jax.set_mesh`), or None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else tree_shardings(tree, mesh)


def put(name: str, array: ArrayLike) -> jax.Array:
    """A parameter that every process has whole, laid out on the mesh in use, if any, or where it is traced as it is.

    Args:
      name: dotted.
    """
    if isinstance(array, jax.core.Tracer) or jax.sharding.get_mesh().empty:
        return jnp.asarray(array)
    mesh, whole = jax.sharding.get_mesh(), np.asarray(array)
    sharding = NamedSharding(mesh, _spec(name, whole.shape, mesh))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lives: split by example, the first axis of its arrays."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Everywhere, whole."""
    return NamedSharding(mesh, P())


def host_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Which examples of a batch this process's devices hold, and so which it reads, in ascending order.

    Processes whose devices differ in `tensor` alone hold, and read, the same ones.
    """
    length = batch_size // ways(mesh)
    return [start * length + i for start in _host_parts(mesh) for i in range(length)]


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The `host_rows` of a batch, as this process's part of the global one."""
    sharding, parts, number = batch_sharding(mesh), _host_parts(mesh), ways(mesh)

    def spread(array: np.ndarray) -> jax.Array:
        length = len(array) // len(parts)

        def part(index: Any) -> np.ndarray:
            here = parts.index((index[0].start or 0) // length) * length
            return array[here : here + length]

        return jax.make_array_from_callback((length * number, *array.shape[1:]), sharding, part)

    return {name: spread(array) for name, array in batch.items()}


def ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _host_parts(mesh: Mesh) -> list[int]:
    """The numbers of those parts that are on devices of this process."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((ways(mesh),)).values()
    return sorted({index[0].start or 0 for index in slices if index is not None})


def _name(path: tuple[Any, ...]) -> str:
    """Of a leaf: fields and dictionary keys of its path, dotted; of a moment, it ends like its parameter's."""
    return ".".join(str(getattr(step, "key", getattr(step, "name", ""))) for step in path)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    if not shape:  # a count of steps
        return P()
    axes = next((axes for end, axes in _RULES if re.search(rf"(^|\.)({end})$", name)), None)
    if axes is None:
        raise LookupError(f"No rule in {__name__} says how {name} {shape} is split.")
    whole = len(shape) - len(axes)
    split = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape[whole:], strict=True)]
    return P(*[None] * whole, *split) if any(split) else P()
