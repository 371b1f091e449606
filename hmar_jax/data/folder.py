"""pictures in folders → (image, label) examples. A class is a subfolder; pictures with no subfolder are one class. A
folder with both is refused, lest a stray picture hide the classes.

Subfolders and pictures may be symbolic links. Names that start with a dot are skipped; files that are no pictures by
their ending are left out, which the log says. Pictures deeper than one level are not looked for.

Axis letters: H, W height and width of the picture as it is stored.
"""

from __future__ import annotations

import collections
import errno
import functools
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hmar_jax.data.picture_files import decode, endings
from hmar_jax.errors import InputError, printable, shown
from hmar_jax.files import check_refusal, is_there, local_path

logger = logging.getLogger(__name__)

_SPLITS = ("train", "training", "val", "valid", "validation", "test")
_UNFIT = re.compile(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that are no UTF-8
_SHOWN = 8  # of the endings of files that are left out


class FolderSource:
    """The pictures of `path`, class by class in the order of their names; read when asked for.

    Args:
      path: a folder of class folders of pictures, or a folder of pictures.

    Raises:
      InputError: no such folder, one that may not be read, no pictures, a class folder without any, pictures both
        loose and in subfolders, or a link in place of a class folder that leads nowhere.
      TransientError: the disk refuses.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = local_path(path, "data.path")
        if not path or not is_there(root, "Folder"):
            raise InputError(f"Folder {str(path)!r} does not exist; set data.path to a folder of pictures.")
        if not root.is_dir():
            raise InputError(f"{str(root)!r} is no folder; set data.path to a folder of pictures.")
        loose, others, folders = _look(root)
        for name in others:
            if not os.path.splitext(name)[1] and os.path.islink(root / name) and not os.path.exists(root / name):
                raise InputError(f"{str(root / name)!r} is a link that leads nowhere; mend it or take it away.")
        if loose:
            filled = next((folder for folder in folders if _look(folder)[0]), None)
            if filled is not None:
                raise InputError(
                    f"Folder {str(root)!r} holds both loose pictures, such as {os.path.basename(loose[0])!r}, and "
                    f"subfolders of pictures, such as {filled.name!r}; keep one or the other."
                )
            folders = [root]
        if not folders:
            raise InputError(
                f"Folder {str(root)!r} holds no pictures{_others(others)}; put pictures such as .jpg, .png or .webp "
                "files in it, or in one subfolder a class."
            )
        self.class_names: tuple[str, ...] = tuple(
            folder.resolve().name if folder == root else folder.name for folder in folders
        )
        for name in self.class_names:
            if _UNFIT.search(name):  # it goes into models and token caches, and from there to terminals
                raise InputError(
                    f"The name of class folder {shown(name)} is not UTF-8 or has control characters; rename it."
                )
        self._root = root
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, folder in enumerate(folders):
            files, more, deeper = _look(folder)
            if not files:
                _refuse_splits(root, folders)
                raise InputError(
                    f"Class folder {str(folder)!r} holds no pictures{_others(more)}"
                    f"{' but folders' if deeper else ''}; fill it or take it away."
                )
            others += more if folder != root else []
            self._files += files
            self._labels += [label] * len(files)
        if others:
            _log_once(
                f"{str(root)!r}: {len(self._files)} pictures are used, what is no picture is left out{_others(others)}."
            )

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of a picture below the folder."""
        return os.path.relpath(self._files[index], self._root)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Picture `index`: "image" (H,W,3) uint8; "label" int32. Raises BrokenPictureError if it cannot be read."""
        file = self._files[index]
        return {"image": decode(file, f"Picture {file!r}"), "label": np.int32(self._labels[index])}


def _look(folder: Path) -> tuple[list[str], list[str], list[Path]]:
    """The pictures of a folder, the names of its other files, and its subfolders; each in the order of names.

    A link that leads nowhere counts as a picture if it is named like one: reading it says so, where skipping it would
    shrink the data in silence.
    """
    pictures, others, folders = [], [], []
    try:
        with os.scandir(folder) as found:  # knows files from folders without asking the disk about each
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        check_refusal(f"Folder {str(folder)!r}", error)
        raise InputError(f"Folder {str(folder)!r} cannot be read ({error}); check it.") from error
    for entry in entries:
        named = entry.name.lower().endswith(endings())
        if _is_folder(entry, named):
            folders.append(Path(entry.path))
        elif named:
            pictures.append(entry.path)
        else:
            others.append(entry.name)
    return pictures, others, folders


def _is_folder(entry: os.DirEntry[str], named_as_picture: bool) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link: to itself, or into a folder that may not be read
        if not named_as_picture and error.errno != errno.ELOOP:
            check_refusal(f"{entry.path!r}", error)
        return False


def _refuse_splits(root: Path, folders: list[Path]) -> None:
    """Raises InputError if the class folders seem to hold class folders themselves, as those named train and val."""
    holders = [folder for folder in folders if any(_look(deeper)[0] for deeper in _look(folder)[2])]
    if holders:
        first = min(holders, key=lambda folder: _SPLITS.index(folder.name) if folder.name in _SPLITS else len(_SPLITS))
        raise InputError(
            f"The subfolders of {str(root)!r} hold folders of pictures, not pictures: "
            f"{', '.join(repr(folder.name) for folder in holders[:_SHOWN])}; set data.path to the one whose subfolders "
            f"are the classes, such as {str(first)!r}."
        )


def _others(names: Iterable[str]) -> str:
    """Files that are no pictures, by ending, such as " (3 other files: 2 .txt, 1 without ending)"; "" without any."""
    counts = collections.Counter(os.path.splitext(name)[1].lower() or "without ending" for name in names)
    if not counts:
        return ""
    said = [f"{count} {printable(ending, 30)}" for ending, count in counts.most_common(_SHOWN)]
    number = counts.total()
    return f" ({number} other file{'s' * (number > 1)}: {', '.join(said + ['…'] * (len(counts) > _SHOWN))})"


@functools.cache
def _log_once(message: str) -> None:
    """Logs what would be said again at every opening."""
    logger.info("%s", message)
