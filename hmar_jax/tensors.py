"""named arrays ⇄ a .safetensors file, one array at a time: memory holds the largest one, whatever the file's size.

The library's own writer wants all arrays at once; what it reads is what is written here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import tqdm

from hmar_jax.errors import InputError
from hmar_jax.files import check_readable

_NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}


class Tensor(NamedTuple):
    """An array that is not there yet.

    Attributes:
      shape, dtype: of the whole; float32 or bfloat16.
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
      OSError: the disk refused.
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
    progress = tqdm.tqdm(total=end, desc=label, unit="B", unit_scale=True, disable=None)
    with path.open("wb") as file, progress as bar:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            whole.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor, own, written = tensors[name], hashlib.sha256(), 0
            for part in tensor.parts():
                data = _bytes(part.astype(tensor.dtype, copy=False))
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


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class File:
    """The arrays of a .safetensors file, read one by one.

    Attributes:
      shapes: of all arrays, by name. integers: names of those that hold no floats.

    Raises:
      InputError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        check_readable(path, "File")
        try:
            with self._open() as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(array.get_shape()) for name, array in found.items()}
                self.integers = {name for name, array in found.items() if "F" not in array.get_dtype()}
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; give a .safetensors file.") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole .safetensors file ({error}); copy or write it again.") from None

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One array, or one layer of it along its first axis."""
        with self._open() as file:
            return file.get_tensor(name) if layer is None else file.get_slice(name)[layer]

    def _open(self) -> Any:
        # Anew each time: what has been read of a lasting map would count as memory in use.
        return safetensors.safe_open(self._path, framework="np")
