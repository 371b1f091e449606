"""Bytes → files, and folders, that appear whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hmar_jax.files.refusals import writing

_HERE, _EXCHANGE = -100, 2  # Linux: AT_FDCWD and RENAME_EXCHANGE of renameat2


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file as `written_whole` does."""
    with written_whole(path) as partial:
        partial.write_bytes(content)
    return path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name for the block to write a file to, which is then renamed. The folder is made; what a block that
    fails has written is removed. Raises as `writing` does.

    A power cut leaves no empty file. Waiting for the disk costs a file alone some 5 ms, of many threads' hardly any.
    """
    partial = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove(partial)  # a link, which would be written through, or a named pipe, which would be waited for
            yield partial
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a written file its name, once its content is on the disk: a rename alone may be there before it."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def swap_in(new: Path, path: Path) -> None:
    """Renames the folder `new` to `path`, in place of what is there. Killed at any moment, it has lost nothing.

    The two change places in one step, or, on file systems without that, what is there steps aside first, as
    `.NAME.old/NAME`, from where `put_back` has it.
    """
    path = path.absolute()
    aside = _aside(path)
    put_back(path)
    remove(aside)  # what a killed run left
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    if _exchange(new, path):
        aside = new
    else:
        aside.mkdir()
        try:
            os.rename(path, aside / path.name)
            os.rename(new, path)
        except BaseException:
            put_back(path)
            remove(aside)
            raise
    remove(aside)


def remove(path: Path) -> None:
    """Removes a folder or whatever is there, as far as that may be: `rmtree` alone would wait for a named pipe."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def put_back(path: Path) -> None:
    """Gives a folder its name again where a `swap_in` that was killed in its midst took that away."""
    path = path.absolute()  # `.` has no name
    if not path.name:
        return
    old = _aside(path) / path.name
    if not os.path.lexists(path) and os.path.lexists(old):
        os.rename(old, path)
        remove(old.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Has two folders change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
