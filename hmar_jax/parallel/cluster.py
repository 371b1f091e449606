"""environment → what JAX does not see of a cluster: processes that should be there, and GPUs that nobody uses.

JAX's detection is private (`jax._src.clusters`, read at 0.11.2). It recognises a cluster when all variables or
services that it looks at are there, and none when one of them is missing. In Slurm and Open MPI it gives each process
the one GPU of its number on the machine, however many processes run there.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def unrecognised(failure: Exception) -> bool:
    """Whether `jax.distributed.initialize` failed because there is no cluster, or JAX is in use already."""
    said = str(failure)
    return "coordinator_address should be defined" in said or "must be called before" in said


def sign_of_others(environment: Mapping[str, str] = os.environ) -> str:
    """The beginning of a sentence on other processes that the environment tells of; empty where there are none."""
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1:
        return f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts"
    # A batch script that runs no srun has SLURM_NTASKS too; a step's processes alone have SLURM_STEP_ID.
    counts = ["MEGASCALE_NUM_SLICES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]
    if "SLURM_STEP_ID" in environment:
        counts.append("SLURM_NTASKS")
    for name in counts:
        if (number := environment.get(name, "")).isdigit() and int(number) > 1:
            return f"{name} is {number}"
    return ""


def local_devices(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The argument `local_device_ids` of `jax.distributed.initialize`, where JAX's own choice would leave GPUs unused.

    A process that is alone on its machine takes all GPUs that it sees. Where several share more GPUs than they are, JAX
    gives each one, and the log says that the others are idle.
    """
    gpus, processes = _visible_gpus(environment), _processes_here(environment)
    if not gpus or not processes or "JAX_LOCAL_DEVICE_IDS" in environment:
        return {}
    if processes == 1 or gpus == 1:
        return {"local_device_ids": list(range(gpus))}
    if processes < gpus:
        logger.warning(
            "Each of the %d processes on this machine uses 1 of %d GPUs here; start one process a GPU.", processes, gpus
        )
    return {}


def _visible_gpus(environment: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs this process sees; asking JAX would start it."""
    if (chosen := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in chosen.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _processes_here(environment: Mapping[str, str]) -> int:
    """Processes of the job on this machine; 0 where neither Slurm nor Open MPI says."""
    if (count := environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")).isdigit():
        return int(count)
    if "SLURM_LOCALID" not in environment:
        return 0
    if (total := environment.get("SLURM_NTASKS", "")) == "1":
        return 1
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):  # such as 4(x2),3: of each node
        each: list[int] = []
        for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get(name, "")):
            each += [int(number)] * int(times or 1)
        node = environment.get("SLURM_NODEID", "0")
        if each and node.isdigit() and int(node) < len(each):
            return each[int(node)]
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "")
    return int(total) // int(nodes) if total.isdigit() and nodes.isdigit() and int(nodes) else 0
