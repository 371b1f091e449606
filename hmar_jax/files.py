"""bytes → files that appear whole or not at all; what a disk refuses → one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from hmar_jax.errors import InputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an InputError that names `path`, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Could not write {path} ({error}); {remedy(error)}") from None


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file under a temporary name and renames it, making its folder. Raises InputError as `writing`."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def remedy(error: Exception) -> str:
    """What to do about a failed write, as the end of a sentence."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "make room on that disk and run the command again." if full else "check the path and its permissions."
