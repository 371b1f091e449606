"""PyTorch files ⇄ tensors, as `safetensors_files.py` reads and writes .safetensors files, without PyTorch.

Both formats keep a pickle, which names tensors as views of storages, apart from the storages' bytes. Since PyTorch 1.6
a file is a zip archive: `X/data.pkl`, and `X/data/N` for storage N. Before, it was five pickles (magic number, version,
system, content, order of the storages) and then, storage by storage, 8 bytes with its number of elements and its bytes.
`pytorch_pickles.load` reads the pickles without running code; a tensor's bytes are read when it is.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tqdm

from hmar_jax.errors import HmarError, InputError, printable, reason
from hmar_jax.files import open_regular, refused_by_disk
from hmar_jax.formats import pickles, pytorch_pickles, zip_files
from hmar_jax.formats.pytorch_pickles import DTYPES, View
from hmar_jax.formats.safetensors_files import Tensor, cast, check_downloaded

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of an old file
_VERSIONS = [str(number).encode() for number in range(1, 11)]  # of zip archives that PyTorch 2 reads
_LONGEST_PICKLE = 2**28
# Tensors may share a storage, or repeat its numbers by strides of 0. Tied weights are there twice.
_MOST_SHARED, _ALWAYS_SHARED = 4, 2**20

_OTHER_ORDER = "was written by a machine of another byte order; save it again on this one."


# ------------------------------------------------------------------------------------------- where bytes lie


class _Archive(Protocol):
    """The storages of a file. `content` is its pickle, read; `sizes` has the bytes of each storage."""

    content: Any
    sizes: dict[str, int]

    def read(self, key: str, start: int, count: int) -> np.ndarray:
        """`count` bytes of a storage, as uint8."""
        ...


class _Zip:
    """The storages of a zip archive, whose checksums are compared whenever a record is read."""

    def __init__(self, path: Path, where: str):
        self._archive = zip_files.Archive(path)
        sizes = self._archive.sizes
        pickled = [name for name in sizes if name.rpartition("/")[2] == "data.pkl"]
        if len(pickled) != 1 or sizes[pickled[0]] > _LONGEST_PICKLE:
            raise InputError(f"{where} is a zip archive, but has no data.pkl as PyTorch writes it; give a state dict.")
        folder = pickled[0].removesuffix("data.pkl")
        if self._start_of(f"{folder}byteorder", b"little") != b"little":
            raise InputError(f"{where} {_OTHER_ORDER}")
        if self._start_of(f"{folder}version", b"3").strip() not in _VERSIONS:
            raise InputError(f"{where} is of a version that is not known here; save it again with PyTorch 2.")
        records = {name.removeprefix(f"{folder}data/"): name for name in sizes if name.startswith(f"{folder}data/")}
        self._records, self.sizes = records, {key: sizes[name] for key, name in records.items()}
        storages, stream = pytorch_pickles.Storages(), io.BytesIO(self._archive.read(pickled[0]))
        self.content = pytorch_pickles.load(stream, where, storages)
        storages.check(self.sizes)

    def _start_of(self, name: str, default: bytes) -> bytes:
        size = self._archive.sizes.get(name)
        return default if size is None else self._archive.read(name, 0, min(size, 20)).tobytes()

    def read(self, key: str, start: int, count: int) -> np.ndarray:
        return self._archive.read(self._records[key], start, count)


class _Old:
    """The storages of a file from before PyTorch 1.6.

    It has no checksums. What it says twice must agree: the storages that the tensors name are those that follow, each
    as long as both say, and the last one ends where the file ends. Another number in a storage, or another name or
    shape in the pickle, cannot be found.
    """

    def __init__(self, path: Path, where: str):
        self._path = path
        with open_regular(path, "File") as file:
            if pytorch_pickles.load(file, where) != _MAGIC:
                raise InputError(
                    f"{where} is no whole PyTorch file; give what torch.save wrote, or a .safetensors file."
                )
            version, system = pytorch_pickles.load(file, where), pytorch_pickles.load(file, where)
            if version != _PROTOCOL or not isinstance(system, dict):
                raise ValueError("its version is not known")
            if system.get("little_endian", True) is not True:
                raise InputError(f"{where} {_OTHER_ORDER}")
            storages = pytorch_pickles.Storages()
            self.content = pytorch_pickles.load(file, where, storages)
            keys = pytorch_pickles.load(file, where)
            if not isinstance(keys, list) or len(set(keys)) != len(keys) or set(keys) != storages.itemsizes.keys():
                raise ValueError("its storages are not those of its tensors")
            self._starts, self.sizes = {}, {}
            size = os.fstat(file.fileno()).st_size
            for key in keys:
                length = file.read(8)
                count = int.from_bytes(length, "little") * storages.itemsizes[key]
                self._starts[key], self.sizes[key] = file.tell(), count
                if len(length) < 8 or file.tell() + count > size:
                    raise InputError(f"{where} is cut: it ends within its weights; copy or save it again.")
                file.seek(count, io.SEEK_CUR)
            storages.check(self.sizes)
            if file.tell() != size:
                raise ValueError("it goes on behind its last storage")

    def read(self, key: str, start: int, count: int) -> np.ndarray:
        with open_regular(self._path, "File") as file:
            return np.fromfile(file, np.uint8, count, offset=self._starts[key] + start)


class File:
    """The tensors of a PyTorch file, read one by one; NumPy arrays in it count as tensors.

    Attributes:
      shapes, dtypes: of all tensors, by their path in the file, with dots. A dtype is PyTorch's name for it, or says
        what the tensor is: `quantised`, `sparse`.

    Raises:
      InputError: the file is not there, damaged, or holds Python objects beside tensors and plain data.
    """

    def __init__(self, source: Path):
        self._where = str(source)
        try:
            with open_regular(source, "File") as file:
                begins = file.read(64)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{source} does not exist; give a .safetensors or .pth file.") from None
        check_downloaded(source, begins)
        with self._damage():
            make = _Zip if begins.startswith(zip_files.SIGNATURE) else _Old
            self._archive: _Archive = make(source, self._where)
            self._tensors = pytorch_pickles.collect(self._archive.content, self._where)
            self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
            self.dtypes = {name: _dtype_name(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor of floats, in its own dtype.

        Raises:
          InputError: it is cut or damaged, or a number in it is not finite.
        """
        tensor = self._tensors[name]
        with self._damage(name):
            array = tensor.read() if isinstance(tensor, pickles.Array) else self._view(tensor)
        return cast(array, array.dtype, f"{name} of {self._where}")

    def check_sharing(self, names: Iterable[str]) -> None:
        """Raises InputError where tensors have together many times the bytes of the file, as they may in any small one.

        For those that are to be read, of dtypes that are.
        """
        total = sum(self._archive.sizes.values())
        views = [tensor for name in names if isinstance(tensor := self._tensors[name], View)]
        taken = sum(max(view.span, math.prod(view.shape)) * pytorch_pickles.itemsize(view.dtype) for view in views)
        if taken > _MOST_SHARED * total + _ALWAYS_SHARED:
            raise InputError(
                f"{self._where} has tensors of {taken} bytes in storages of {total}, which they share or repeat; save "
                "a state dict whose tensors have their own storages."
            )

    def _view(self, tensor: View) -> np.ndarray:
        dtype = DTYPES[tensor.dtype]
        start, count = tensor.start * dtype.itemsize, tensor.span * dtype.itemsize
        if start + count > self._archive.sizes[tensor.key]:
            raise ValueError("its storage is shorter than its shape")
        data = self._archive.read(tensor.key, start, count)
        if data.nbytes != count:
            raise ValueError("its storage is cut")
        flat = data.view(dtype)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    @contextlib.contextmanager
    def _damage(self, name: str = "") -> Iterator[None]:
        entry = f"{name}: " if name else ""
        try:
            yield
        except HmarError:
            raise
        except OSError as error:
            raise refused_by_disk(f"{self._where} could not be read", error) from None
        except (struct.error, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self._where} is no whole PyTorch file ({entry}{reason(error)}); copy or save it again."
            ) from None


