"""a zip archive's records → bytes, whose checksums are compared.

The standard library's `zipfile` finds the records, but it accepts archives whose records overlap or share a name, and
unpacks a record to any size; this module refuses such archives. A record is stored or deflated, since PyTorch reads
nothing else. This module also reads the records itself, because a tensor may be a small part of a large one.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hmar_jax.errors import shown
from hmar_jax.files import open_regular

SIGNATURE = b"PK\x03\x04"  # of the header before a record, with which an archive begins
_HEADER = struct.Struct("<4s 22x 2H")  # …, lengths of the name and of an extra field, which follow
_ENCRYPTED = 1 | 32 | 64  # flags
# Bytes of the directory of some 30,000 records. `zipfile` takes ten times the memory for it, at once.
_LARGEST_DIRECTORY = 2**22
# Weights hardly get smaller by deflating them; a file made to fill the memory shrinks to a thousandth.
_MOST_UNPACKED, _ALWAYS_UNPACKED = 8, 2**26
_CHUNK = 2**20  # bytes whose checksum is computed at once


class Archive:
    """The records of a zip archive, read one by one.

    Attributes:
      sizes: the bytes of each record, unpacked, by its name.

    Raises:
      ValueError, struct.error: the archive is damaged, or packed in a way that PyTorch does not read.
      OSError, InputError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self._path = path
        self._records = _records(path)
        self.sizes = {name: record.file_size for name, record in self._records.items()}
        # PyTorch writes 0 into all of them where checksums are switched off.
        self._has_checksums = any(record.CRC for record in self._records.values())
        self._checked: set[str] = set()  # stored records whose checksums have been compared
        self._unpacked: dict[str, np.ndarray] = {}  # deflated records of which parts were read

    def read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """`count` bytes of a record, or all, as uint8; the whole record is compared with its checksum first.

        Raises:
          LookupError: there is no such record. ValueError, struct.error, zlib.error: it is damaged.
        """
        record = self._records[name]
        size = record.file_size
        stop = size if count is None else start + count
        if not 0 <= start <= stop <= size:
            raise ValueError(f"record {shown(name)} ends before byte {stop}")
        if name in self._unpacked:
            return self._unpacked[name][start:stop]
        with open_regular(self._path, "File") as file:
            at = _content_at(file, record)
            if record.compress_type == zipfile.ZIP_STORED and stop - start < size:
                if name not in self._checked:
                    self._check(record, _chunks(file, size))
                    self._checked.add(name)
                file.seek(at + start)
                return _exactly(file, stop - start)
            whole = _exactly(file, record.compress_size)
        if record.compress_type == zipfile.ZIP_DEFLATED:
            whole = _inflated(whole, size)
            if stop - start < size:
                self._unpacked[name] = whole
        self._check(record, [whole])
        return whole[start:stop]

    def _check(self, record: zipfile.ZipInfo, parts: Iterable[np.ndarray]) -> None:
        crc = 0
        for part in parts if self._has_checksums else ():
            crc = zlib.crc32(part, crc)
        if crc != record.CRC:
            raise ValueError(f"the checksum of record {shown(record.orig_filename)} is wrong")


class _Bounded(io.BufferedReader):
    """A file of which no more is read at once than the largest directory has."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_DIRECTORY:
            raise ValueError(f"its directory has more than {_LARGEST_DIRECTORY} bytes")
        return super().read(size)


def _records(path: Path) -> dict[str, zipfile.ZipInfo]:
    """What the directory says of all records, by name, once it is found to be possible."""
    with _Bounded(open_regular(path, "File").detach()) as bounded:
        limit = length = bounded.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(bounded) as archive:
                found = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OverflowError, EOFError) as error:
            raise ValueError(str(error)) from None
    for record in sorted(found, key=lambda record: record.header_offset, reverse=True):
        name, size = record.orig_filename, record.compress_size
        if record.flag_bits & _ENCRYPTED or record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"record {shown(name)} is encrypted, or packed as PyTorch packs none")
        if record.header_offset < 0 or record.header_offset + _HEADER.size + len(name) + size > limit:
            raise ValueError(f"record {shown(name)} overlaps what is behind it")
        if record.compress_type == zipfile.ZIP_STORED and size != record.file_size:
            raise ValueError(f"record {shown(name)} is not as long as it says")
        limit = record.header_offset
    if sum(record.file_size for record in found) > _MOST_UNPACKED * length + _ALWAYS_UNPACKED:
        raise ValueError(f"unpacked, it has more than {_MOST_UNPACKED} times its size")
    records = {record.orig_filename: record for record in found}
    if len(records) < len(found):
        raise ValueError("it has two records of one name")
    return records


def _content_at(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, behind its header; the file is left there."""
    file.seek(record.header_offset)
    signature, *lengths = _HEADER.unpack(file.read(_HEADER.size))
    name = file.read(lengths[0]).decode("utf-8" if record.flag_bits & 0x800 else "cp437")  # as `zipfile` has it
    if signature != SIGNATURE or name != record.orig_filename:
        raise ValueError(f"the header of record {shown(record.orig_filename)} disagrees with the directory")
    return file.seek(lengths[1], io.SEEK_CUR)


def _inflated(packed: np.ndarray, size: int) -> np.ndarray:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    whole = inflate.decompress(packed, size + 1)  # 0 would be no bound
    if len(whole) != size or not inflate.eof or inflate.unused_data:
        raise ValueError("a record is not as long as it says")
    return np.frombuffer(whole, np.uint8)


def _chunks(file: BinaryIO, count: int) -> Iterator[np.ndarray]:
    for at in range(0, count, _CHUNK):
        yield _exactly(file, min(_CHUNK, count - at))


def _exactly(file: BinaryIO, count: int) -> np.ndarray:
    found = np.fromfile(file, np.uint8, count)
    if len(found) != count:
        raise ValueError("it is cut")
    return found
