"""exception → what the user must mend, what may pass by itself, or a bug of ours.

Saves, restores, barriers and the train step meet the same failures: of a disk, of memory, or of another process.
JAX, Orbax and TensorStore raise them as RuntimeError, ValueError or OSError and tell them apart by their text alone,
which is read here and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from hmar_jax.errors import HmarError, InputError, MachineError, TransientError, reason
from hmar_jax.files.refusals import FULL, PASSING, WRONG_PATHS, refusal, refused_by_disk

TRAINING_MEMORY = (
    "lower batch_size, raise accumulate, set remat='all' or split the parameters over mesh.fsdp devices; `hmar-jax "
    "compile-check` tells what fits"
)
_PEER = re.compile(
    r"DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED|CANCELLED|[Cc]oordination service|[Bb]arrier|[Hh]eartbeat|[Pp]reempt|"
    r"Gloo|nccl(Remote|System)Error|NCCL.*(timed? ?out|abort)|[Cc]onnection (reset|closed|refused|timed out)|"
    r"Socket closed"
)


def explain(error: BaseException, what: str, memory: str = TRAINING_MEMORY, after: str = "") -> HmarError | None:
    """The sentence for a failure, or None where the error is a bug of ours or already is a sentence.

    Args:
      error: what was raised; its causes are looked at too.
      what: the beginning of the sentence, e.g. "Could not save checkpoint X".
      memory: what to do about too little memory. after: a sentence for the end.

    Returns:
      MachineError: a full disk, or too little memory. InputError: a permission, or a path that is wrong.
      TransientError: a disk that does not answer, or another process that has gone, is late, or was preempted.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HmarError):
            return None
        if found := _explain(cause, what, memory):
            kind, sentence = found
            return kind(f"{sentence} {after}".rstrip())
        cause = cause.__cause__
    return None


def _explain(error: BaseException, what: str, memory: str) -> tuple[type[HmarError], str] | None:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return MachineError, f"{what}: this machine has too little memory; {memory}."
    if not isinstance(error, OSError | RuntimeError | ValueError):
        return None
    said = f"{what} ({reason(error)})"
    refused = refusal(error)  # before memory: TensorStore calls a full disk RESOURCE_EXHAUSTED
    if refused is not None and refused.errno is not None:
        if refused.errno in FULL | PASSING or isinstance(refused, PermissionError) or refused.errno == errno.EROFS:
            known = refused_by_disk(what, refused)
            return type(known), str(known)
        if wrong := WRONG_PATHS.get(refused.errno):
            return InputError, f"{what} ({refused}); {wrong}."
        if refused.errno in (errno.EMFILE, errno.ENFILE):
            return MachineError, f"{what} ({refused}); raise the limit of open files (`ulimit -n`)."
        return None
    if isinstance(error, TimeoutError | ConnectionError):
        return TransientError, f"{said}; run the command again."
    if _of_jax(error) and "RESOURCE_EXHAUSTED" in str(error):
        return MachineError, f"{said}: the device has too little memory; {memory}."
    if isinstance(error, RuntimeError) and _PEER.search(str(error)):
        return TransientError, f"{said}: another process of the job has gone or is late; run the command again."
    return None


def _of_jax(error: BaseException) -> bool:
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError)


@contextlib.contextmanager
def explained(what: str, memory: str = TRAINING_MEMORY, after: str = "") -> Iterator[None]:
    """Raises what `explain` makes of an exception of the block; a bug passes as it is."""
    try:
        yield
    except Exception as error:
        known = explain(error, what, memory, after)
        if known is None:
            raise
        raise known from error
