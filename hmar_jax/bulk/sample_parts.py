"""Files of bulk samples, read again: what is damaged, or is not what the settings ask for, counts as not there.

Every byte is under a checksum: of the zip archive that a part is, of a PNG's chunks, of array_record. Sizes are
compared with what the settings make them before anything is unpacked.

Axis letters: N samples of a part, S pixels a side, L tokens.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from hmar_jax.config import ModelConfig
from hmar_jax.data import metadata
from hmar_jax.files import check_refusal, reading

_MOST_BYTES = 2**30  # of a part: a hundred thousand samples of a large ladder
_PNG_MORE = 2**10  # bytes of a PNG beside its pixels, and an eighth of these for what does not compress


class Labelled(NamedTuple):
    """Labels and indices (N,) int32 of a part, whose tokens are whole; none where it is damaged."""

    labels: np.ndarray
    indices: np.ndarray


NONE = Labelled(np.zeros(0, np.int32), np.zeros(0, np.int32))


def read_part(file: Path, config: ModelConfig) -> Labelled:
    """A part's labels and indices; `NONE` where the file is damaged, is no regular file, or is gone.

    Raises:
      InputError: it is a folder, or may not be read. TransientError: the disk refuses.
    """
    try:
        content = _content(file, _MOST_BYTES)
        part = _labelled(content, config)
    except Exception as error:  # zip and NumPy raise nearly anything for broken bytes
        check_refusal(str(file), error)
        return NONE
    numbers = part.indices * config.num_classes + part.labels
    return part if file.stem == f"{numbers[0]:010}" else NONE


def is_whole_png(file: Path, side: int) -> bool:
    """Whether a file is a PNG of S×S pixels of 8-bit RGB, with every checksum right and nothing after its end."""
    with reading(file):
        try:
            return _is_png(_content(file, _most_png(side)), side)
        except (FileNotFoundError, ValueError):
            return False


def holds_pngs(file: Path, count: int, side: int) -> bool:
    """Whether an array_record file has so many records, each a whole PNG of S×S pixels."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return False
        reader = ArrayRecordReader(str(file))
        try:
            return reader.num_records() == count and all(_is_png(reader.read(), side) for _ in range(count))
        finally:
            reader.close()
    except Exception as error:  # array_record has no exceptions of its own
        check_refusal(str(file), error)
        return False


def _content(file: Path, most: int) -> bytes:
    """All of a file; ValueError where it is no regular file or larger than `most` bytes."""
    status = os.stat(file)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_size > most:
        raise ValueError("no file of ours")
    return file.read_bytes()


def _labelled(content: bytes, config: ModelConfig) -> Labelled:
    """Reads all arrays of a part. Raises ValueError, or what zip raises, where anything is not as it was written."""
    if not content.startswith(b"PK\3\4"):  # by which NumPy knows such files; zip itself allows anything before
        raise ValueError("no zip archive")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(archive.infolist()) != 3 or members.keys() != {"labels.npy", "indices.npy", "tokens.npy"}:
            raise ValueError("other arrays")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("compressed arrays, which may unpack to any size")
        labels, indices, tokens = (_array(archive.read(f"{name}.npy")) for name in ("labels", "indices", "tokens"))
    number = len(labels)
    shapes = [(number,), (number,), (number, config.ladder.length)]
    if [array.shape for array in (labels, indices, tokens)] != shapes or not number:
        raise ValueError("other shapes")
    if [array.dtype for array in (labels, indices, tokens)] != [np.int32, np.int32, np.uint16]:
        raise ValueError("other dtypes")
    codes = config.tokenizer.codebook_size
    ranges = (labels, config.num_classes), (indices, 2**31 // config.num_classes), (tokens, codes)
    if any(int(array.min()) < 0 or int(array.max()) >= most for array, most in ranges):
        raise ValueError("numbers out of range")
    if len(np.unique(indices * np.int64(config.num_classes) + labels)) != number:
        raise ValueError("a sample twice")
    return Labelled(labels, indices)


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file of exactly its length. NumPy itself would take memory for any shape that it claims."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if by_columns or dtype.hasobject or len(content) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError("another size")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)


def _most_png(side: int) -> int:
    unpacked = side * (1 + 3 * side)
    return _PNG_MORE + unpacked + unpacked // 8


def _is_png(content: bytes, side: int) -> bool:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    stream, end, packed = io.BytesIO(content), 8, []
    chunks = metadata.png_chunks(stream)
    kinds = [kind for kind, _, _ in chunks]
    if not content.startswith(metadata.PNG_START) or kinds[:1] != [b"IHDR"] or kinds[-1:] != [b"IEND"]:
        return False
    for kind, start, length in chunks:
        end = start + length + 4
        if zlib.crc32(content[start - 4 : end - 4]).to_bytes(4) != content[end - 4 : end]:
            return False
        if kind == b"IHDR" and content[start : end - 4] != header:
            return False
        packed += [content[start : end - 4]] * (kind == b"IDAT")
    unpack = zlib.decompressobj()
    try:
        pixels = unpack.decompress(b"".join(packed), side * (1 + 3 * side) + 1)
    except zlib.error:
        return False
    return end == len(content) and unpack.eof and len(pixels) == side * (1 + 3 * side)
