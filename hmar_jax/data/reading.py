"""grain datasets → batches that are read ahead, by threads or worker processes that end with their reader."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from hmar_jax.config import DataConfig

Batch = dict[str, np.ndarray]


def read(dataset: grain.MapDataset, config: DataConfig, threads: int = 8) -> grain.IterDataset:
    """The dataset read ahead, in `threads` of this process, or two in each worker process."""
    if config.workers and not flags.FLAGS.is_parsed():  # grain's workers ask for a flag, which a notebook never parses
        flags.FLAGS.mark_as_parsed()
    threads = 2 if config.workers or config.source == "glyphs" else threads  # drawing glyphs holds Python's lock
    ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    return ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2))


class Reader(Iterator[Batch]):
    """A grain iterator, begun at once, that lets go of its workers even if the program ends in the middle of it.

    Grain's own clean-up, when the interpreter is half gone already, fails with pages of errors.
    """

    def __init__(self, dataset: grain.IterDataset[Batch]) -> None:
        iterator = iter(dataset)
        iterator.start_prefetch()
        self._iterators = [iterator]
        self.close = weakref.finalize(self, _close_all, self._iterators)

    def __next__(self) -> Batch:
        return next(self._iterators[0])


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()
