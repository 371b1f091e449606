"""pictures → a token cache, coded by all devices of all processes; an export that was killed goes on.

    pictures ─decode, crop: threads or workers of each process→ uint8 batches ─its devices→ tokens ─→ its shards

Work in progress lies beside the cache, in `.NAME.partial`, and becomes the cache by a rename when all of it is there:

    export.json                           what decides the tokens; other settings are refused
    .lock                                 of the process that writes it, which another one must not meanwhile
    tokens-00000-of-0000N.array_record    a shard that is finished; it appears by a rename too
    broken.txt                            the pictures that `data.skip_broken` left out, if there were any
    validation/                           the same of the held-out pictures, where `data.held_out` says so

Shard i holds the pictures from i · shard size on, the last one fewer. Of the missing shards, process i of n codes the
i-th, the (i+n)-th and so on, with its own devices alone, so that any number of processes and devices may go on with
what others began. The tokens of a picture depend on the settings and its index, not on the batch, the processes or the
devices, but for near-ties between codes: other rounding, as of bfloat16 in another batch or of another kind of device,
may tip them.

Axis letters: B batch, S pixels a side, L tokens of one picture.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from hmar_jax import images as pictures
from hmar_jax.config import DataConfig, MeshConfig, ModelConfig
from hmar_jax.config.plain import to_plain
from hmar_jax.data import pipeline
from hmar_jax.data.broken import Broken, WholePictures
from hmar_jax.data.held_out import NamedSource, Part
from hmar_jax.data.tokens import (
    Header,
    check_free,
    is_whole,
    records_of,
    shard_names,
    validation_of,
    write_header,
    write_shard,
)
from hmar_jax.errors import InputError
from hmar_jax.files import json_files, local_path, lock, put_in_place, remove, write_whole, writing
from hmar_jax.formats.model_directory import Opened, open_model, read_params
from hmar_jax.model import Model
from hmar_jax.networks import held_dtypes, networks
from hmar_jax.parallel import processes, sharding
from hmar_jax.progress_bar import progress
from hmar_jax.xla import COMPILER_OPTIONS
from pallas_kernels.scale_attention import BATCH_AXES

MANIFEST, BROKEN = "export.json", "broken.txt"
_SHARD = 4096  # pictures: of ImageNet 313 shards, which 64 hosts share well, and seconds of work to lose on a GPU
_PIXELS = 2**21  # of the crops that a device codes at a time: 1.3 GiB for the largest map of 160 channels in float32
_IN_FLIGHT = 3  # batches that wait on a device

# A process that has nothing left to code compiles nothing, and XLA may not have the others wait for its timings.
_OPTIONS = COMPILER_OPTIONS | {"xla_gpu_shard_autotuning": False}


def export_tokens(
    model: str | Path,
    data: DataConfig,
    output: str | Path,
    *,
    crops: int = 1,
    count: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> int:
    """Writes a token cache of pictures, or what is missing of it, as all processes call it together.

    Args:
      model: model directory or hub id, with the tokenizer.
      data, crops, count, seed: which crops of which pictures, as in `pipeline.views`.
      output: the cache, new, begun, or finished with the same settings; a folder that all processes share.
      batch_size: pictures at a time on each device; by default as many as a device of 16 GiB has room for.
      dtype: `float32` or `bfloat16`, that the encoder computes in; the quantizer computes in float32.

    Returns:
      The number of pictures in the cache.

    Raises:
      InputError: bad arguments, a picture that cannot be read, something else at `output`, another process that
        exports to it, or a full disk. What is finished by then stays.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; use 'float32' or 'bfloat16'.")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected 1 or more.")
    path, opened = local_path(output, "The token cache's path"), open_model(model)
    config = dataclasses.replace(opened.config, transformer=None)
    jobs = _jobs(path, config, opened.meta["tokenizer_sha256"], data, crops, count, seed, dtype)
    whole = next(iter(jobs))
    if whole.is_finished(path):
        return whole.header.count
    try:
        with processes.locked(whole.folder, "exports tokens"):
            if processes.by_first(lambda: whole.is_finished(path)):  # another one did, as this one waited
                return whole.header.count
            try:
                _write_missing(jobs, opened, config, data, batch_size, dtype)
            except BaseException:
                whole.leave()
                raise
        if processes.is_first():
            with writing(path):
                whole.folder.rename(path)
    finally:
        with contextlib.suppress(OSError):  # there is something in it, or it has its new name
            whole.folder.rmdir()
    return whole.header.count


