"""classes × indices → tokens and pictures in a directory, over all devices of all processes; a killed run goes on.

    samples.json                    what decides the pictures: `Settings`
    tokens/NUMBER.npz               a part: labels (N,) int32, indices (N,) int32, tokens (N,L) uint16
    pictures/CLASS/INDEX.png        or
    pictures/NUMBER.array_record    the pictures of that part, in its order, each a PNG

A part is what one process has of one batch, named after its first number. Its tokens are written last: pictures that no
part has are of a run that was killed, and are removed by the next, as is a part that is damaged or lacks pictures.

The number of sample `index` of class `label` is index · num_classes + label. What it looks like depends on that, its
label and the settings alone: not on which others are asked for, the batch or the devices. (In bfloat16 these change the
rounding, so that a near-tie may fall otherwise.)

Axis letters: B batch, N samples of a part, S pixels a side, L tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from PIL import Image

from hmar_jax.arrays import one_ahead
from hmar_jax.bulk import sample_parts
from hmar_jax.config import ModelConfig
from hmar_jax.config.plain import to_plain
from hmar_jax.errors import InputError, printable, shown
from hmar_jax.files import is_there, json_files, local_path, read_bytes, write_whole, writing, written_whole
from hmar_jax.images import to_uint8
from hmar_jax.model import Model
from hmar_jax.parallel import processes
from hmar_jax.progress_bar import progress
from hmar_jax.sampling import program
from hmar_jax.sampling.program import Request
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.xla import COMPILER_OPTIONS
from pallas_kernels.scale_attention import BATCH_AXES

FORMAT = 2  # to be raised whenever a sample of the same settings becomes another one
MANIFEST = "samples.json"
_PART = re.compile(r"tokens/\d{10}\.npz")
# Names of files that are ours, and so may be removed: parts, pictures, and what a killed process was writing.
_PICTURE = re.compile(r"pictures/(\d+/\d+\.png|\d+\.array_record)")
_OURS = re.compile(rf"{_PART.pattern}|{_PICTURE.pattern}|(tokens/|pictures/(\d+/)?)\.[^/]+\.partial")
_MOST = 2**26  # samples of a run, fifty times ImageNet; their numbers take ½ GiB


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the pictures of a directory, as `samples.json` has it.

    Attributes:
      weights: SHA-256 of the model's weights file. model: what else it is. dtype: it computes in.
      pictures: the format of their files, `png` or `array_record`.
    """

    weights: str
    model: ModelConfig
    dtype: str
    schedule: Schedule
    seed: int = 0
    greedy: bool = False
    pictures: str = "png"
    format: int = FORMAT


class Part(NamedTuple):
    """Samples that were computed together: labels and indices (N,), tokens (N,L), images (N,S,S,3) uint8."""

    labels: np.ndarray
    indices: np.ndarray
    tokens: np.ndarray
    images: np.ndarray


