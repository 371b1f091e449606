"""batches of tokens ⇄ a cache on disk, what the transformer stages train from.

    cache.json                            the header: see `Header`
    tokens-00000-of-0000N.array_record    a record an image: int32 label, then crops × L uint16 tokens, little-endian

A cache appears under its name only when it is complete; until then it is in `.NAME.partial-HOST-PID` beside it.

Axis letters: B batch, L tokens of one picture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from hmar_jax.config.plain import check_names, from_plain, to_plain
from hmar_jax.errors import InputError, printable, reason, saying, shown
from hmar_jax.files import (
    check_refusal,
    check_regular,
    json_files,
    local_path,
    open_regular,
    remove,
    write_whole,
    writing,
)
from hmar_jax.files.lock import is_running
from hmar_jax.scales import ScaleLadder

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER = "cache.json"
MOST_CODES = 2**16  # a record has 16 bits for each
_ENDS = 2**16  # bytes at either end of a shard that its digest is of: to read all of a large cache takes minutes


@dataclasses.dataclass(frozen=True)
class Header:
    """What `cache.json` says: geometry, contents, which tokenizer made the tokens and from which pictures.

    Attributes:
      sides: of the ladder. codebook_size: at most 65536. crops: versions of each picture. count: pictures.
      class_names: of labels 0, 1, … tokenizer: its fingerprint. source: what the pictures were, in words.
      shards: files. dtype: the encoder computed in; caches from before it was recorded are float32.
      ends: of each shard, the SHA-256 of `_digest_of_ends`; empty in caches from before it was recorded. The rest of a
        shard is guarded by array_record's own checksums, which cannot tell it from a shard of another cache.

    Raises:
      InputError: a field is out of its range.
    """

    sides: tuple[int, ...]
    codebook_size: int
    crops: int
    count: int
    class_names: tuple[str, ...]
    tokenizer: str
    source: str
    shards: int
    dtype: str = "float32"
    ends: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        ScaleLadder(self.sides)
        for name, most in (("codebook_size", MOST_CODES), ("crops", 2**31), ("count", 2**62), ("shards", 2**31)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 to {most}.")
        check_names(self.class_names)
        if len(self.ends) not in (0, self.shards):
            raise InputError(f"ends has {len(self.ends)} digests; expected one for each of {self.shards} shards.")

    @functools.cached_property
    def record_bytes(self) -> int:
        """The size of each record: a label, then the codes of all crops."""
        return 4 + 2 * self.crops * ScaleLadder(self.sides).length


def write_token_cache(
    path: str | os.PathLike[str],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    ladder: ScaleLadder,
    codebook_size: int,
    crops: int,
    class_names: Sequence[str],
    tokenizer: str,
    source: str,
    shard_size: int = 16384,
) -> int:
    """Writes a token cache in this process, one batch at a time; image i of the stream becomes example i.

    Args:
      path: the cache's directory, new or empty.
      batches: pairs of tokens, (crops,B,L) of any integer type in [0, codebook_size), and labels, (B,).
      ladder: of the tokens. codebook_size: at most 65536. crops: pictures per image.
      class_names: of labels 0, 1, … tokenizer: its fingerprint. source: what the pictures were, in words.
      shard_size: images in a file.

    Returns:
      How many images were written.

    Raises:
      InputError: something is there already, a batch does not fit the above, or the disk refuses.
    """
    path = local_path(path, "The token cache's path")
    if not 1 <= codebook_size <= MOST_CODES:
        raise InputError(
            f"codebook_size={codebook_size} does not fit a token cache's 16 bits; use at most {MOST_CODES}."
        )
    check_free(path)
    partial = _new_partial(path)
    shards: list[Path] = []
    count = 0
    try:
        with writing(path):
            partial.mkdir(parents=True)
        records = records_of(batches, ladder.length, codebook_size, crops, len(class_names))
        for first in records:
            shards.append(partial / f"tokens-{len(shards):05d}")
            count += write_shard(shards[-1], itertools.chain([first], itertools.islice(records, shard_size - 1)), path)
        if not count:
            raise InputError(f"There are no images to write to the token cache {str(path)!r}.")
        names = tuple(class_names)
        header = Header(ladder.sides, codebook_size, crops, count, names, tokenizer, source, len(shards))
        with writing(path):
            for shard, name in zip(shards, shard_names(len(shards)), strict=True):
                shard.rename(partial / name)
        write_header(partial, header)
        with writing(path):
            partial.rename(path)
    except BaseException:
        remove(partial)
        raise
    return count


def validation_of(path: str | os.PathLike[str]) -> Path:
    """Where a token cache has that of the held-out pictures, if it has one."""
    return local_path(path, "data.path") / "validation"


def check_free(path: Path) -> None:
    """Raises InputError where something is in the place of a new cache; an empty folder is nothing."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{str(path)!r} exists already; remove it, or write the token cache to another path.")


