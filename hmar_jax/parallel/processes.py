"""processes → one job: joined at the start, stopped together when the machines are to be taken away."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hmar_jax import errors
from hmar_jax.errors import HmarError, InputError, TransientError, reason, shown
from hmar_jax.failures import explained
from hmar_jax.files import lock
from hmar_jax.parallel import cluster
from hmar_jax.xla import leave_compilation_cache

logger = logging.getLogger(__name__)

MOST_PROCESSES = 2**16  # more than any job has, and fewer than JAX's integers can count
# A name or an IP address, whose labels have 63 letters at most, as resolvers raise errors of their own for longer ones.
_ADDRESS = re.compile(r"(?P<host>(?!.*[\w-]{64})[A-Za-z0-9._:\[\]%-]{1,253}):(?P<port>[0-9]{1,5})")


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    patience: float = 300,
    heartbeat: int = 100,
) -> None:
    """Makes this process a part of its job. To be called before anything asks JAX for devices.

    Without a coordinator JAX recognises TPU pods, Slurm and other clusters; elsewhere the process is a job of its own.

    Args:
      coordinator: HOST:PORT of process 0, to be given with `process`, which one this is, from 0.
      processes: how many there are. Given alone, it is checked against the number of those that have joined.
      patience: seconds until the others have to be there.
      heartbeat: seconds after which a process that is not heard of, or has failed, is given up; that ends all others.

    Raises:
      InputError: coordinator and process are not given together, the address is none, or several processes are to
        join and no cluster is recognised.
      TransientError: the job does not come together, or only a part of it does.
    """
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    who = "This process"
    if processes is not None and not 1 <= processes <= MOST_PROCESSES:
        raise InputError(f"--processes is {shown(processes)}; expected 1 to {MOST_PROCESSES}.")
    if coordinator is not None or process is not None:
        if coordinator is None or processes is None or process is None or not 0 <= process < processes:
            raise InputError(
                f"--coordinator={shown(coordinator)}, --processes={shown(processes)}, --process={shown(process)}: give "
                "all three, processes being counted from 0."
            )
        who = f"Process {process} of {processes}"
        _check_address(coordinator, patience, own=process == 0)
        options |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        options["cluster_detection_method"] = "deactivate"
    else:
        options |= cluster.local_devices()
    failure = _initialize(options, patience, who, coordinator)
    if failure is not None and coordinator is None and cluster.unrecognised(failure):
        _check_alone(processes)
        return
    if failure is not None:
        raise TransientError(f"{who} could not join its job ({reason(failure)}).") from failure
    if processes is not None and jax.process_count() != processes:
        raise TransientError(
            f"--processes={processes}, and {jax.process_count()} joined; see whether all have been started, and run "
            "the command again."
        )
    if jax.process_count() > 1:
        leave_compilation_cache()
    if jax.distributed.is_initialized() and jax.process_index():
        logging.getLogger("hmar_jax").setLevel(logging.WARNING)  # process 0 says it for all


def _initialize(options: dict[str, Any], patience: float, who: str, coordinator: str | None) -> Exception | None:
    """Calls `jax.distributed.initialize`; what it raised. Raises TransientError where it takes too long."""
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
    return failed[0] if failed else None


def _check_alone(processes: int | None) -> None:
    """Raises where JAX recognises no cluster, but this process is not meant to be alone."""
    if sign := cluster.sign_of_others():
        raise TransientError(
            f"{sign}, but JAX does not recognise a cluster here, so that this process would train alone; run the "
            "command again, or set --no-distributed if it is to be alone."
        )
    if processes is not None and processes > 1:
        raise InputError(
            f"--processes={processes}, and JAX recognises no cluster here, so that each process would train alone; "
            "start them by srun, or give each of them --coordinator and --process too."
        )


def _check_address(coordinator: str, patience: float, *, own: bool) -> None:
    """Raises InputError where process 0 cannot listen there, TransientError where another does not reach it in time."""
    address = _ADDRESS.fullmatch(coordinator)
    if address is None or not 0 < int(address["port"]) < 2**16:
        raise InputError(f"--coordinator is {shown(coordinator)}; expected HOST:PORT, such as 10.0.0.2:8476.")
    host, port = address["host"].strip("[]"), int(address["port"])
    deadline = time.monotonic() + patience
    while True:
        try:
            if own:
                socket.create_server(("", port)).close()
            else:
                socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
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


class StopRequests:
    """Called after every step with its number: whether to save and leave there, the same answer in all processes.

    Attributes:
      interrupted: whether Ctrl-C was pressed here.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._requested = False
        self._interrupt_before: Any = signal.SIG_DFL

    def __call__(self, step: int) -> bool:
        if jax.distributed.is_initialized():
            with explained("The processes could not agree on whether to stop"):
                return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def terminate(self, *_: Any) -> None:
        """Handles SIGTERM where there is no job, in which JAX does."""
        self._requested = True

    def interrupt(self, *_: Any) -> None:
        """Handles the first Ctrl-C as SIGTERM, which JAX tells the other processes of.

        The second one kills the process at once, but where it has a prompt, such as a notebook's kernel, which goes on.
        """
        self.interrupted = self._requested = True
        signal.signal(signal.SIGINT, self._interrupt_before if hasattr(sys, "ps1") else signal.SIG_DFL)
        os.write(2, b"\nStopping after the steps under way; another Ctrl-C leaves at once, without saving.\n")
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def preemption() -> Iterator[StopRequests]:
    """Asks for an orderly end on SIGTERM, which clusters send before they take a machine away, and on Ctrl-C.

    Signals are the main thread's. In a job of several processes JAX handles SIGTERM, in whichever it arrives. Where
    SIGINT is ignored, as in a shell's background jobs, it stays so.
    """
    requests, before = StopRequests(), {}
    if threading.current_thread() is threading.main_thread():
        if not jax.distributed.is_initialized():
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, requests.terminate)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            requests._interrupt_before = before[signal.SIGINT] = signal.signal(signal.SIGINT, requests.interrupt)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_first() -> bool:
    """Whether this is process 0, which writes and says what concerns all."""
    return jax.process_index() == 0


def any_of_all(here: bool) -> bool:
    """Whether a flag is set in any process. All call it together, and get the same answer."""
    if jax.process_count() == 1:
        return here
    with explained("The processes could not agree on whether to stop"):
        return bool(np.any(multihost_utils.process_allgather(np.bool_(here))))


def by_first[T](call: Callable[[], T]) -> T:
    """What process 0's call returns, as JSON keeps it, or the HmarError that it raises, in all processes."""
    if jax.process_count() == 1:
        return call()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer["value"] = call()
        except HmarError as error:
            answer |= {"error": type(error).__name__, "said": str(error)}
    text = json.dumps(answer).encode()
    with explained("Process 0 did not answer"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        sent = np.frombuffer(text, np.uint8) if is_first() else np.zeros(size, np.uint8)
        answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)))
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["said"])
    return answer["value"]


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[lock.Lock]:
    """`lock.locked` for a folder that all processes share: process 0 holds it, and all get the same refusal."""
    held = lock.Lock(folder, doing)
    while not by_first(held.take):
        time.sleep(lock.POLL)
    with contextlib.closing(held):
        yield held


def barrier(name: str) -> None:
    """Returns when all processes are here. Raises TransientError where one has gone."""
    if jax.process_count() > 1:
        with explained(f"The processes did not meet ({name})"):
            multihost_utils.sync_global_devices(name)
