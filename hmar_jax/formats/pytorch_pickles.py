"""the pickle of a PyTorch file → its tensors, as views of storages whose bytes lie elsewhere in the file.

Nothing that the pickle names is imported: what makes a tensor in PyTorch has a stand-in here that returns a `View`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from hmar_jax.errors import InputError, shown
from hmar_jax.formats import pickles

# Dictionaries in a file may be shared, so that few bytes name any number of entries.
_DEEPEST, _MOST_ENTRIES, _LONGEST_NAME, _MOST_LETTERS = 50, 200_000, 1_000, 2**24
_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "Untyped": "uint8",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8",
    "QInt32": "qint32",
}  # fmt: skip
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16", "int64", "int32", "int16", "int8")} | {
    "uint8": np.dtype(np.uint8), "bool": np.dtype(bool), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_OTHER_SIZES = {"complex64": 8, "complex128": 16, "qint32": 4}  # bytes of an element; others have 1
_NAMED = re.compile(  # storages, dtypes, layouts and the like, of which a pickle needs the names alone
    r"torch\.(storage\.)?(\w+Storage)|torch\.(Tensor|nn\.parameter\.(Parameter|Buffer)|device|strided|sparse_\w+|per_\w+)"
    r"|torch\.(bfloat16|bool|half|float|double|short|int|long|(u?int|float|complex|quint|qint)\d\w*)"
)


class _Storage(NamedTuple):
    """What a persistent id names: the storage's key, its dtype and the elements that a view of it begins after."""

    key: str
    dtype: str
    start: int


class View(NamedTuple):
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


class Unreadable(NamedTuple):
    """A tensor that is more than a view of a storage; `dtype` says what."""

    dtype: str
    shape: tuple[int, ...] = ()


class Storages:
    """The storages that a pickle names, each with its size in bytes.

    A persistent id is ("storage", class, key, device, number of elements), and in old files a sixth, None or the
    (key, first element, number of elements) of a storage within that one.
    """

    def __init__(self) -> None:
        self.itemsizes: dict[str, int] = {}  # the first is what an old file counts in
        self._sizes: dict[str, int] = {}

    def persistent(self, value: Any) -> _Storage:
        if not isinstance(value, tuple) or not 5 <= len(value) <= 6 or not isinstance(value[1], pickles.Global):
            raise ValueError("a storage of another form")
        kind, named, key, _, count, *view = value
        if kind != "storage" or not isinstance(key, str):
            raise ValueError("a storage of another form")
        name = named.name.rpartition(".")[2].removesuffix("Storage")
        dtype = _STORAGES.get(name, name)
        size = pickles.numbers((count,))[0] * itemsize(dtype)
        self.itemsizes.setdefault(key, itemsize(dtype))
        if self._sizes.setdefault(key, size) != size:
            raise ValueError(f"storage {shown(key)} has two lengths")
        return _Storage(key, dtype, pickles.numbers(view[0][1:2])[0] if view and view[0] else 0)

    def check(self, found: Mapping[str, int]) -> None:
        """Raises ValueError unless these are the storages' sizes in the file, where others may be too."""
        for key, size in self._sizes.items():
            if found.get(key) != size:
                raise ValueError(f"storage {shown(key)} should have {size} bytes and has {found.get(key, 'none')}")


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> View | Unreadable:
    """`_rebuild_tensor_v2`; `rest` is whether it needs gradients, its hooks, and what is done to it when it is read."""
    (start,), shape, strides = pickles.numbers((start,)), pickles.numbers(shape), pickles.numbers(strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor of another form")
    if len(rest) > 2 and rest[2]:
        return Unreadable("negated or conjugated", shape)
    return View(storage.key, storage.dtype, storage.start + start, shape, strides)


def _tensor_of_dtype(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    """`_rebuild_tensor_v3`, whose storage has no dtype; `start` counts elements all the same."""
    gradients, hooks, dtype, *metadata = rest
    storage = storage._replace(dtype=dtype.name.removeprefix("torch."))
    return _tensor(storage, start, shape, strides, gradients, hooks, *metadata)


def _subclass(make: Any, _: Any, args: Any, *__: Any) -> Any:
    """`_rebuild_from_type_v2`: a tensor of a subclass or with attributes, made by the function `make`."""
    if make.name == "torch._tensor._rebuild_from_type_v2" or not isinstance(args, tuple):
        raise ValueError("a tensor of another form")
    return make.stand_in(*args)


_MAKERS: Mapping[str, Callable[..., Any]] = {
    **pickles.PLAIN,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_sparse_tensor": lambda *_: Unreadable("sparse"),
    "torch._utils._rebuild_qtensor": lambda *_: Unreadable("quantised"),
    "torch._utils._rebuild_nested_tensor": lambda *_: Unreadable("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: Unreadable("meta, without values"),
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.serialization._get_layout": lambda *_: None,
    "torch.Size": lambda size=(): pickles.numbers(size),
}


def _find(name: str) -> Callable[..., Any] | None:
    return _MAKERS.get(name) or ((lambda *_: None) if _NAMED.fullmatch(name) else None)


def collect(content: Any, where: str) -> dict[str, Any]:
    """The tensors of a file by their path in its dictionaries, with dots."""
    found: dict[str, Any] = {}
    visited = letters = 0

    def visit(value: Any, path: str, depth: int) -> None:
        nonlocal visited, letters
        visited, letters = visited + 1, letters + len(path)
        if depth > _DEEPEST or visited > _MOST_ENTRIES or letters > _MOST_LETTERS or len(path) > _LONGEST_NAME:
            raise InputError(
                f"{where} holds a dictionary that holds itself, or far too many; save its state dict alone."
            )
        if isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(name, str | int):
                    visit(inner, f"{path}.{name}" if path else str(name), depth + 1)
        elif isinstance(value, View | Unreadable | pickles.Array):
            if path in found:
                raise InputError(f"{where} has two entries named {path:.100}; save a state dict with one of them.")
            found[path] = value

    visit(content, "", 0)
    return found


def load(stream: BinaryIO, where: str, storages: Storages | None = None) -> Any:
    """The content of a pickle, as `pickles.load` has it; the storages that it names are added to `storages`."""
    if storages is None:
        return pickles.load(stream, _find, where)
    return pickles.load(stream, _find, where, storages.persistent)


def itemsize(dtype: str) -> int:
    """Bytes of an element; what is neither read nor listed takes one."""
    return DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES.get(dtype, 1)
