"""What a disk refuses to read or to write → one sentence that names the path, the reason and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hmar_jax.errors import HmarError, InputError, MachineError, TransientError

# What no later try can mend, as the path itself is wrong, and what to do about it.
WRONG_PATHS = {
    errno.EISDIR: "give a file, not a folder",
    errno.ELOOP: "a symbolic link leads to itself, so make it anew",
    errno.ENAMETOOLONG: "check the path, which is too long",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a network file system or a disk answers while it is away, and may not answer a minute later.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENOLINK, errno.ECOMM, errno.ENODEV, errno.ENXIO,
}  # fmt: skip
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses in the block into a sentence that names `path`, the reason and the remedy.

    Raises:
      MachineError: the disk is full. TransientError: it does not answer. InputError: another refusal.
    """
    try:
        yield
    except HmarError:
        raise
    except (OSError, RuntimeError) as error:
        refused = refusal(error)
        if refused is None:
            raise
        raise refused_by_disk(f"Could not write {path}", refused) from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a sentence that names `path`, the reason and the remedy, as `writing` does."""
    try:
        yield
    except OSError as error:
        raise refused_by_disk(f"Could not read {path}", error) from None


def check_refusal(what: str, error: Exception) -> None:
    """Raises where the error is that the disk refuses to have `what` read; returns where it is missing or damaged.

    Raises:
      InputError: it may not be read, or its path is wrong, such as that of a folder. TransientError: it cannot be,
        such as from a mount that is lost for a while.
    """
    refused = refusal(error)
    if refused is None or refused.errno in (None, errno.ENOENT, errno.ENOTDIR):
        return
    if wrong := WRONG_PATHS.get(refused.errno):
        raise InputError(f"{what} could not be read ({refused.strerror}); {wrong}.") from error
    if isinstance(refused, PermissionError):
        raise InputError(f"{what} may not be read ({refused}); check its permissions.") from error
    raise refused_by_disk(f"{what} could not be read", refused) from error


def refused_by_disk(what: str, error: OSError) -> HmarError:
    """The error to raise for a refusal of a disk; `what` begins its sentence, e.g. "Could not write F"."""
    kind = TransientError if error.errno in PASSING else MachineError if error.errno in FULL else InputError
    return kind(f"{what} ({error}); {remedy(error)}")


def remedy(error: Exception) -> str:
    """What to do about a refusal of a disk, as the end of a sentence."""
    number = getattr(error, "errno", None)
    if number in PASSING:
        return "see whether its disk is there, and run the command again."
    full = number in FULL
    return "make room on that disk and run the command again." if full else "check the path and its permissions."


def refusal(error: Exception) -> OSError | None:
    """What the system refused, None where it refused nothing; libraries in C++ tell it in a text of their own."""
    if isinstance(error, OSError) and error.errno:
        return error
    said = str(error)
    if code := re.search(r"os_error_code='(\d+)'", said):  # TensorStore
        return OSError(int(code[1]), os.strerror(int(code[1])))
    if (words := re.search(r"\w\(\) failed: ([^;]+)", said)) and words[1] in _NUMBERS:  # array_record
        return OSError(_NUMBERS[words[1]], words[1])
    return error if isinstance(error, OSError) else None