def write_header(folder: Path, header: Header) -> None:
    """Makes a cache of the folder that has its shards."""
    ends = tuple(_digest_of_ends(folder / name) for name in shard_names(header.shards))
    plain = to_plain(dataclasses.replace(header, ends=ends))
    write_whole(folder / HEADER, (json.dumps(plain | {"digest": _digest(plain)}, indent=1) + "\n").encode())


def _digest(plain: dict[str, Any]) -> str:
    """SHA-256 of a header, however it is laid out in its file."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _digest_of_ends(shard: Path) -> str:
    """SHA-256 of a shard's size and of its first and last 64 KiB, which hold its first records and its index."""
    with open_regular(shard, "Token file") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(f"{size} ".encode())
        for start in (0, max(0, size - _ENDS)):
            file.seek(start)
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


class TokenSource:
    """The examples of a token cache, in the order they were written.

    Args:
      path: the cache's directory.

    Attributes:
      ladder, and codebook_size, crops, class_names, tokenizer, source, dtype: as in its `Header`.

    Raises:
      InputError: there is no cache, or it is damaged, not the files that were written, or of another version.
      TransientError: the disk refuses.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = local_path(path, "data.path")
        self.path = str(path)
        header = self._header = _read_header(path)
        self.ladder = ScaleLadder(header.sides)
        self.codebook_size, self.crops = header.codebook_size, header.crops
        self.class_names, self.tokenizer, self.source = header.class_names, header.tokenizer, header.source
        self.dtype = header.dtype
        self._classes = len(header.class_names) or 2**31
        with self._whole():
            self._records = ArrayRecordDataSource(_shards_there(path, header))
            if len(self._records) != header.count:
                raise ValueError(f"{len(self._records)} of {header.count} images")
            self[0]  # so that what all records lack is known before anything is built for them

    def with_classes(self, classes: int) -> TokenSource:
        """The same cache for a model of so many classes, which its labels must be below."""
        bounded = copy.copy(self)
        bounded._classes = min(classes, self._classes)
        with bounded._whole():
            bounded[0]
        return bounded

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`: "tokens" (crops,L) uint16 below codebook_size; "label" int32 below the number of classes.

        Raises:
          InputError: it cannot be read, or is no such example.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._whole():
            try:
                label, tokens = parse_record(self._records[index], self._header, self._classes)
            except ValueError as error:
                raise ValueError(f"image {index}: {reason(error)}") from error
        return {"tokens": tokens.astype(np.uint16), "label": label}

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # array_record raises the latter two
            check_refusal(f"Token cache {self.path!r}", error)
            raise InputError(
                f"Token cache {self.path!r} is damaged ({reason(error)}); remove it and write it again."
            ) from error


def records_of(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], length: int, codebook_size: int, crops: int, classes: int
) -> Iterator[bytes]:
    """The records of batches as `write_token_cache` takes them. Raises InputError where one does not fit the rest."""
    for tokens, labels in batches:
        tokens, labels = np.asarray(tokens), np.asarray(labels)
        if tokens.shape != (crops, labels.size, length) or labels.ndim != 1:
            raise InputError(
                f"A batch has tokens {tokens.shape} and labels {labels.shape}; expected ({crops},B,{length}) and (B,)."
            )
        for name, values, end in (("tokens", tokens, codebook_size), ("labels", labels, classes)):
            if values.size and not (values.dtype.kind in "iu" and 0 <= values.min() <= values.max() < end):
                raise InputError(
                    f"A batch has {values.dtype} {name} from {values.min()} to {values.max()}; expected integers from "
                    f"0 to {end - 1}."
                )
        for image, label in zip(tokens.astype("<u2").swapaxes(0, 1), labels.astype("<i4"), strict=True):
            yield label.tobytes() + image.tobytes()


def _new_partial(path: Path) -> Path:
    """Where this process writes a cache; what one that was killed left there, on this machine, is removed."""
    start = f".{path.name}.partial-{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        process = left.name.removeprefix(start)
        if process.isdigit() and (int(process) == os.getpid() or not is_running(int(process))):
            remove(left)
    return path.with_name(f"{start}{os.getpid()}")


def write_shard(shard: Path, records: Iterable[bytes], path: Path) -> int:
    """Writes one file of the cache `path`, not yet whole when it fails; returns how many records there were."""
    with writing(path):
        writer = ArrayRecordWriter(str(shard), "group_size:1")  # each record by itself: they are read in random order
    count = 0
    try:
        for record in records:
            with writing(path):
                writer.write(record)
            count += 1
    finally:
        with writing(path):
            writer.close()
    return count


def parse_record(record: bytes, header: Header, classes: int) -> tuple[np.int32, np.ndarray]:
    """The label and the codes (crops,L) of a record. Raises ValueError where it is none of a cache of this header."""
    if len(record) != header.record_bytes:
        raise ValueError(f"its record has {len(record)} bytes, expected {header.record_bytes}")
    label = np.frombuffer(record, "<i4", 1)[0].astype(np.int32)
    if not 0 <= label < classes:
        raise ValueError(f"its label is {label}, expected 0 to {classes - 1}")
    tokens = np.frombuffer(record, "<u2", offset=4).reshape(header.crops, -1)
    if header.codebook_size < MOST_CODES and (most := tokens.max()) >= header.codebook_size:
        raise ValueError(f"it has the code {most}, expected 0 to {header.codebook_size - 1}")
    return label, tokens


def is_whole(shard: Path, count: int, header: Header) -> bool:
    """Whether a shard has that many records of a cache of this header, all of which can be read, checksums and all."""
    check_regular(shard, "Token file")
    try:
        records = ArrayRecordDataSource([shard])
        if len(records) != count:
            return False
        for record in records.__getitems__(range(count)):
            parse_record(record, header, len(header.class_names))
        return True
    except (OSError, RuntimeError, ValueError) as error:  # array_record raises the latter two
        check_refusal(str(shard), error)
        return False


def shard_names(shards: int) -> list[str]:
    """The names of a cache's files, in order."""
    return [f"tokens-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]


def _shards_there(path: Path, header: Header) -> list[Path]:
    """The files of a cache. Raises ValueError where they are not those that it was written with."""
    end = f"-of-{header.shards:05d}.array_record"
    there = sum(name.startswith("tokens-") and name.endswith(end) for name in os.listdir(path))
    if there < header.shards:  # known before as many names are made as a damaged header asks for
        raise ValueError(f"{there} of {header.shards} files are there")
    shards = [path / name for name in shard_names(header.shards)]
    for shard, digest in itertools.zip_longest(shards, header.ends):
        try:
            if digest is None:
                check_regular(shard, "Token file")
            elif _digest_of_ends(shard) != digest:
                raise ValueError(f"{shard.name} is not the file that was written")
        except FileNotFoundError:
            raise ValueError(f"{shard.name} is missing") from None
    return shards


def _read_header(path: Path) -> Header:
    file, again = path / HEADER, "write the token cache again"
    try:
        values = json_files.read(file, "Token cache header", again)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{str(path)!r} is no token cache: it has no cache.json; set data.path to one, or write it with "
            "`hmar-jax export tokens`."
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"Token cache header {file} is {shown(values)}; expected an object, so {again}.")
    if values.get("format") != FORMAT:
        raise InputError(f"Token cache {str(path)!r} has format {shown(values.get('format'))}, not {FORMAT}; {again}.")
    digest = values.pop("digest", None)  # None in caches from before it was recorded
    with saying(f"Token cache header {file}"):
        header = from_plain(Header, values)
    if digest is not None and digest != (actual := _digest(values)):
        _tell_of_change(file, actual)
    return header


@functools.cache  # once for each file and content: a training opens its cache several times
def _tell_of_change(file: Path, actual: str) -> None:
    logger.warning(
        "Token cache header %s is not as it was written, since its digest is of other fields. If you have changed it, "
        "delete the line with its digest; if not, write the token cache again.",
        printable(str(file), 400),
    )