def _write_missing(
    jobs: dict[_Job, grain.MapDataset[dict[str, Any]]],
    opened: Opened,
    config: ModelConfig,
    data: DataConfig,
    batch_size: int | None,
    dtype: str,
) -> None:
    """Makes a cache of each job's folder, but for its name, as all processes call it together."""
    tokenizer = None
    for job, views in jobs.items():
        missing = job.begin()
        if own := missing[jax.process_index() :: jax.process_count()]:
            tokenizer = tokenizer or _load(opened, config, dtype)
            batch = batch_size or max(1, min(64, _PIXELS // config.image_size**2) // job.header.crops)
            encoded = _encoded(tokenizer, views, data, min(batch, job.header.count), job.pictures_of(own))
            job.write(own, encoded)
    processes.barrier("all shards are written")
    for job in jobs:
        job.check_all_there()
    if processes.is_first():
        for job in jobs:
            job.list_left_out()
            write_header(job.folder, job.header)


def _jobs(
    path: Path,
    config: ModelConfig,
    tokenizer: str,
    data: DataConfig,
    crops: int,
    count: int | None,
    seed: int,
    dtype: str,
) -> dict[_Job, grain.MapDataset[dict[str, Any]]]:
    """The cache's folder and, where pictures are held out, that of theirs, each with its pictures."""
    partial = path.absolute().parent / f".{path.absolute().name}.partial"  # `/` has no name
    folders: dict[Part, Path] = {"train": partial}
    if data.held_out:
        folders["validation"] = validation_of(partial)
    jobs = {}
    for part, folder in folders.items():
        number = max(1, round(count * data.held_out)) if count and part == "validation" else count
        source, views = pipeline.views(data, config.image_size, crops=crops, seed=seed, count=number, part=part)
        header = Header(
            sides=config.ladder.sides,
            codebook_size=config.tokenizer.codebook_size,
            crops=crops,
            count=len(views),
            class_names=source.class_names,
            tokenizer=tokenizer,
            source=f"{data.source} {data.name or data.path or data.classes}".strip(),
            shards=-(-len(views) // _shard_size(len(views))),
            dtype=dtype,
        )
        left_out = source.left_out if isinstance(source, WholePictures) else ()
        jobs[_Job(folder, header, _settings(header, data, seed, source), left_out)] = views
    return jobs


def _load(opened: Opened, config: ModelConfig, dtype: str) -> Model:
    """The tokenizer alone."""
    held = held_dtypes(config, dtype)
    params = read_params(opened, "tokenizer", lambda name, array: jnp.asarray(array, held.get(name)))
    return Model(config, params, dtype)


def _shard_size(count: int) -> int:
    """Pictures in each shard, the last one perhaps fewer: of few pictures some 64 shards, for as many processes."""
    return min(_SHARD, max(16, -(-count // 64)))


def _settings(header: Header, data: DataConfig, seed: int, source: pipeline.Source) -> dict[str, Any]:
    """What decides the tokens, as JSON gives it back. A folder may move; it is known by the names in it."""
    named = [source.name(index) for index in range(len(source))] if isinstance(source, NamedSource) else []
    digest = hashlib.sha256(os.fsencode("\0".join(named))).hexdigest()
    of_data = {f"data.{name}": value for name, value in to_plain(data).items() if name not in ("path", "workers")}
    of_cache = {name: value for name, value in to_plain(header).items() if name not in ("source", "ends")}
    rest = {"seed": seed, "pictures": digest, "shard_size": _shard_size(header.count)}
    settings: dict[str, Any] = json.loads(json.dumps(of_cache | of_data | rest))
    return settings


def _encoded(
    tokenizer: Model,
    views: grain.MapDataset[dict[str, Any]],
    data: DataConfig,
    batch: int,
    order: Sequence[int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (crops,B,L) and labels (B,) of the pictures of these indices, by all devices of this process.

    The host reads ahead, and several batches are on their way to the devices, which so never wait for each other.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    params, split = tokenizer.placed(mesh), sharding.batch_sharding(mesh)
    threads = max(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 8)
    pending: collections.deque[tuple[np.ndarray, int, jax.Array]] = collections.deque()

    def fetch() -> tuple[np.ndarray, np.ndarray]:
        labels, crops, coded = pending.popleft()
        tokens = np.asarray(coded)[: len(labels) * crops]
        return tokens.reshape(len(labels), crops, -1).swapaxes(0, 1), labels

    for images, labels in pipeline.in_order(views, data, batch * mesh.size, order, threads):
        crops, rows = len(images), len(images) * batch * mesh.size
        flat = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
        full = flat if len(flat) == rows else np.resize(flat, (rows, *flat.shape[1:]))  # one shape, one compilation
        coded = _encode(tokenizer.config, tokenizer.dtype, mesh, params, jax.device_put(full, split))
        pending.append((labels, crops, coded))
        if len(pending) > _IN_FLIGHT:
            yield fetch()
    while pending:
        yield fetch()


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=_OPTIONS)
def _encode(config: ModelConfig, dtype: str, mesh: Mesh, params: Any, images: jax.Array) -> jax.Array:
    """Pictures (B,S,S,3) uint8 → tokens (B,L) uint16; every device codes its own rows."""

    def own(params: Any, images: jax.Array) -> jax.Array:
        return networks(config, params, dtype).tokenizer.encode(pictures.to_signed(images)).astype(jnp.uint16)

    rows = PartitionSpec(BATCH_AXES)
    spread = jax.shard_map(own, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return spread(params, images)


class _Job:
    """A folder that becomes a cache. Every process calls `begin`, `write` and `check_all_there`, in that order."""

    def __init__(self, folder: Path, header: Header, settings: dict[str, Any], left_out: Sequence[Broken]) -> None:
        self.folder, self.header, self._settings, self._left_out = folder, header, settings, left_out
        self._begun = False
        self._names = shard_names(header.shards)
        starts = range(0, header.count, settings["shard_size"])
        self._pictures = [range(at, min(at + settings["shard_size"], header.count)) for at in starts]

    def is_finished(self, path: Path) -> bool:
        """Whether a cache of these settings is there. Raises InputError where something else is."""
        if (path / MANIFEST).is_file() and self._differing(path) == []:
            return True
        check_free(path)
        return False

    def begin(self) -> list[int]:
        """Makes the folder if there is none, removes what is damaged from it; which shards are missing."""
        missing = np.ones(len(self._names), bool)
        if processes.is_first():
            missing[:] = self._prepare()
        missing = multihost_utils.broadcast_one_to_all(missing)
        if not (self.folder / MANIFEST).is_file():
            raise InputError(
                f"{self.folder} is not there for process {jax.process_index()}; let all share that folder."
            )
        self._check_settings()
        self._begun = True
        return np.flatnonzero(missing).tolist()

    def pictures_of(self, shards: Sequence[int]) -> list[int]:
        """The indices of the pictures in these shards."""
        return [index for shard in shards for index in self._pictures[shard]]

    def write(self, shards: Sequence[int], encoded: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes these shards from the tokens (crops,B,L) and labels (B,) of their pictures, in batches."""
        header, total = self.header, len(self.pictures_of(shards))
        length, classes = sum(side**2 for side in header.sides), len(header.class_names)
        with progress(total, 0, "coded", shown=processes.is_first()) as advance:

            def counted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                for tokens, labels in encoded:
                    advance(len(labels))
                    yield tokens, labels

            records = records_of(counted(), length, header.codebook_size, header.crops, classes)
            for shard in shards:
                self._write(self._names[shard], itertools.islice(records, len(self._pictures[shard])))

    def check_all_there(self) -> None:
        """Raises InputError in every process where process 0 does not find all shards."""
        there = [(self.folder / name).is_file() for name in self._names]
        if lost := int(multihost_utils.broadcast_one_to_all(np.int32(there.count(False)))):
            raise InputError(
                f"{lost} of {len(self._names)} shards are not in {self.folder}; let all processes share it, end "
                "other exports to it, and run the command again."
            )

    def list_left_out(self) -> None:
        """Writes a file of the broken pictures that were left out, one a line."""
        if self._left_out:
            write_whole(self.folder / BROKEN, "".join(f"{one}\n" for one in self._left_out).encode("utf-8", "replace"))

    def leave(self) -> None:
        """Removes the folder where no shard is in it yet, so that an export that could not begin leaves nothing."""
        if self._begun and jax.process_count() == 1 and not any((self.folder / name).exists() for name in self._names):
            remove(self.folder)

    def _prepare(self) -> list[bool]:
        """Which shards are missing, once the folder is in order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = {entry.name for entry in self.folder.iterdir() if not entry.name.startswith(lock.NAME)}
        if MANIFEST in there:
            self._check_settings()
        elif there - {f".{MANIFEST}.partial"}:
            raise InputError(f"{self.folder} has files but no {MANIFEST}; remove it, or choose another --output.")
        else:
            write_whole(self.folder / MANIFEST, (json.dumps(self._settings, indent=1) + "\n").encode())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            whole = list(pool.map(lambda i: self._names[i] in there and self._is_whole(i), range(len(self._names))))
        kept = {MANIFEST, *itertools.compress(self._names, whole)}
        with writing(self.folder):
            for name in there - kept:
                if name.lstrip(".").removesuffix(".partial") in {MANIFEST, *self._names}:
                    (self.folder / name).unlink(missing_ok=True)
        return [not is_there for is_there in whole]

    def _is_whole(self, shard: int) -> bool:
        return is_whole(self.folder / self._names[shard], len(self._pictures[shard]), self.header)

    def _write(self, name: str, records: Iterator[bytes]) -> None:
        """Writes a shard, whole or not at all."""
        unfinished = self.folder / f".{name}.partial"
        try:
            write_shard(unfinished, records, self.folder)
            with writing(self.folder):
                put_in_place(unfinished, self.folder / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def _check_settings(self) -> None:
        """Raises InputError where the folder is of other settings."""
        if differing := self._differing(self.folder):
            raise InputError(
                f"{self.folder} has a part of these tokens with another {' and '.join(differing)}; remove it, choose "
                f"another --output, or give the settings in its {MANIFEST}."
            )

    def _differing(self, folder: Path) -> list[str]:
        """The names of the settings that are others in a folder's manifest."""
        file, instead = folder / MANIFEST, f"remove {folder}, or choose another --output"
        try:
            there = json_files.read(file, "The record of an export", instead)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if not isinstance(there, dict):
            raise InputError(f"{file} is not the record of an export; {instead}.")
        return [name for name, value in self._settings.items() if there.get(name) != value]
