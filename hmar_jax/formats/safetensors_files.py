"""named arrays ⇄ a .safetensors file, one array at a time: memory holds the largest one, whatever the file's size.

The library's own writer wants all arrays at once; what it reads is what is written here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import tqdm

from hmar_jax.errors import InputError, printable, reason
from hmar_jax.files import json_files, open_regular, reading

_NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16"}
# The names in a header → NumPy's; others, such as float8, stay as they are.
_DTYPES = {"BOOL": "bool", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
FLOATS = ("float32", "bfloat16", "float16", "float64")  # what weights may be stored as
MOST_HEADER = 8 + json_files.MOST_BYTES  # which the library would let have 100 MB, whatever the file's arrays
_INSTEAD = {  # the first bytes, in lower case → what a file is, and what to do
    b"version https://git-lfs": "a pointer of Git LFS; run `git lfs pull` there, or download the file itself",
    b"<!doctype": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"\x1f\x8b": "packed by gzip; unpack it with gunzip",
}
_CHUNK = 2**18  # numbers looked at together, so that a check takes no memory


class Tensor(NamedTuple):
    """An array that is not there yet.

    Attributes:
      shape, dtype: of the whole; float32, bfloat16 or float16.
      parts: makes its parts, to be joined along the first axis; cast to `dtype` when written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Digests(NamedTuple):
    """SHA-256 of a file, and of each tensor's bytes in it."""

    file: str
    tensors: dict[str, str]


def write(path: Path, tensors: Mapping[str, Tensor], label: str) -> Digests:
    """Writes a .safetensors file.

    Args:
      label: what the progress bar, quiet where there is no terminal, calls the work.

    Raises:
      OSError: the disk refused. InputError: a number is not finite, or not in the dtype it is stored in.
    """
    # float32 first, so that each array starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole, each = hashlib.sha256(), {}
    progress = tqdm.tqdm(total=end, desc=printable(label, 80), unit="B", unit_scale=True, disable=None)
    with path.open("wb") as file, progress as bar:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            whole.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor, own, written = tensors[name], hashlib.sha256(), 0
            for part in tensor.parts():
                data = _bytes(cast(part, tensor.dtype, name))
                put(data)
                own.update(data)
                bar.update(len(data))
                written += len(data)
            assert written == tensor.nbytes, f"{name} has {written} bytes in its parts, not {tensor.nbytes}"
            each[name] = own.hexdigest()
    return Digests(whole.hexdigest(), each)


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes, as `write` gives it."""
    return hashlib.sha256(_bytes(array)).hexdigest()


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """An array of floats in another dtype, or the same array.

    Args:
      name: what errors call it.

    Raises:
      InputError: a number is NaN or infinite, or becomes so: float64 beyond float32, float32 beyond bfloat16.
    """
    with np.errstate(over="ignore"):
        converted = array.astype(dtype, copy=False)
    if _all_finite(converted):
        return converted
    value = array[np.unravel_index(np.argmin(np.isfinite(converted)), array.shape)]
    if np.isfinite(value):
        raise InputError(f"{name} has the value {value}, which is too large for {converted.dtype}; use a wider dtype.")
    raise InputError(f"{name} has the value {value}; weights must be finite, so train, save or copy the model again.")


def check_floats(dtypes: Mapping[str, str], allowed: Sequence[str], where: str) -> None:
    """Raises InputError, naming the first entry, where one has another dtype than those allowed."""
    for name, dtype in sorted(dtypes.items()):
        if dtype not in allowed:
            expected = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            what = f"{printable(name, 80)} as {printable(dtype, 80)}"
            raise InputError(f"{where} has {what}; expected {expected}, so give weights that are such floats.")


def _all_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    if flat.dtype == ml_dtypes.bfloat16:  # whose own `isfinite` takes five times as long
        bits = flat.view(np.uint16)
        return all(np.all(bits[i : i + _CHUNK] & 0x7F80 != 0x7F80) for i in range(0, flat.size, _CHUNK))
    return all(np.isfinite(flat[i : i + _CHUNK]).all() for i in range(0, flat.size, _CHUNK))


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_downloaded(path: Path, begins: bytes) -> None:
    """Raises InputError where a file of weights, from what it begins with, is what a download often gives instead."""
    for start, what in _INSTEAD.items():
        if begins.lower().startswith(start):
            raise InputError(f"{path} is {what}.")


class File:
    """The arrays of a .safetensors file, read one by one.

    Attributes:
      shapes, dtypes: of all arrays, by name; a dtype as NumPy calls it or, where NumPy has none, as the file does.

    Raises:
      InputError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            header = _header(path)
            with self._open() as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(array.get_shape()) for name, array in found.items()}
                codes = {name: array.get_dtype() for name, array in found.items()}
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} does not exist; give a .safetensors file.") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a whole .safetensors file ({printable(reason(error))}); copy or write it again."
            ) from None
        # The library has checked the header against the file, but takes the last of two entries of one name.
        json_files.parse(header, f"The header of {path}", "copy or write it again")
        self.dtypes = {name: _DTYPES.get(code, code) for name, code in codes.items()}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One array of floats, or one layer of it along its first axis.

        Raises:
          InputError: a number in it is not finite.
        """
        with self._open() as file:
            array = file.get_tensor(name) if layer is None else file.get_slice(name)[layer]
        return cast(array, array.dtype, f"{printable(name, 80)} of {self._path}")

    def _open(self) -> Any:
        # Anew each time: what has been read of a lasting map would count as memory in use.
        return safetensors.safe_open(self._path, framework="np")


def _header(path: Path) -> bytes:
    """The header of a .safetensors file, as far as it is there; InputError where it would be too large."""
    with open_regular(path, "File") as file, reading(path):
        begins = file.read(64)
        if begins[8:9] != b"{":  # where every header starts
            check_downloaded(path, begins)
        length = int.from_bytes(begins[:8], "little")
        if length > MOST_HEADER - 8:
            raise InputError(
                f"{path} is not a whole .safetensors file (its header would have {length} bytes, and {MOST_HEADER - 8} "
                "is the most); copy or write it again."
            )
        file.seek(8)
        return file.read(length)
