"""pictures in folders → (image, label) examples. A class is a subfolder; pictures with no subfolder are one class. A
folder with both is refused, lest a stray picture hide the classes.

Subfolders and pictures may be symbolic links. Names that start with a dot are skipped, and so are files that are no
pictures by their ending. Pictures deeper than one level are not looked for.

Axis letters: H, W height and width of the picture as it is stored.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hmar_jax.errors import InputError, reason
from hmar_jax.files import check_refusal, is_there, local_path

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderSource:
    """The pictures of `path`, class by class in the order of their names; read when asked for.

    Args:
      path: a folder of class folders of pictures, or a folder of pictures.

    Raises:
      InputError: no such folder, one that may not be read, no pictures, a class folder without any, or pictures both
        loose and in subfolders.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = local_path(path, "data.path")
        if not path or not is_there(root, "Folder") or not root.is_dir():
            raise InputError(f"Folder {str(path)!r} does not exist; set data.path to a folder of pictures.")
        loose = _pictures(root)
        folders = [Path(entry) for entry in _visible(root) if entry.is_dir()]
        if loose:
            filled = next((folder for folder in folders if _pictures(folder)), None)
            if filled is not None:
                raise InputError(
                    f"Folder {str(root)!r} holds both loose pictures, such as {os.path.basename(loose[0])!r}, and "
                    f"subfolders of pictures, such as {filled.name!r}; keep one or the other."
                )
            folders = [root]
        if not folders:
            raise InputError(
                f"Folder {str(root)!r} holds no pictures; put {', '.join(ENDINGS)} files in it, or in one subfolder "
                "a class."
            )
        self.class_names: tuple[str, ...] = tuple(
            folder.resolve().name if folder == root else folder.name for folder in folders
        )
        self._root = root
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, folder in enumerate(folders):
            files = _pictures(folder)
            if not files:
                raise InputError(f"Class folder {str(folder)!r} holds no pictures; fill it or take it away.")
            self._files += files
            self._labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of a picture below the folder."""
        return os.path.relpath(self._files[index], self._root)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Picture `index`: "image" (H,W,3) uint8; "label" int32. Raises InputError if it cannot be read."""
        file = self._files[index]
        return {"image": decode(file, f"Picture {file!r}"), "label": np.int32(self._labels[index])}


def decode(file: str | os.PathLike[str] | io.BytesIO, name: str, background: str = "white") -> np.ndarray:
    """A picture file as (H,W,3) uint8, turned upright as its EXIF data asks.

    Args:
      file: path or open file, of any format that Pillow reads; of an animation, the first frame.
      name: what an error calls it, e.g. "Picture 'a.png'". background: colour that transparent parts are laid on.

    Raises:
      InputError: it is missing, corrupt, cut short, or in floating point. TransientError: the disk refuses.
    """
    try:
        with Image.open(file) as opened:
            opened.load()
            return np.asarray(_rgb(ImageOps.exif_transpose(opened), background))
    except InputError as error:
        raise InputError(f"{name} {error}") from None
    # Pillow's plugins raise nearly anything for broken bytes: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        check_refusal(name, error)
        raise InputError(f"{name} cannot be read ({reason(error)}); replace it or take it away.") from error


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16 bits: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"has pixels of mode {image.mode!r}, of no known range; save it with 8 or 16 bits a channel.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:  # knows files from folders without asking the disk about each
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        check_refusal(f"Folder {str(folder)!r}", error)
        raise


def _pictures(folder: Path) -> list[str]:
    # A dangling link counts: reading it says so, where skipping it would shrink the data in silence.
    return [entry.path for entry in _visible(folder) if entry.name.lower().endswith(ENDINGS) and not entry.is_dir()]
