"""PyTorch files ⇄ tensors, as `tensors.py` reads and writes .safetensors files, without PyTorch.

Both formats keep a pickle, which names tensors as views of storages, apart from the storages' bytes. Since PyTorch 1.6
a file is a zip archive: `X/data.pkl`, and `X/data/N` for storage N. Before, it was five pickles (magic number, version,
system, content, order of the storages) and then, storage by storage, 8 bytes with its number of elements and its bytes.
Pickles are read by `pickles.load`, which runs no code; bytes are read when a tensor is asked for.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import tqdm

from hmar_jax import pickles
from hmar_jax.errors import InputError, reason
from hmar_jax.files import check_readable
from hmar_jax.tensors import Tensor, cast

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of an old file
_LONGEST_PICKLE = 2**28
_CHUNK = 2**22
_DEEPEST, _MOST_ENTRIES, _LONGEST_NAME = 50, 1_000_000, 1_000

_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "Untyped": "uint8",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8",
    "QInt32": "qint32",
}  # fmt: skip
_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16", "int64", "int32", "int16", "int8")} | {
    "uint8": np.dtype(np.uint8), "bool": np.dtype(bool), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_NAMED = re.compile(  # storages, dtypes, layouts and the like, of which a pickle needs the names alone
    r"torch\.(storage\.)?(\w+Storage)|torch\.(Tensor|nn\.parameter\.(Parameter|Buffer)|device|strided|sparse_\w+|per_\w+)"
    r"|torch\.(bfloat16|bool|half|float|double|short|int|long|(u?int|float|complex|quint|qint)\d\w*)"
)


# ------------------------------------------------------------------------------------------- what a pickle holds


class _Storage(NamedTuple):
    """What a persistent id names: the storage's key, its dtype and the elements that a view of it begins after."""

    key: str
    dtype: str
    start: int


