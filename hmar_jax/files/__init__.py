"""paths as users write them → paths of this machine; bytes → files that appear whole or not at all.

What a disk refuses to write or to read becomes one sentence.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from hmar_jax.errors import HmarError, InputError, MachineError, TransientError, shown

logger = logging.getLogger(__name__)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # Path("gs://bucket") has one slash left
_HERE, _EXCHANGE = -100, 2  # Linux: AT_FDCWD and RENAME_EXCHANGE of renameat2
# What no later try can mend, as the path itself is wrong, and what to do about it.
WRONG_PATHS = {
    errno.EISDIR: "give a file, not a folder",
    errno.ELOOP: "a symbolic link leads to itself, so make it anew",
    errno.ENAMETOOLONG: "check the path, which is too long",
}
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
_MOST_LOOKED_AT = 16 * 2**20  # of a file that is to be replaced: reports and schedules have a few MiB at most
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a network file system or a disk answers while it is away, and may not answer a minute later.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENOLINK, errno.ECOMM, errno.ENODEV, errno.ENXIO,
}  # fmt: skip


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


def check_outputs(name: str, outputs: Iterable[Path], inputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Raises InputError where a file to be written is one of those that are read.

    Args:
      name: the option of the outputs, e.g. `--output`. inputs: option → its path or hub id; None where it is not given.
    """
    for option, given in inputs.items():
        for output in outputs if given else ():
            if same_file(output, os.path.expanduser(given or "")):
                raise InputError(f"{output} is what {option}={given} names, and would be lost; choose another {name}.")


def check_kind(name: str, path: Path, is_kind: Callable[[bytes], bool], kind: str) -> None:
    """Raises InputError where a file to be written is there already and is something else, which would be lost.

    Args:
      name: the option, e.g. `--json`. is_kind: (content) → whether it may be replaced; False or any error where it may
        not. Of a file larger than 16 MiB it sees the beginning. kind: what that is, in words.
    """
    if not is_there(path, "File"):
        return
    with open_regular(path, name) as file, reading(path):
        content = file.read(_MOST_LOOKED_AT)
    try:
        replaceable = is_kind(content)
    except Exception:  # other content may be anything, and is_kind fail anyhow
        replaceable = False
    if not replaceable:
        raise InputError(f"{name} is {path}, which is there already and is not {kind}; choose another file.")


def check_pictures(name: str, outputs: Iterable[Path]) -> None:
    """Raises InputError where a PNG or GIF file to be written is there and is another file, as `check_kind` does."""
    for output in outputs:
        if output.suffix.lower() == ".gif":
            check_kind(name, output, lambda content: content.startswith(b"GIF8"), "a GIF file")
        else:
            check_kind(name, output, lambda content: content.startswith(b"\x89PNG\r\n\x1a\n"), "a PNG file")


def check_folder(name: str, folder: Path) -> None:
    """Raises InputError where files cannot be written into a folder, be it there or yet to be made.

    For commands that work for long before they write, whose disk may still refuse then.

    Args:
      name: the option, e.g. `--output`.
    """
    for above in (folder.absolute(), *folder.absolute().parents):
        try:
            is_folder = stat.S_ISDIR(above.stat().st_mode)
        except OSError as error:
            check_refusal(f"{name} {folder}", error)
            continue
        if not is_folder:
            raise InputError(f"{name} is {folder}, but {above} is a file; choose another folder.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"{name} is {folder}, but {above} may not be written; check its permissions.")
        return


def check_files(name: str, outputs: Iterable[Path]) -> None:
    """Raises InputError where one of these files cannot be written, for its folder (`check_folder`) or as it is one."""
    for output in outputs:
        check_folder(name, output.parent)
        if is_there(output, name) and output.is_dir():
            raise InputError(f"{name} names {output}, which is a folder; give a file.")
        is_there(_partial(output), name)  # whose name is longer


def note_replaced(outputs: Iterable[Path]) -> None:
    """Logs a line that names those files to be written that are there already, where any are."""
    there = [str(path) for path in outputs if os.path.lexists(path)]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        logger.info("Replacing %s%s.", ", ".join(there[:3]), more)


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


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file under a temporary name and renames it, making its folder. Raises as `writing` does.

    A power cut leaves no empty file. Waiting for the disk costs a file alone some 5 ms, of many threads' hardly any.
    """
    partial = _partial(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove(partial)  # a link, which would be written through, or a named pipe, which would be waited for
            partial.write_bytes(content)
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _partial(path: Path) -> Path:
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


def remedy(error: Exception) -> str:
    """What to do about a refusal of a disk, as the end of a sentence."""
    number = getattr(error, "errno", None)
    if number in PASSING:
        return "see whether its disk is there, and run the command again."
    full = number in FULL
    return "make room on that disk and run the command again." if full else "check the path and its permissions."


def refused_by_disk(what: str, error: OSError) -> HmarError:
    """The error to raise for a refusal of a disk; `what` begins its sentence, e.g. "Could not write F"."""
    kind = TransientError if error.errno in PASSING else MachineError if error.errno in FULL else InputError
    return kind(f"{what} ({error}); {remedy(error)}")


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
