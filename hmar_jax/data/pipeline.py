"""DataConfig → endless shuffled batches for training, or one pass in order for a token cache; both by grain.

    source ─shuffle, repeat→ examples ─random crop, flip→ pictures ─this process's rows→ batches ─ahead→ steps

Every arrow is a function of (seed, global index) alone, so a batch depends neither on threads, workers and processes
nor on where training was interrupted, and the position in the stream is one number.

Axis letters: B global batch, b the rows of it that this process reads, H, W height and width of a picture as it is
stored, S pixels a side for the model, L tokens.
"""

from __future__ import annotations

import collections
import contextlib
import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from typing import Any

import grain
import numpy as np

from hmar_jax.config import DataConfig
from hmar_jax.data.broken import naming_all
from hmar_jax.data.crops import Source, Views, Visit
from hmar_jax.data.held_out import Part
from hmar_jax.data.picture_files import BrokenPictureError
from hmar_jax.data.reading import Batch, Reader, read
from hmar_jax.data.sources import SEEDS, Sources
from hmar_jax.errors import InputError


@contextlib.contextmanager
def _naming_all(config: DataConfig) -> Iterator[None]:
    """Turns the error of one broken picture in the block into an InputError that names all of them."""
    try:
        yield
    except BrokenPictureError as error:
        raise naming_all(Sources(config).pictures, config, error) from error


def batches(
    config: DataConfig,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    source: Source | None = None,
) -> Batches:
    """Endless training batches; every epoch in another order, every visit with another crop.

    Args:
      config: what to read, and how to crop it. batch_size: B. image_size: S, unused by tokens.
      seed: of order, crops, flips and glyphs, from 0 to 2^32-1.
      rows: which examples of every batch to read, from 0, in that order; all when None. They are the same ones
        whichever other rows are read, so that every process of a job may read its own.
      source: what `Sources` opened for this config; by default its training part, opened now.

    Returns:
      An iterator of {"image": uint8 (b,S,S,3), "label": int32 (b,)} or {"tokens": int32 (b,L), "label": int32 (b,)}.

    Raises:
      InputError: B or a row is out of range, a setting is, or the source is not usable. While iterating: an example
        cannot be read.
    """
    rows = range(batch_size) if rows is None else rows
    if batch_size < 1 or not rows or not all(0 <= row < batch_size for row in rows):
        raise InputError(
            f"batch_size={batch_size}, rows={list(rows)}: expected 1 or more, and rows from 0 to below that."
        )
    source = Sources(config, image_size).open(seed=seed) if source is None else source
    for_ever = _for_ever(grain.MapDataset.source(source), config, seed)
    pictures = for_ever.random_map(Visit(config, image_size))
    return Batches(_Rows(pictures, batch_size, tuple(rows)).batch(len(rows)), batch_size, config)


def example_indices(source: Source, config: DataConfig, *, start: int, count: int, seed: int) -> list[int]:
    """Which examples of a source `batches` delivers, for any batch size, at positions start … start+count-1.

    Args:
      source, config, seed: as `batches` gets them.
      start: a position in the endless stream, from 0. count: how many positions, from 0.

    Returns:
      Indices for `source`, in the order of the stream.

    Raises:
      InputError: start, count or the seed is out of range.
    """
    if start < 0 or count < 0:
        raise InputError(f"start={start}, count={count}: expected 0 or more of each.")
    for_ever = _for_ever(grain.MapDataset.range(len(source)), config, seed)
    return [int(for_ever[position]) for position in range(start, start + count)]


def views(
    config: DataConfig,
    image_size: int,
    *,
    crops: int = 1,
    seed: int = 0,
    count: int | None = None,
    part: Part = "train",
) -> tuple[Source, grain.MapDataset[dict[str, Any]]]:
    """A source and its pictures by index, each in several crops, which depend on the seed and the index alone.

    With `config.flip`, every other crop of a picture is mirrored, the first with probability 1/2. The crops of a glyph
    are other renderings of its class.

    Args:
      config: what to read, and how to crop it. image_size: S.
      crops: per picture; random ones differ, of central ones there is one, or two with `config.flip`.
      seed: of crops, flips and glyphs, from 0 to 2^32-1.
      count: how many pictures, from the first; all when None. Glyphs, being endless, need it.
      part: of the source, see `Sources.open`.

    Returns:
      The source; {"image": uint8 (crops,S,S,3), "label": int32} by index.

    Raises:
      InputError: crops or count do not suit the source, or it is not usable. When indexed: a picture cannot be read.
    """
    if config.source == "tokens":
        raise InputError("data.source='tokens' holds no pictures; set it to 'glyphs', 'folder' or 'tfds'.")
    if crops < 1 or (count is not None and count < 1):
        raise InputError(f"crops={crops}, count={count}: expected 1 or more of each.")
    if config.source != "glyphs" and config.crop == "center" and crops > 1 + config.flip:
        raise InputError(
            f"data.crop='center' with data.flip={config.flip} gives {1 + config.flip} different crops of a picture, "
            f"not {crops}; use data.crop='random' or fewer."
        )
    if config.source == "glyphs" and count is None:
        raise InputError("data.source='glyphs' is endless; say how many pictures to take, with count.")
    source = Sources(config, image_size).open(part, seed)
    total = min(len(source), count or len(source))
    indices = grain.MapDataset.range(total).seed(_checked(seed))
    return source, indices.random_map(Views(source, total, crops, config, image_size))


