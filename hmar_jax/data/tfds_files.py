"""The files of a prepared TFDS dataset, found and checked before TFDS reads them.

TFDS imports the module of any class that features.json names, opens the paths that a feature or a shard's name leads
to, and waits for a named pipe. So this looks first: only classes of TFDS itself, plain names, regular files.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from hmar_jax.errors import InputError, shown
from hmar_jax.files import check_refusal, json_files, local_path, read_bytes

REMEDY = "prepare the dataset again"
_MOST_CLASSES = 2**20  # each has a name, made up where the dataset has none
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:,=\\]+))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?")
_FEATURES = {"tensorflow_datasets.core.features.feature.Tensor"} | {  # an old name that TFDS knows
    f"{kind.__module__}.{kind.__name__}"
    for kind in (
        tfds.features.FeaturesDict,
        tfds.features.Image,
        tfds.features.LabeledImage,
        tfds.features.ClassLabel,
        tfds.features.Text,
        tfds.features.Scalar,
        tfds.features.Tensor,
        tfds.features.BBoxFeature,
        tfds.features.Sequence,
    )
}
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_JSON_KEYS = ("json", "content")  # whose text TFDS reads as JSON
_PLAIN_KEY = re.compile(r"[\w .:+/-]*")  # such as image/filename, for which TFDS looks in a file image.filename.…


def dataset_folder(name: str, path: str) -> Path:
    """The folder of a prepared dataset: DATA/NAME/VERSION or DATA/NAME/CONFIG/VERSION, of the highest version.

    Args:
      name: `NAME`, `NAME/CONFIG`, `NAME:VERSION` or `NAME/CONFIG:VERSION`; a version may have stars, as 1.*.*.
      path: the data directory DATA; empty for $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      InputError: it is not there, or has several configs of which none is named. TransientError: the disk refuses.
    """
    data = local_path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "data.path")
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise InputError(f"TFDS has no dataset {shown(name)}; expected data.name as NAME, NAME/CONFIG or NAME:VERSION.")
    root, wanted = data / parts["name"], parts["version"] or "*.*.*"
    try:
        if parts["config"]:
            return _highest(root / parts["config"], wanted)
        with os.scandir(root) as found:
            configs = sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))
        if any(map(tfds.core.Version.is_valid, configs)):
            return _highest(root, wanted)
        if len(configs) == 1:
            return _highest(root / configs[0], wanted)
    except OSError as error:
        check_refusal(f"TFDS dataset {shown(name)}", error)
        configs = []
    if configs:
        named = ", ".join(shown(f"{parts['name']}/{config}") for config in configs[:8])
        raise InputError(f"TFDS dataset {name!r} has several configs; set data.name to one of them: {named}.")
    raise _not_prepared(name, parts["name"], data, path)


def _highest(folder: Path, wanted: str) -> Path:
    with os.scandir(folder) as found:
        versions = [entry.name for entry in found if tfds.core.Version.is_valid(entry.name) and "*" not in entry.name]
    there = [version for version in map(tfds.core.Version, versions) if version.match(wanted)]
    if not there:
        raise FileNotFoundError
    return folder / str(max(there))


def _not_prepared(name: str, registered: str, data: Path, path: str) -> InputError:
    try:
        builder = tfds.builder_cls(registered)
    except Exception:  # TFDS imports its code of the dataset, which may want other packages
        return InputError(f"TFDS has no dataset {name!r}, nor is one in {str(data)!r}; check data.name and data.path.")
    manual = " --manual_dir=FOLDER_OF_THE_DOWNLOADED_FILES" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
    return InputError(
        f"TFDS dataset {name!r} is not prepared in {str(data)!r}; with TensorFlow installed, run "
        f"`tfds build {name} --file_format=array_record{manual}{f' --data_dir={path}' if path else ''}`."
    )


def check_files(folder: Path) -> None:
    """Raises InputError unless all that TFDS reads at once of a prepared dataset is what TFDS itself writes.

    Raises:
      InputError: a file is missing, is no regular file, is no JSON, or names a class that is not one of TFDS's own.
      TransientError: the disk refuses.
    """
    try:
        with os.scandir(folder) as found:
            for entry in found:
                _check_entry(entry)
        info = json_files.read(folder / "dataset_info.json", "File", REMEDY)
        features = json_files.read(folder / "features.json", "File", REMEDY)
    except OSError as error:
        check_refusal(f"Folder {str(folder)!r}", error)
        raise InputError(f"Folder {str(folder)!r} is no prepared TFDS dataset ({error}); {REMEDY}.") from None
    if not isinstance(info, dict) or not isinstance(features, dict):
        raise InputError(f"Folder {str(folder)!r} has metadata that are no JSON objects; {REMEDY}.")
    _check_features(features, f"File {str(folder / 'features.json')!r}")


def class_names(folder: Path, count: int) -> tuple[str, ...]:
    """The names of the feature `label`, which has `count` classes; their numbers where it has no names.

    TFDS reads the names too, but goes on without a word where they are no text, doubled, or too few.

    Raises:
      InputError: they are not as many distinct names as there are classes.
    """
    file = folder / "label.labels.txt"
    if not 1 <= count <= _MOST_CLASSES:
        raise InputError(f"Folder {str(folder)!r} has {count} classes; expected 1 to {_MOST_CLASSES}.")
    try:
        lines = read_bytes(file, "File", json_files.MOST_BYTES).decode().split("\n")
    except FileNotFoundError:
        return tuple(map(str, range(count)))
    except UnicodeError:
        raise InputError(f"File {str(file)!r} is not UTF-8; {REMEDY}.") from None
    names = tuple(filter(None, map(str.strip, lines)))
    if len(set(names)) != len(names) or len(names) != count:
        raise InputError(f"File {str(file)!r} has {len(names)} names, not {count} distinct ones; {REMEDY}.")
    return names


def _check_entry(entry: os.DirEntry[str]) -> None:
    status = entry.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError(f"File {entry.path!r} is no regular file; {REMEDY}.")
    if entry.name.endswith(".txt") and status.st_size > json_files.MOST_BYTES:
        raise InputError(f"File {entry.path!r} has {status.st_size} bytes of names; {REMEDY}.")


def _check_features(value: Any, where: str) -> None:
    """Raises InputError where a description of features, at any depth, names a class or a file that is not TFDS's."""
    if isinstance(value, list):
        for item in value:
            _check_features(item, where)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if not _PLAIN_KEY.fullmatch(key) or ".." in key:  # TFDS looks for files of that name
            raise InputError(f"{where} has a feature of the name {shown(key)}; expected letters and digits.")
        if key in _CLASS_KEYS and isinstance(item, str) and item not in _FEATURES:
            raise InputError(
                f"{where} has a feature of the class {shown(item)}; expected classes of TFDS itself, for images, "
                "labels, texts and tensors."
            )
        if key == "names_file":
            raise InputError(f"{where} has a feature whose names are in another file, {shown(item)}; {REMEDY}.")
        if key in _JSON_KEYS and isinstance(item, str):
            item = json_files.parse(item, f"{where}: its part {key!r}", REMEDY)
        _check_features(item, where)
