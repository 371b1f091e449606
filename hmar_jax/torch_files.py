"""PyTorch files ⇄ tensors, as `tensors.py` reads and writes .safetensors files; only this module wants PyTorch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.files import check_readable
from hmar_jax.tensors import Tensor

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_REMAP_BYTES = 2**28


def write(path: Path, tensors: Mapping[str, Tensor], label: str) -> None:
    """Writes a state dict of tensors of one part each, all of them in memory at once.

    Args:
      label: what errors call the file.

    Raises:
      InputError: PyTorch is not installed. OSError: the disk refused.
    """
    torch = _torch(label)
    arrays = {name: torch.from_numpy(next(iter(tensor.parts()))) for name, tensor in tensors.items()}
    try:
        torch.save(arrays, path)
    except RuntimeError as error:  # what PyTorch makes of a full disk
        raise OSError(str(error).split("\n")[0]) from None


class File:
    """The tensors of a PyTorch file, read one by one.

    Attributes:
      shapes: of all tensors, by their path in the file, with dots. integers: paths of those that hold no floats.

    Raises:
      InputError: PyTorch is not installed, or the file is not there, damaged or more than tensors.
    """

    def __init__(self, source: Path):
        self._source = source
        self._arrays, self._mapped = _load(source)
        self._read = 0
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self.integers = {name for name, array in self._arrays.items() if not array.is_floating_point()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as a float32 array."""
        if self._mapped and self._read > _REMAP_BYTES:  # what has been read of a map counts as memory in use
            self._arrays, self._mapped = _load(self._source)
            self._read = 0
        array = self._arrays[name].detach().float().numpy()
        self._read += array.nbytes
        return array


def _load(source: Path) -> tuple[dict[str, Any], bool]:
    """All tensors of a PyTorch file by their path in it, and whether they are mapped into memory, not read."""
    torch, mapped = _torch(str(source)), True
    check_readable(source, "File")
    try:
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files from before PyTorch 1.6 can't be mapped
            if "mmap" not in str(error):
                raise
            content, mapped = torch.load(source, map_location="cpu", weights_only=True), False
    except FileNotFoundError:
        raise InputError(f"{source} does not exist; give a .safetensors or .pth file.") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{source} is damaged, or holds Python objects beside tensors, which could run any code when loaded; save "
            "its state dict alone, with torch.save or as .safetensors."
        ) from None
    except Exception as error:  # damage makes the unpickler raise anything
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise InputError(f"{source} is no whole PyTorch file ({reason}); copy or save it again.") from None
    found: dict[str, Any] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                collect(inner, f"{path}.{name}" if path else str(name))

    collect(content, "")
    return found, mapped


def _torch(file: str) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{file} is a PyTorch file, which takes PyTorch: `pip install torch`, or use a .safetensors file."
        ) from None
    return torch
