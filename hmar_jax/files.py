"""bytes → files that appear whole or not at all; what a disk refuses to write or to read → one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hmar_jax.errors import InputError, TransientError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # Path("gs://bucket") has one slash left
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path as users write it → one of this machine: `~` and `~user` are expanded, URLs refused.

    Every path that a user gives, as an option, in a config or to a function, goes through here.

    Args:
      name: what a sentence calls the path, e.g. `--output`, `data.path`.

    Raises:
      InputError: it is a URL such as `gs://bucket/x`, or begins with the `~` of a user who does not exist.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise InputError(
            f"{name} is {text!r}, a URL; expected a path on this machine, so mount the storage (gcsfuse, s3fs) and "
            "give the path of the mount, or copy it here first."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{name} is {text!r}, and there is no such user here; write the whole path.") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses in the block into an InputError that names `path`, the reason and the remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        refused = refusal(error)
        if refused is None:
            raise
        raise InputError(f"Could not write {path} ({refused}); {remedy(refused)}") from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an InputError that names `path`, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Could not read {path} ({error}); check the path and its permissions.") from None


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file under a temporary name and renames it, making its folder. Raises InputError as `writing`.

    A power cut leaves no empty file. Waiting for the disk costs a file alone some 5 ms, of many threads' hardly any.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a written file its name, once its content is on the disk: a rename alone may be there before it."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def remedy(error: Exception) -> str:
    """What to do about a failed write, as the end of a sentence."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "make room on that disk and run the command again." if full else "check the path and its permissions."


def check_refusal(what: str, error: Exception) -> None:
    """Raises where the error is that the disk refuses to have `what` read; returns where it is missing or damaged.

    Raises:
      InputError: it may not be read. TransientError: it cannot be, such as from a mount that is lost for a while.
    """
    refused = refusal(error)
    if refused is None or refused.errno in (None, errno.ENOENT):
        return
    if isinstance(refused, PermissionError):
        raise InputError(f"{what} may not be read ({refused}); check its permissions.") from error
    raise TransientError(
        f"{what} could not be read ({refused}); see whether its disk is there, and run the command again."
    ) from error


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
