"""Flags of XLA's compilers, in one place: to be set before JAX starts, as the console script does.

Only what lets devices exchange and compute at a time is here. The rest stays as XLA has it: on GPUs it times cuBLAS
against Triton for each matrix product, and launches kernels as CUDA graphs.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Environment variable → flags. XLA aborts where it does not know one; the tests compile with all of them.
FLAGS = {
    # Sends gradients and parameters while something is computed (JAX's GPU performance tips).
    "XLA_FLAGS": ("--xla_gpu_enable_latency_hiding_scheduler=true",),
    # The same on TPUs: collectives run beside fusions, over several of them, and small all-reduces are joined.
    "LIBTPU_INIT_ARGS": (
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ),
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags to the environment; one that is there already keeps its value."""
    for variable, flags in FLAGS.items():
        present = environment.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in present}
        environment[variable] = " ".join([*(f for f in flags if f.partition("=")[0] not in names), *present])
