"""`v5e:16x16`, `h200` → devices to compile for that need not be here, and what such a device can do.

Rates are the makers' for dense bfloat16, memory and the network between chips (cloud.google.com/tpu/docs, "System
architecture", 2025; bytes a second that a chip sends over all its links). Of TPUs' memory programs have what their
compiler says it has (libtpu 0.0.48). An H200's rates are those measured on one: 790 of 990 TFLOP/s, 4.3 of 4.8 TB/s;
of its memory JAX takes `XLA_PYTHON_CLIENT_MEM_FRACTION`, three quarters by default.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from hmar_jax.errors import InputError, shown


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      hbm: bytes of memory. usable: those that a program may have.
      flops: of bfloat16 products a second. bandwidth: bytes a second to and from memory.
      network: bytes a second that it can send to others of its slice or host.
    """

    name: str
    hbm: float
    usable: float
    flops: float
    bandwidth: float
    network: float


CHIPS = {
    "v5e": Chip("TPU v5e", 16 * 2**30, 15.75 * 2**30, 197e12, 819e9, 1.6e12 / 8),
    "v5p": Chip("TPU v5p", 96 * 2**30, 95.73 * 2**30, 459e12, 2765e9, 4.8e12 / 8),
    "v6e": Chip("TPU v6e", 32 * 2**30, 31.24 * 2**30, 918e12, 1640e9, 3.584e12 / 8),
    "h200": Chip("NVIDIA H200", 141e9, 0.75 * 141e9, 790e12, 4.3e12, 450e9),
}
_MOST_TPUS = 2**14  # one slice of v5p has 8960 chips at most
_MOST_GPUS = 64  # of one host; those with most have 16
EXAMPLES = "v5e:16x16, v5p:4x4x8, v6e:8x8, v5e:16x16*2 (two slices), h200 or h200:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not exist. `name` as it was asked for; `slices` are joined by the data-center network."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: int = 1


def open_topology(name: str) -> Topology:
    """The devices of `v5e:AxB`, `v5p:AxBxC`, `v6e:AxB`, perhaps with `*SLICES`, or of `h200[:N]` in one host.

    Raises:
      InputError: a name of another form, a slice that does not exist, or its compiler is not installed.
    """
    if tpu := re.fullmatch(r"(v5e|v5p|v6e):([0-9]{1,4}(?:x[0-9]{1,4}){1,2})(?:\*([0-9]{1,4}))?", name):
        sizes, slices = [int(size) for size in tpu[2].split("x")], int(tpu[3] or 1)
        _check_number(name, math.prod(sizes) * slices, _MOST_TPUS)
        return Topology(name, CHIPS[tpu[1]], _tpus(f"{tpu[1]}:{tpu[2]}", sizes, slices), slices)
    if gpu := re.fullmatch(r"h200(?::([1-9][0-9]{0,3}))?", name):
        _check_number(name, int(gpu[1] or 1), _MOST_GPUS)
        return Topology(name, _h200(), _gpus(int(gpu[1] or 1)))
    raise InputError(f"No topology is named {shown(name)}; name one such as {EXAMPLES}.")


def _check_number(name: str, devices: int, most: int) -> None:
    if not 1 <= devices <= most:
        raise InputError(f"Topology {name} has {devices} devices; expected 1 to {most}, such as {EXAMPLES}.")


def _tpus(name: str, sizes: list[int], slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu, the compiler for TPUs, is not installed; `pip install -c constraints.txt -e '.[tpu]'` installs "
            "it, no TPU is needed."
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return tuple(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"libtpu knows no slice {name} ({reason}); name one such as {EXAMPLES}.") from None


def _gpus(count: int) -> tuple[Any, ...]:
    plugins = importlib.util.find_spec("jax_plugins")
    places = list(plugins.submodule_search_locations or ()) if plugins else []
    if not any(os.path.isdir(os.path.join(place, cuda)) for place in places for cuda in ("xla_cuda12", "xla_cuda13")):
        raise InputError(
            "JAX's CUDA plugin, the compiler for an H200, is not installed; `pip install -c constraints.txt -e "
            "'.[cuda]'` installs it, no GPU is needed."
        )
    options: dict[str, Any] = {"topology": f"1x1x{count}", "target_config": _H200_TARGET}
    return tuple(topologies.get_topology_desc("h200", platform="cuda", **options).devices)


def _h200() -> Chip:
    """An H200, with the share of its memory that JAX is told to take."""
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not share:
        return CHIPS["h200"]
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise InputError(f"XLA_PYTHON_CLIENT_MEM_FRACTION is {shown(share)}; expected a share such as 0.9.")
    return dataclasses.replace(CHIPS["h200"], usable=CHIPS["h200"].hbm * number)


# What XLA asks of a GPU that it compiles for, as an H200 answers (XLA's GpuTargetConfigProto).
_H200_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