def _dtype_name(tensor: Any) -> str:
    return tensor.dtype_name if isinstance(tensor, pickles.Array) else tensor.dtype


# ------------------------------------------------------------------------------------------- writing


def write(path: Path, tensors: Mapping[str, Tensor], label: str) -> None:
    """Writes a state dict of float32 tensors, of one part each, as PyTorch's zip archive; memory holds one tensor.

    Args:
      label: what the progress bar calls the work.

    Raises:
      OSError: the disk refused. InputError: a number is not finite.
    """
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(_record("data.pkl"), _state_dict({name: tensor.shape for name, tensor in tensors.items()}))
        archive.writestr(_record("byteorder"), b"little")
        for number, (name, tensor) in enumerate(tqdm.tqdm(tensors.items(), desc=printable(label, 80), disable=None)):
            (part,) = tensor.parts()
            record = _record(f"data/{number}")
            record.file_size = tensor.nbytes
            with archive.open(record, "w") as file:
                file.write(np.ascontiguousarray(cast(part, np.float32, name)).reshape(-1).view(np.uint8).data)
        archive.writestr(_record("version"), b"3\n")


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(
        f"archive/{name}"
    )  # of a date that is always the same, so that equal models give equal files


def _state_dict(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The pickle of a dictionary of contiguous float32 tensors, tensor N in storage N.

    Written operation by operation, because `pickle` writes only the names of what it can import.
    """

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without the protocol before it and the stop after it

    pickled = b"\x80\x02}("
    for number, (name, shape) in enumerate(shapes.items()):
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(str(number)) + plain("cpu")
        storage += plain(math.prod(shape)) + b"tQ"
        hooks = b"\x89ccollections\nOrderedDict\n)R"
        arguments = b"(" + storage + plain(0) + plain(shape) + plain(strides) + hooks + b"t"
        pickled += plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return pickled + b"u."