def sample_classes(
    model: Model,
    settings: Settings,
    labels: Sequence[int],
    per_class: int,
    path: Path,
    *,
    batch: int = 16,
    stop: Callable[[int], bool] = lambda _: False,
) -> int | None:
    """Writes `per_class` samples of each class, those that are not there yet, as all processes call it together.

    Args:
      model: with its parameters on the mesh in use (`jax.set_mesh`). settings: that agree with it.
      labels: in [0, num_classes); their order and repetitions do not matter.
      path: the directory, new, or begun with the same settings; one that all processes share.
      batch: pictures at a time on each device.
      stop: called after each batch with its number, from 1; where it is true, in all processes, no other one is drawn.

    Returns:
      How many were written; None where it was stopped before the last.

    Raises:
      InputError: labels or numbers out of range, a directory with other things, of other settings or that another
        process writes, a full disk, or samples that are not there in the end, as process 0 sees the directory.
    """
    for name, value, low, high in (
        ("batch", batch, 1, 2**20),
        ("seed", settings.seed, 0, 2**32 - 1),
        ("codebook_size", model.config.tokenizer.codebook_size, 1, 2**16),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; expected {low} to {high}.")
    wanted = _numbers(model.config.num_classes, labels, per_class)
    folder = _Folder(path, settings)
    folder.check()
    with processes.locked(folder.path, "writes samples"):
        folder.check()  # another process may have begun it since
        return _write_missing(model, settings, wanted, folder, batch, stop)


def _write_missing(
    model: Model,
    settings: Settings,
    wanted: np.ndarray,
    folder: _Folder,
    batch: int,
    stop: Callable[[int], bool],
) -> int | None:
    """`sample_classes` of the numbers (N,) that are wanted, in a directory that is locked."""
    there = folder.open() if processes.is_first() else np.zeros(0, np.uint32)
    missing = wanted[multihost_utils.broadcast_one_to_all(~np.isin(wanted, there))]
    devices = jax.sharding.get_mesh().size
    size = min(batch, -(-len(wanted) // devices)) * devices

    done = len(wanted) - len(missing)
    shown = processes.is_first()
    with (
        progress(len(wanted), done, "written", shown=shown) as advance,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for i, (number, part) in enumerate(_draw(model, settings, missing, size), 1):
            if part.labels.size:
                folder.write(part, pool)
            advance(number)
            if stop(i) and i * size < len(missing):
                return None
    processes.barrier("all samples are written")
    _check_all_there(folder, wanted)
    return len(missing)


def _check_all_there(folder: _Folder, wanted: np.ndarray) -> None:
    """Raises InputError in every process where process 0 does not find all samples (N,) in the directory."""
    lost = len(np.setdiff1d(wanted, folder.look()[0])) if processes.is_first() else 0
    if lost := int(multihost_utils.broadcast_one_to_all(np.int32(lost))):
        raise InputError(
            f"{lost} of the {len(wanted)} samples are not in {folder.path}; let all processes share it, end other runs "
            "into it, and run the command again."
        )


def _draw(model: Model, settings: Settings, numbers: np.ndarray, size: int) -> Iterator[tuple[int, Part]]:
    """Samples of these numbers, `size` at a time: how many there are of each batch, and this process's part of it."""
    mesh = jax.sharding.get_mesh()
    params, options = model.placed(mesh), {"seed": settings.seed, "greedy": settings.greedy}

    def dispatch(numbers: np.ndarray) -> tuple[jax.Array, jax.Array]:
        padded = np.resize(numbers, size)  # repeats at the end of the last batch, so that nothing compiles for it
        labels, schedule = padded % model.config.num_classes, settings.schedule
        request = Request.of(model.config, settings.dtype, schedule, params, labels, numbers=padded, **options)
        return _sample(request.on(mesh), mesh)

    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    for chunk, (images, tokens) in one_ahead(dispatch, chunks):
        rows, own_images = _own_rows(images)
        _, own_tokens = _own_rows(tokens)
        real = rows < len(chunk)
        indices, labels = np.divmod(chunk[rows[real]].astype(np.int32), model.config.num_classes)
        yield len(chunk), Part(labels, indices, own_tokens[real], own_images[real])


def _numbers(num_classes: int, labels: Sequence[int], per_class: int) -> np.ndarray:
    """Of the samples asked for, (N,) uint32, ascending: the first of every class before the second of any."""
    if per_class < 1 or per_class * num_classes > 2**31:
        raise InputError(f"{per_class} per class were asked for; expected 1 to {2**31 // num_classes}.")
    if per_class * len(np.unique(labels)) > _MOST:
        raise InputError(f"{per_class} of each of {len(np.unique(labels))} classes are more than {_MOST} samples.")
    for label in labels:
        if not 0 <= label < num_classes:
            raise InputError(f"Label {label} is out of range; this model has classes 0 to {num_classes - 1}.")
    return np.add.outer(np.arange(per_class) * num_classes, np.unique(labels)).ravel().astype(np.uint32)


@functools.partial(jax.jit, static_argnums=1, compiler_options=COMPILER_OPTIONS)
def _sample(request: Request, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """`program.sample` by every device for its own rows, none asking another for anything.

    Returns:
      Images (B,S,S,3) uint8 and tokens (B,L) uint16: a quarter and a half of the bytes to copy to the host.
    """

    def own(request: Request) -> tuple[jax.Array, jax.Array]:
        sample = inspect.unwrap(program.sample)  # not jitted: options of the compiler are the outermost function's
        images, tokens, _ = sample(request)
        return to_uint8(images), tokens.astype(jnp.uint16)

    rows, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    specs = dataclasses.replace(request.mapped(lambda _: rows, lambda _: everywhere), params=everywhere)
    return jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=rows, check_vma=False)(request)


def _own_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows (N,) of an array split by sample that this process has, ascending, and what is in them."""
    parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    rows = np.concatenate([start + np.arange(len(parts[start])) for start in sorted(parts)])
    return rows, np.concatenate([parts[start] for start in sorted(parts)])


def folder_of(label: int, num_classes: int) -> str:
    """The name of the folder of a class's pictures: its number, with zeros before it so that names sort as numbers."""
    return f"{label:0{len(str(num_classes - 1))}}"


class _Folder:
    """The files. `check` is for every process, `open`, before any `write`, and `look` for the first."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = local_path(path, "The samples' directory")
        self._manifest = json.loads(json.dumps(to_plain(settings)))
        self._records = settings.pictures == "array_record"
        self._model, self._classes = settings.model, settings.model.num_classes

    def check(self) -> None:
        """Raises InputError where what is there are not samples of these settings."""
        file = self.path / MANIFEST
        try:
            content = read_bytes(file, "File", json_files.MOST_BYTES)
        except FileNotFoundError:
            names = {entry.name for entry in self.path.iterdir()} if is_there(self.path, "Directory") else set()
            # Hidden files are no samples; process 0 may be writing the manifest.
            if any(name != MANIFEST and not name.startswith(".") for name in names):
                raise InputError(f"{self.path} has files but no {MANIFEST}; choose a new directory.") from None
            return
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error}); choose a new directory.") from None
        there = json_files.parse(content, f"{file} cannot be read: its content", "choose a new directory")
        if not isinstance(there, dict):
            raise InputError(f"{file} is {shown(there)}, not settings of samples; choose a new directory.")
        fields = [*self._manifest, *(there.keys() - self._manifest.keys())]
        if differing := [name for name in fields if _text(there, name) != _text(self._manifest, name)]:
            raise InputError(
                f"{self.path} has samples with another {printable(' and '.join(differing), 200)}; choose a new "
                f"directory, or settings as in its {MANIFEST}."
            )

    def open(self) -> np.ndarray:
        """Writes the manifest if there is none, removes what is not whole; the numbers (N,) uint32 that are there."""
        if not (self.path / MANIFEST).exists():
            write_whole(self.path / MANIFEST, (json.dumps(self._manifest, indent=1) + "\n").encode())
        numbers, rest = self.look()
        with writing(self.path):
            for name in rest:
                (self.path / name).unlink(missing_ok=True)
        return numbers

    def look(self) -> tuple[np.ndarray, list[str]]:
        """The numbers (N,) uint32 of samples that are there whole, and the names of other files that are ours."""
        found = {str(file.relative_to(self.path)) for file in self.path.rglob("*")}
        with ThreadPoolExecutor(16) as pool:
            pngs = [] if self._records else list(filter(_PICTURE.fullmatch, found))
            are_whole = pool.map(lambda name: sample_parts.is_whole_png(self.path / name, self._model.image_size), pngs)
            whole_pngs = {name for name, is_whole in zip(pngs, are_whole, strict=True) if is_whole}
            parts = sorted(filter(_PART.fullmatch, found))
            read = list(pool.map(lambda name: sample_parts.read_part(self.path / name, self._model), parts))
            numbers, whole = set[int](), set[str]()
            for name, (labels, indices) in zip(parts, read, strict=True):
                own = set((indices.astype(np.int64) * self._classes + labels).tolist())
                pictures = self._pictures(labels, indices) if own else []
                if own and not own & numbers and self._are_whole(pictures, whole_pngs, len(own)):
                    numbers |= own
                    whole.update([name, *pictures])
        rest = [name for name in found - whole if _OURS.fullmatch(name)]
        return np.array(sorted(numbers), np.uint32), rest

    def _are_whole(self, pictures: list[str], whole_pngs: set[str], count: int) -> bool:
        """Whether a part's pictures are there undamaged."""
        if self._records:
            return sample_parts.holds_pngs(self.path / pictures[0], count, self._model.image_size)
        return whole_pngs.issuperset(pictures)

    def write(self, part: Part, pool: ThreadPoolExecutor) -> None:
        """Writes a part: its pictures, as the threads of the pool compress them, then its tokens."""
        files = [self.path / name for name in self._pictures(part.labels, part.indices)]
        compressed = pool.map(_png, part.images)
        if self._records:
            _write_records(files[0], compressed)
        else:
            list(pool.map(write_whole, files, compressed))
        content = io.BytesIO()
        np.savez(content, labels=part.labels, indices=part.indices, tokens=part.tokens)
        write_whole(self.path / "tokens" / f"{self._name(part.labels, part.indices)}.npz", content.getvalue())

    def _pictures(self, labels: np.ndarray, indices: np.ndarray) -> list[str]:
        """Names of the files of a part's pictures."""
        if self._records:
            return [f"pictures/{self._name(labels, indices)}.array_record"]
        folders = [folder_of(label, self._classes) for label in labels]
        return [f"pictures/{folder}/{i:05}.png" for folder, i in zip(folders, indices, strict=True)]

    def _name(self, labels: np.ndarray, indices: np.ndarray) -> str:
        return f"{indices[0] * self._classes + labels[0]:010}"


def _text(fields: dict[str, Any], name: str) -> str:
    """A field as JSON, empty if it is not there; values would not do, as 1, 1.0 and True are equal."""
    return json.dumps(fields[name], sort_keys=True) if name in fields else ""


def _png(image: np.ndarray) -> bytes:
    """(S,S,3) uint8 → a PNG file, compressed lightly: a tenth larger than by default, in 40% of the time."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG", compress_level=1)
    return content.getvalue()


def _write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes an array_record file, whole or not at all."""
    with written_whole(path) as partial:
        writer: Any = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
