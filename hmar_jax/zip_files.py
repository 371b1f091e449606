"""a zip archive's records → bytes, checked: whatever the archive says twice must agree, and all checksums must hold.

The standard library's `zipfile` believes the directory at the archive's end. It takes records that overlap or have one
name, ignores the sizes and checksums in the headers before the records, and unpacks a thousand times the file's size.
Here such an archive is refused. Records are stored or deflated: PyTorch reads nothing else.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hmar_jax.files import open_regular

SIGNATURE = b"PK\x03\x04"  # of the header before a record, with which an archive begins
_ENTRY_SIGNATURE, _FOOTER_SIGNATURE = b"PK\x01\x02", b"PK\x07\x08"
_HEADER = struct.Struct("<4s 5H 3L 2H")  # …, version, flags, method, time, date, checksum, packed, size, two lengths
_ENTRY = struct.Struct("<4s 6H 3L 5H 2L")  # …, two versions, then as in the header, a third length, …, offset
_END = struct.Struct("<4s 4H 2L H")  # …, disks, two counts, size and offset of the directory, length of a comment
_END64_LOCATOR = struct.Struct("<4s L Q L")  # …, disk, offset of the next one, disks
_END64 = struct.Struct("<4s Q 2H 2L 4Q")  # …, its length, versions, disks, then as in `_END`
_STORED, _DEFLATED = 0, 8
_HAS_FOOTER, _ALLOWED_FLAGS = 8, 2 | 4 | 8 | 2048  # deflate's effort, a footer, names in UTF-8; others encrypt
_LARGEST_DIRECTORY = 2**23  # bytes of some 100,000 records, which are looked at in a second
# Weights hardly get smaller by deflating them; a file made to fill the memory shrinks to a thousandth.
_MOST_UNPACKED, _ALWAYS_UNPACKED = 8, 2**26
_CHUNK = 2**20  # bytes that are unpacked at once


class _Record(NamedTuple):
    """What the directory says of a record, and where at the latest it ends: before the next one."""

    name: bytes
    offset: int
    limit: int
    flags: int
    method: int
    crc: int
    packed: int
    size: int


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
        with open_regular(path, "File") as file:
            self._records = _directory(file)
        self.sizes = {name: record.size for name, record in self._records.items()}
        # PyTorch writes 0 into all of them where it is told to compute none.
        self._has_checksums = any(record.crc for record in self._records.values())
        self._checked: set[str] = set()  # stored records whose checksums have been compared
        self._unpacked: dict[str, np.ndarray] = {}  # deflated records of which parts were read

    def read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """`count` bytes of a record, or all, as uint8; the whole record is compared with its checksum first.

        Raises:
          LookupError: there is no such record. ValueError, struct.error, zlib.error: it is damaged.
        """
        record = self._records[name]
        stop = record.size if count is None else start + count
        if not 0 <= start <= stop <= record.size:
            raise ValueError(f"record {name} ends before byte {stop}")
        if name in self._unpacked:
            return self._unpacked[name][start:stop]
        with open_regular(self._path, "File") as file:
            at = _bytes_of(file, record)
            if record.method == _STORED and stop - start < record.size:
                if name not in self._checked:
                    file.seek(at)
                    self._check(record, name, _chunks(file, record.packed))
                    self._checked.add(name)
                file.seek(at + start)
                return _exactly(file, stop - start)
            file.seek(at)
            if record.method == _STORED:
                whole = _exactly(file, record.size)
            else:
                whole = np.empty(record.size, np.uint8)
                _unpack(file, record.packed, whole)
            self._check(record, name, [whole])
        if stop - start < record.size:
            self._unpacked[name] = whole
        return whole[start:stop]

    def _check(self, record: _Record, name: str, parts: Iterable[bytes | np.ndarray]) -> None:
        crc = 0
        for part in parts if self._has_checksums else ():
            crc = zlib.crc32(part, crc)
        if crc != record.crc:
            raise ValueError(f"the checksum of record {name} is wrong")


def _directory(file: BinaryIO) -> dict[str, _Record]:
    """What the directory says of all records, by name."""
    start, length = _place_of_directory(file)
    file.seek(start)
    data, found, at = file.read(length), [], 0
    while at < length:
        signature, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, offset = _ENTRY.unpack_from(
            data, at
        )
        ends = [at := at + _ENTRY.size, *(at := at + part for part in lengths)]
        if signature != _ENTRY_SIGNATURE or at > length or disk:
            raise ValueError("its directory is damaged")
        raw, extra = (data[begin:end] for begin, end in itertools.pairwise(ends[:3]))
        size, packed, offset = _long(extra, size, packed, offset)
        found.append(_Record(raw, offset, 0, flags, method, crc, packed, size))
    found.sort(key=lambda record: record.offset)
    limits = [*(record.offset for record in found[1:]), start]
    records: dict[str, _Record] = {}
    for record, limit in zip(found, limits, strict=True):
        name = record.name.decode("utf-8", "backslashreplace")
        if name in records:
            raise ValueError(f"it has two records named {name}")
        _check_record(record, name, limit)
        records[name] = record._replace(limit=limit)
    if sum(record.size for record in found) > _MOST_UNPACKED * start + _ALWAYS_UNPACKED:
        raise ValueError(f"unpacked, it has more than {_MOST_UNPACKED} times its size")
    return records


def _place_of_directory(file: BinaryIO) -> tuple[int, int]:
    """Where the directory begins, and its length. It ends where the archive's last structures begin."""
    end = file.seek(0, 2) - _END.size
    signature, disk, first, here, count, length, start, comment = _read(file, end, _END)
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("it does not end as a zip archive does")
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and (found := _read(file, locator, _END64_LOCATOR))[0] == b"PK\x06\x07":
        end = found[2]
        signature, own, _, _, disk, first, here, count, length, start = _read(file, end, _END64)
        if signature != b"PK\x06\x06" or own != _END64.size - 12 or end + _END64.size != locator:
            raise ValueError("it does not end as a zip archive does")
    if disk or first or here != count or start + length != end or count * _ENTRY.size > length:
        raise ValueError("its end disagrees with its directory")
    if length > _LARGEST_DIRECTORY:
        raise ValueError(f"its directory has more than {_LARGEST_DIRECTORY} bytes")
    return start, length


