"""What is compiled for: the kind of device and what is installed for it, and how a mesh in use splits arrays.

Axis letters: B batch, H heads.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType

# Mesh axes that a batch and heads may be split over; no kernel needs more than its own part of both.
BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)

# Triton joins a product and a sum into one instruction, which rounds once. Triton 3.10 stops doing so by default, which
# would change results, so that every compilation of a kernel states it.
FP_FUSION = True

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
# Compute capability by a part of the kind's name, for GPUs that are not here to be asked.
_CAPABILITIES = dict.fromkeys(_HOPPER, "9.0") | {"A100": "8.0", "L4": "8.9", "B200": "10.0"}


def device() -> tuple[str, str]:
    """Platform and kind of what is compiled for: devices of the mesh in use, real or not, else the first one here."""
    target = _target()
    return target.platform, target.device_kind


def core_count() -> int:
    """Multiprocessors of the GPU that is compiled for."""
    target = _target()
    return target.core_count if isinstance(target, jax.Device) else target.num_cores


def _target() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def is_hopper(platform: str, kind: str) -> bool:
    """Whether a device, as `device` names it, runs the kernels in Mosaic GPU: H100, H200 and their kin."""
    return platform == "gpu" and any(name in kind for name in _HOPPER)


def compute_capability() -> str:
    """That of the NVIDIA GPU that is compiled for, such as 9.0; empty for other devices.

    The devices of a mesh may be absent, as those of a topology are, and the mesh tells their kind alone: then it is
    that of the first device here, if that is of the same kind, or else what is known of the kind.
    """
    target = _target()
    if isinstance(target, jax.sharding.AbstractDevice):
        here = jax.devices()[0]
        if here.device_kind != target.device_kind:
            return next((known for name, known in _CAPABILITIES.items() if name in target.device_kind), "")
        target = here
    return getattr(target, "compute_capability", "")


def automatic_axes(among: Sequence[str] | None = None) -> tuple[str, ...]:
    """Axes of the mesh in use, or those among some, that XLA splits arrays over by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = mesh.axis_names if among is None else among
    return tuple(name for name in names if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1)


def ways(axes: Sequence[str]) -> int:
    """Parts that XLA splits B into, or H, given `BATCH_AXES` or `HEAD_AXES`."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in automatic_axes(axes))


def on_each_device(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function of kernels, run by every device on its own part: XLA cannot split what it does not understand.

    Args:
      in_specs, out_specs: how arrays are split, as for `jax.shard_map`, over `automatic_axes`.

    Raises:
      ValueError: the mesh in use has axes of type Explicit.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"The mesh in use, {dict(mesh.shape)}, has axes of type Explicit, under which no kernel can run; make it "
            f"with axis_types=(AxisType.Auto,) * {len(mesh.shape)}."
        )
    if not automatic_axes():
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def vary_as[T](array: jax.Array, tree: T) -> T:
    """Makes a tree of arrays vary over the shards of a caller's `shard_map` as an array does.

    JAX takes what a kernel gives for equal on all shards, unless told; and sums cotangents of what is made to vary.
    """
    varying = jax.typeof(array).manual_axis_type.varying

    def vary(x: jax.Array) -> jax.Array:
        return jax.lax.pcast(x, tuple(varying - jax.typeof(x).manual_axis_type.varying), to="varying")

    return jax.tree.map(vary, tree)


def has_triton() -> bool:
    """Whether Triton serves the GPU that is compiled for, and jax_triton is installed."""
    return is_served_by_triton() and is_installed("jax_triton")


def is_served_by_triton() -> bool:
    """Whether what is compiled for has tensor cores that Triton uses: NVIDIA GPUs since Ampere, 8.0."""
    major, _, _ = compute_capability().partition(".")
    return major.isdigit() and int(major) >= 8


def is_installed(package: str) -> bool:
    """Whether a package could be imported."""
    return importlib.util.find_spec(package) is not None


def triton_call(*arrays: jax.Array, **options: Any) -> Any:
    """`jax_triton.triton_call` for the GPU that is compiled for, here or not."""
    import jax_triton  # when first used: it cannot be imported without JAX's CUDA plugin

    capability = int(compute_capability().replace(".", ""))  # by itself jax_triton asks a GPU that may not be here
    stated = {"compute_capability": capability, "enable_fp_fusion": FP_FUSION}
    return vary_as(arrays[0], jax_triton.triton_call(*arrays, **stated, **options))