class _View(NamedTuple):
    """A tensor: a view of a storage. `start` and `strides` count elements."""

    key: str
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """The elements from the first to the last one."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


class _Unreadable(NamedTuple):
    """A tensor that is more than a view of a storage; `dtype` says what."""

    dtype: str
    shape: tuple[int, ...] = ()


def _persistent(value: Any) -> _Storage:
    kind, storage, key, _, _, *view = value
    if kind != "storage" or not isinstance(key, str):
        raise ValueError
    name = storage.name.rpartition(".")[2].removesuffix("Storage")
    return _Storage(key, _STORAGES.get(name, name), view[0][1] if view and view[0] else 0)


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
    shape, strides = tuple(shape), tuple(strides)
    numbers = (start, storage.start, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError
    return _View(storage.key, storage.dtype, storage.start + start, shape, strides)


def _tensor_of_dtype(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """`_rebuild_tensor_v3`, whose storage has no dtype; `start` counts elements all the same."""
    return _tensor(storage._replace(dtype=rest[2].name.removeprefix("torch.")), start, shape, strides)


_MAKERS: Mapping[str, Callable[..., Any]] = {
    **pickles.PLAIN,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_sparse_tensor": lambda *_: _Unreadable("sparse"),
    "torch._utils._rebuild_qtensor": lambda *_: _Unreadable("quantised"),
    "torch._utils._rebuild_nested_tensor": lambda *_: _Unreadable("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: _Unreadable("meta, without values"),
    "torch._tensor._rebuild_from_type_v2": lambda make, _, args, *__: make.stand_in(*args),
    "torch.serialization._get_layout": lambda *_: None,
    "torch.Size": lambda size=(): tuple(size),
}


def _find(name: str) -> Callable[..., Any] | None:
    return _MAKERS.get(name) or ((lambda *_: None) if _NAMED.fullmatch(name) else None)


def _collect(content: Any, where: str) -> dict[str, Any]:
    """The tensors of a file by their path in its dictionaries, with dots."""
    found: dict[str, Any] = {}
    visited = 0

    def visit(value: Any, path: str, depth: int) -> None:
        nonlocal visited
        visited += 1
        if depth > _DEEPEST or visited > _MOST_ENTRIES or len(path) > _LONGEST_NAME:
            raise InputError(
                f"{where} holds a dictionary that holds itself, or far too many; save its state dict alone."
            )
        if isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(name, str | int):
                    visit(inner, f"{path}.{name}" if path else str(name), depth + 1)
        elif isinstance(value, _View | _Unreadable | pickles.Array):
            if path in found:
                raise InputError(f"{where} has two entries named {path}; save a state dict with one of them.")
            found[path] = value

    visit(content, "", 0)
    return found


# ------------------------------------------------------------------------------------------- where bytes lie


class _Archive(Protocol):
    """The storages of a file. `content` is its pickle, read; `sizes` has the bytes of each storage."""

    content: Any
    sizes: dict[str, int]

    def read(self, key: str, start: int, count: int) -> np.ndarray:
        """`count` bytes of a storage, as uint8."""
        ...


class _Zip:
    """The storages of a zip archive. Checksums are compared whenever a record is read."""

    def __init__(self, path: Path, where: str):
        self._zip, self._where = zipfile.ZipFile(path), where
        infos = self._zip.infolist()
        pickled = [info for info in infos if info.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickled) != 1 or pickled[0].file_size > _LONGEST_PICKLE:
            raise InputError(f"{where} is a zip archive, but has no data.pkl as PyTorch writes it; give a state dict.")
        if not any(info.CRC for info in infos):  # PyTorch writes 0 where it is told to compute none
            for info in infos:
                info.CRC = None  # type: ignore[assignment]
        folder = pickled[0].filename.removesuffix("data.pkl")
        if self._bytes_of(f"{folder}byteorder", b"little") != b"little":
            raise InputError(f"{where} was written by a machine of another byte order; save it again on this one.")
        self._infos = {
            info.filename.removeprefix(f"{folder}data/"): info
            for info in infos
            if info.filename.startswith(f"{folder}data/")
        }
        self.sizes = {key: info.file_size for key, info in self._infos.items()}
        self.content = pickles.load(io.BytesIO(self._bytes_of(pickled[0].filename)), _find, where, _persistent)
        self._checked: set[str] = set()
        self._kept: tuple[str, np.ndarray] | None = None  # the last record that had to be unpacked for a part of it

    def _bytes_of(self, name: str, default: bytes = b"") -> bytes:
        if name not in self._zip.NameToInfo:
            return default
        with self._zip.open(name) as record:
            return record.read(_LONGEST_PICKLE)

    def read(self, key: str, start: int, count: int) -> np.ndarray:
        info = self._infos[key]
        if count == info.file_size:
            return self._record(info, keep=True)
        if info.compress_type == zipfile.ZIP_STORED:
            if key not in self._checked:
                self._record(info, keep=False)
                self._checked.add(key)
            with self._zip.open(info) as record:
                record.seek(start)
                return np.frombuffer(record.read(count), np.uint8)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = key, self._record(info, keep=True)
        return self._kept[1][start : start + count]

    def _record(self, info: zipfile.ZipInfo, *, keep: bool) -> np.ndarray:
        """All bytes of a record, or none where it is only to be compared with its checksum."""
        # Deflate makes nothing smaller than a thousandth, so that what is claimed beyond that is not there.
        if info.file_size > 1100 * info.compress_size:
            raise zipfile.BadZipFile(f"{info.filename} is not as long as it says")
        whole, at = np.empty(info.file_size if keep else 0, np.uint8), 0
        with self._zip.open(info) as record:
            while part := record.read(_CHUNK):
                if keep:
                    whole[at : at + len(part)] = np.frombuffer(part, np.uint8)
                at += len(part)
        if at != info.file_size:
            raise zipfile.BadZipFile(f"{info.filename} is cut")
        return whole


class _Old:
    """The storages of a file from before PyTorch 1.6, which has no checksums."""

    def __init__(self, path: Path, where: str):
        self._path = path
        with path.open("rb") as file:
            magic = pickles.load(file, _find, where)
            if magic != _MAGIC:
                raise InputError(
                    f"{where} is no whole PyTorch file; give what torch.save wrote, or a .safetensors file."
                )
            for _ in range(2):  # version and system
                pickles.load(file, _find, where)
            dtypes: dict[str, str] = {}

            def persistent(value: Any) -> _Storage:
                storage = _persistent(value)
                dtypes[storage.key] = storage.dtype
                return storage

            self.content = pickles.load(file, _find, where, persistent)
            keys = pickles.load(file, _find, where)
            self._starts, self.sizes = {}, {}
            size = path.stat().st_size
            for key in keys:
                count = int.from_bytes(file.read(8), "little") * _itemsize(dtypes[key])
                self._starts[key], self.sizes[key] = file.tell(), count
                if file.tell() + count > size:
                    raise InputError(f"{where} is cut: it ends within its weights; copy or save it again.")
                file.seek(count, io.SEEK_CUR)

    def read(self, key: str, start: int, count: int) -> np.ndarray:
        return np.fromfile(self._path, np.uint8, count, offset=self._starts[key] + start)


def _itemsize(dtype: str) -> int:
    """Bytes of an element; what is neither read nor listed takes one."""
    return (
        _DTYPES[dtype].itemsize if dtype in _DTYPES else {"complex64": 8, "complex128": 16, "qint32": 4}.get(dtype, 1)
    )


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
        check_readable(source, "File")
        if not source.exists():
            raise InputError(f"{source} does not exist; give a .safetensors or .pth file.")
        if not source.is_file():
            raise InputError(f"{source} is no whole PyTorch file (it is a folder or a device); give a regular file.")
        with self._damage():
            make = _Zip if zipfile.is_zipfile(source) else _Old
            self._archive: _Archive = make(source, self._where)
            self._tensors = _collect(self._archive.content, self._where)
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

    def _view(self, tensor: _View) -> np.ndarray:
        dtype = _DTYPES[tensor.dtype]
        start, count = tensor.start * dtype.itemsize, tensor.span * dtype.itemsize
        if start + count > self._archive.sizes[tensor.key]:
            raise ValueError("its storage is shorter than its shape")
        flat = self._archive.read(tensor.key, start, count).view(dtype)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    @contextlib.contextmanager
    def _damage(self, name: str = "") -> Iterator[None]:
        entry = f"{name}: " if name else ""
        try:
            yield
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{self._where} could not be read ({error}); check the path and permissions.") from None
        except (zipfile.BadZipFile, zlib.error, ValueError, LookupError, TypeError, EOFError, RuntimeError) as error:
            raise InputError(
                f"{self._where} is no whole PyTorch file ({entry}{reason(error)}); copy or save it again."
            ) from None


def _dtype_name(tensor: Any) -> str:
    return np.dtype(tensor.dtype).name if isinstance(tensor, pickles.Array) else tensor.dtype


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
        for number, (name, tensor) in enumerate(tqdm.tqdm(tensors.items(), desc=label, disable=None)):
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
