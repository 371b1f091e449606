"""Checks of files that a command is to write, before the work that they hold begins."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from hmar_jax.errors import InputError
from hmar_jax.files.paths import is_there, open_regular, same_file
from hmar_jax.files.refusals import check_refusal, reading
from hmar_jax.files.whole_files import partial_path

logger = logging.getLogger(__name__)

_MOST_LOOKED_AT = 16 * 2**20  # of a file that is to be replaced: reports and schedules have a few MiB at most


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
        is_there(partial_path(output), name)  # whose name is longer


def note_replaced(outputs: Iterable[Path]) -> None:
    """Logs a line that names those files to be written that are there already, where any are."""
    there = [str(path) for path in outputs if os.path.lexists(path)]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        logger.info("Replacing %s%s.", ", ".join(there[:3]), more)