def in_order(
    pictures: grain.MapDataset[dict[str, Any]],
    config: DataConfig,
    batch_size: int,
    chosen: Sequence[int] | None = None,
    threads: int = 8,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass over the pictures that `views` gave for `config`, read ahead.

    Args:
      batch_size: B; the last batch may be smaller. chosen: the indices to read, in that order; all when None.
      threads: how many read a batch each, where `config.workers` is 0.

    Returns:
      Pairs of images, (crops,B,S,S,3) uint8, and labels, (B,) int32.

    Raises:
      InputError: while iterating: a picture cannot be read.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected 1 or more.")
    # By whole indices, so that the random map before them draws the same, whichever others are chosen.
    ordered = pictures if chosen is None else grain.MapDataset.source(chosen).map(pictures.__getitem__)
    batched = ordered.batch(batch_size, drop_remainder=False)
    reader = Reader[Batch](read(batched, config, threads))
    own = np.array if config.workers else np.asarray  # of workers' shared memory, which is not to outlive them

    def delivered() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with _naming_all(config):
            for batch in reader:
                yield own(batch["image"]).swapaxes(0, 1), own(batch["label"])
        if config.workers:
            # Each worker's last batch is held by grain's StopIteration, through a cycle of traceback and frame
            # (grain 0.2.18). At exit it is too late to free its shared memory, and Python warns of a leak.
            gc.collect()

    return delivered()


def examples(
    config: DataConfig,
    image_size: int,
    *,
    crops: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    count: int | None = None,
    part: Part = "train",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass over a source of pictures in its order: `in_order` over all `views`, whose arguments these are."""
    _, pictures = views(config, image_size, crops=crops, seed=seed, count=count, part=part)
    return in_order(pictures, config, batch_size)


def ahead[T](data: Batches, put: Callable[[Batch], T], depth: int = 2) -> Generator[tuple[T, dict[str, int]]]:
    """Batches made ready by `put`, on a thread, while those before them are in use.

    Args:
      data: to be read by nobody else meanwhile. put: e.g. sends a batch to the devices. depth: batches ahead.

    Yields:
      What `put` gave, and the state of `data` right after that batch.
    """

    def make() -> tuple[T, dict[str, int]]:
        batch = next(data)
        return put(batch), data.get_state()

    with futures.ThreadPoolExecutor(1, "batches") as thread:
        pending = collections.deque(thread.submit(make) for _ in range(depth))
        try:
            while True:
                pending.append(thread.submit(make))
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Batches(grain.DatasetIterator[Batch]):
    """The iterator that `batches` returns; also one that grain's and Orbax's checkpoint handlers take.

    Its state is {"examples": n}, how many of the whole stream all processes together have consumed: JSON, the same in
    every process, and good for any number of processes and workers, and any batch size that divides n.
    """

    def __init__(self, steps: grain.MapDataset[Batch], batch_size: int, config: DataConfig) -> None:
        super().__init__()
        self._steps, self._batch_size, self._config = steps, batch_size, config
        self._step = 0
        self._reader: Reader[Batch] | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        assert self._reader is not None
        try:
            with _naming_all(self._config):
                batch = next(self._reader)
        except Exception:
            self._stop()  # so that asking again fails again, instead of skipping a step
            raise
        self._step += 1
        # Workers give views of shared memory: copied, lest it outlive its owner.
        return {key: np.array(value) for key, value in batch.items()} if self._config.workers else batch

    def get_state(self) -> dict[str, int]:
        """The position, as JSON."""
        return {"examples": self._step * self._batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a position that `get_state` gave. Raises InputError if the batch size does not divide it."""
        step, rest = divmod(state["examples"], self._batch_size)
        if rest:
            raise InputError(
                f"The data stream stands at example {state['examples']}, no multiple of batch_size={self._batch_size}; "
                "go on with the batch size it had."
            )
        self._stop()
        self._step = step

    def start_prefetch(self) -> None:
        """Starts reading the next batches in the background."""
        if self._closed:
            raise ValueError("This iterator has been closed.")
        if self._reader is None:
            self._reader = Reader(read(self._steps[self._step :], self._config))

    def close(self) -> None:
        """Stops threads and workers. The iterator is of no use after that."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


class _Rows(grain.MapDataset):
    """The chosen rows of every run of `batch_size` elements, joined."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: tuple[int, ...]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self.parents[0]) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self.parents[0][step * self._batch_size + self._rows[row]]


def _for_ever(examples: grain.MapDataset, config: DataConfig, seed: int) -> grain.MapDataset:
    """The examples of a source, or their indices, in the order of training."""
    seeded = examples.seed(_checked(seed))
    # Glyphs are in random order already, and too many.
    ordered = seeded if config.source == "glyphs" else seeded.shuffle()
    return ordered.repeat(2**62 // len(ordered))  # grain's own infinity overflows in batches of one


def _checked(seed: int) -> int:
    if not 0 <= seed < SEEDS:
        raise InputError(f"The data seed is {seed}; use an integer from 0 to 2^32-1.")
    return seed