def _check_record(record: _Record, name: str, limit: int) -> None:
    if record.flags & ~_ALLOWED_FLAGS or record.method not in (_STORED, _DEFLATED):
        raise ValueError(f"record {name} is encrypted, or packed as PyTorch packs none")
    if record.offset + _HEADER.size + len(record.name) + record.packed > limit:
        raise ValueError(f"record {name} overlaps the one behind it")
    if record.method == _STORED and record.packed != record.size:
        raise ValueError(f"record {name} is not as long as it says")


def _bytes_of(file: BinaryIO, record: _Record) -> int:
    """Where a record's bytes begin, once its header and its footer have been compared with the directory."""
    signature, _, flags, method, _, _, crc, packed, size, *lengths = _read(file, record.offset, _HEADER)
    name, extra = file.read(lengths[0]), file.read(lengths[1])
    size, packed = _long(extra, size, packed)
    start = record.offset + _HEADER.size + sum(lengths)
    end = start + record.packed
    agree = (signature, flags, method, name) == (SIGNATURE, record.flags, record.method, record.name)
    own, whole = (crc, packed, size), (record.crc, record.packed, record.size)
    if flags & _HAS_FOOTER:  # the header may have zeros, as it was written before the record
        agree &= all(said in (0, right) for said, right in zip(own, whole, strict=True))
        file.seek(end)
        footer = file.read(24)
        footers = [_FOOTER_SIGNATURE + struct.pack(form, *whole) for form in ("<L2Q", "<3L") if _fits(form, whole)]
        matching = next((known for known in footers if footer.startswith(known)), b"")
        agree &= bool(matching)
        end += len(matching)
    else:
        agree &= own == whole
    if not agree or end > record.limit:
        raise ValueError(f"the header of record {record.name.decode('utf-8', 'replace')} disagrees with the directory")
    return start


def _fits(form: str, numbers: tuple[int, ...]) -> bool:
    return "Q" in form or max(numbers) < 2**32


def _long(extra: bytes, *numbers: int) -> tuple[int, ...]:
    """Numbers of a header, from its extra field 1 where they do not fit into 32 bits."""
    if 2**32 - 1 not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            longer = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return tuple(next(longer, -1) if number == 2**32 - 1 else number for number in numbers)
        at += 4 + length
    return numbers


def _unpack(file: BinaryIO, packed: int, whole: np.ndarray) -> None:
    """Fills `whole` from deflated bytes, which must end with it."""
    inflate, at = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for part in _chunks(file, packed):
        rest, data = part, b"more"
        while rest or data:
            data = inflate.decompress(rest, min(_CHUNK, len(whole) - at + 1))  # 0 would be no bound
            if at + len(data) > len(whole) or inflate.unused_data:
                raise ValueError("a record is longer than it says")
            whole[at : at + len(data)] = np.frombuffer(data, np.uint8)
            at, rest = at + len(data), inflate.unconsumed_tail
    if at != len(whole) or not inflate.eof:
        raise ValueError("a record is shorter than it says")


def _chunks(file: BinaryIO, count: int) -> Iterator[bytes]:
    for at in range(0, count, _CHUNK):
        part = file.read(min(_CHUNK, count - at))
        if len(part) != min(_CHUNK, count - at):
            raise ValueError("it is cut")
        yield part


def _exactly(file: BinaryIO, count: int) -> np.ndarray:
    found = np.fromfile(file, np.uint8, count)
    if len(found) != count:
        raise ValueError("it is cut")
    return found


def _read(file: BinaryIO, at: int, structure: struct.Struct) -> tuple:
    if at < 0:
        raise ValueError("it is cut")
    file.seek(at)
    data = file.read(structure.size)
    if len(data) != structure.size:
        raise ValueError("it is cut")
    return structure.unpack(data)
