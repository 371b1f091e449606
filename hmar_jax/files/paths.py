"""Paths as users write them → paths of this machine; what may be read there, and reading it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from hmar_jax.errors import InputError, shown
from hmar_jax.files.refusals import check_refusal

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # Path("gs://bucket") has one slash left


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path as users write it → one of this machine: `~` and `~user` are expanded, URLs refused.

    Every path that a user gives, as an option, in a config or to a function, goes through here.

    Args:
      name: what a sentence calls the path, e.g. `--output`, `data.path`.

    Raises:
      InputError: it is no path, empty, a URL such as `gs://bucket/x`, or begins with the `~` of a user who does not
        exist.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise InputError(f"{name} is {shown(path)}; expected a path, as a str or a Path.")
    if not text:
        raise InputError(f"{name} is empty; expected a path.")
    if _URL.match(text):
        raise InputError(
            f"{name} is {shown(text)}, a URL; expected a path on this machine, so mount the storage (gcsfuse, s3fs) "
            "and give the path of the mount, or copy it here first."
        )
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeError:
        raise InputError(f"{name} is {shown(text)}, which has half a character; expected a path.") from None
    except RuntimeError:
        raise InputError(f"{name} is {shown(text)}, and there is no such user here; write the whole path.") from None


def is_there(path: Path, what: str) -> bool:
    """Whether a file or folder is there. Unlike `Path.exists`, it does not call one absent that may not be looked at.

    Args:
      what: what a sentence calls it, before the path.

    Raises:
      InputError: it may not be looked at. TransientError: the disk refuses.
    """
    try:
        path.stat()
    except OSError as error:
        check_refusal(f"{what} {path}", error)
        return False
    return True


def check_regular(path: Path, what: str) -> None:
    """Raises InputError unless a path is a regular file: a named pipe may never answer, a device may never end.

    Args:
      what: what a sentence calls it, before the path.

    Raises:
      FileNotFoundError, NotADirectoryError: it does not exist. InputError: it is another kind of file, may not be
        looked at, or its path is wrong. TransientError: the disk does not answer.
    """
    with _refusing(path, what):
        _check_mode(path.stat(), path, what)


def open_regular(path: Path, what: str) -> io.BufferedReader:
    """A regular file, opened to be read; raises as `check_regular` does, also where it may not be read."""
    check_regular(path, what)  # opening a device may already do something
    with _refusing(path, what):
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_mode(os.fstat(file.fileno()), path, what)  # it may have changed since
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: Path, what: str, most: int) -> bytes:
    """All of a regular file of at most `most` bytes; raises as `open_regular` does, and InputError if it is larger."""
    with open_regular(path, what) as file, _refusing(path, what):
        content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # memory is taken for what is asked for
    if len(content) > most:
        raise InputError(f"{what} {path} is larger than {most} bytes; expected a smaller file.")
    return content


def _check_mode(status: os.stat_result, path: Path, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{what} {path} is {kind}; give a file.")


@contextlib.contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Turns an OSError of the block into a sentence, unless it says that the file does not exist."""
    try:
        yield
    except OSError as error:
        check_refusal(f"{what} {path}", error)
        raise


def check_readable(path: Path, what: str) -> None:
    """Raises InputError where a file may not be read; libraries in Rust and C++ call such a one absent.

    What else is wrong with it they say themselves.
    """
    try:
        if path.is_file():  # a named pipe would be waited for
            path.open("rb").close()
    except PermissionError as error:
        check_refusal(f"{what} {path}", error)
    except OSError:
        pass


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths name one file or folder, perhaps through links, or will once they exist."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
