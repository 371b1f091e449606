"""Devices that are not here, to be compiled for: alone, or joined to a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-40GB", num_cores=108, platform="gpu")
V5E = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")


def gpu(kind: str) -> AbstractDevice:
    """As many multiprocessors as an H200 has."""
    return AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")


def compiling_for(
    device: AbstractDevice, mesh: Mapping[str, int] | None = None, axis_type: AxisType = AxisType.Auto
) -> Any:
    """A context in which programs are for such devices; `mesh` says how many there are along each axis."""
    mesh = mesh or {}
    types = (axis_type,) * len(mesh)
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(abstract)
