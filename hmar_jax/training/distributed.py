"""processes → one job: joined at the start, stopped together when the machines are to be taken away."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from hmar_jax.errors import InputError, TransientError, reason
from hmar_jax.platform import leave_compilation_cache

logger = logging.getLogger(__name__)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    patience: float = 300,
    heartbeat: int = 100,
) -> None:
    """Makes this process a part of its job. To be called before anything asks JAX for devices.

    Without arguments JAX recognises TPU pods, Slurm and other clusters; elsewhere the process is a job of its own.

    Args:
      coordinator: HOST:PORT of process 0. processes: how many. process: which one this is, from 0.
      patience: seconds until the others have to be there.
      heartbeat: seconds after which a process that is not heard of, or has failed, is given up; that ends all others.

    Raises:
      InputError: not all three are given, or the address is none.
      TransientError: the job does not come together.
    """
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    who = "This process"
    if coordinator is not None or processes is not None or process is not None:
        if coordinator is None or processes is None or process is None or not 0 <= process < processes:
            raise InputError(
                f"--coordinator={coordinator}, --processes={processes}, --process={process}: give all three, processes "
                "being counted from 0."
            )
        who = f"Process {process} of {processes}"
        _check_address(coordinator, patience, own=process == 0)
        options |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        options["cluster_detection_method"] = "deactivate"
    failed: list[Exception] = []

    def initialize() -> None:
        try:  # JAX would kill the process at the end of its own patience
            jax.distributed.initialize(**options, initialization_timeout=int(patience) + 86_400)
        except Exception as error:
            failed.append(error)

    # Not waited for at the end of the program, should it never return.
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        raise TransientError(
            f"{who} met not all others at {coordinator or 'the coordinator'} within {patience:g} s; see whether they "
            "have all been started with the same arguments, or set --no-distributed to use this one alone."
        )
    if failed:
        # That is: no cluster is recognised, or JAX is in use by this process alone already.
        alone = isinstance(failed[0], ValueError) or "must be called before" in str(failed[0])
        if coordinator is None and alone:
            return
        raise TransientError(f"{who} could not join its job ({reason(failed[0])}).") from failed[0]
    if jax.process_count() > 1:
        leave_compilation_cache()
    if jax.distributed.is_initialized() and jax.process_index():
        logging.getLogger("hmar_jax").setLevel(logging.WARNING)  # process 0 says it for all


def _check_address(coordinator: str, patience: float, *, own: bool) -> None:
    """Raises InputError where process 0 cannot listen there, TransientError where another does not reach it in time."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator is {coordinator!r}; expected HOST:PORT, such as 10.0.0.2:8476.")
    deadline = time.monotonic() + patience
    while True:
        try:
            if own:
                socket.create_server(("", int(port))).close()
            else:
                socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if own:
                raise InputError(f"Process 0 cannot listen on port {port} ({error}); choose another one.") from None
            if time.monotonic() > deadline:
                raise TransientError(
                    f"The coordinator {coordinator} is not reachable ({error}); see whether process 0 has been started "
                    "there, and whether a firewall lets that port through."
                ) from None
            time.sleep(min(1, patience / 10))


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Asks for an orderly end on SIGTERM, which clusters send before they take a machine away.

    Yields:
      A function of the step that is done: whether to save and leave there. To be asked after every step; all processes
      of a job get the same answer, whichever of them were told.
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone may listen to signals
        yield lambda _: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda _: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def is_first() -> bool:
    """Whether this is process 0, which writes and says what concerns all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
