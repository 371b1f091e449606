"""grain datasets → elements that are read ahead, by threads or worker processes that end with their reader.

Worker processes hand batches over in shared memory (/dev/shm). They end when their parent does, even if it was killed;
Python's resource tracker, which ends last, then frees what they left there.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import connection

import grain
import numpy as np
from absl import flags

from hmar_jax.config import DataConfig
from hmar_jax.errors import MachineError, reason

Batch = dict[str, np.ndarray]

_LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def read(dataset: grain.MapDataset, config: DataConfig, threads: int = 8) -> grain.IterDataset:
    """The dataset read ahead, in `threads` of this process, or two in each worker process."""
    if config.workers and not flags.FLAGS.is_parsed():  # grain's workers ask for a flag, which a notebook never parses
        flags.FLAGS.mark_as_parsed()
    threads = 2 if config.workers or config.source == "glyphs" else threads  # drawing glyphs holds Python's lock
    ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
    return ahead.mp_prefetch(options, worker_init_fn=end_with_parent)


class Reader[T](Iterator[T]):
    """A grain iterator, begun at once, that lets go of its workers even if the program ends in the middle of it.

    Grain's own clean-up, when the interpreter is half gone already, fails with pages of errors.

    Raises:
      MachineError: the machine lacks memory, shared memory or open files for worker processes.
    """

    def __init__(self, dataset: grain.IterDataset[T]) -> None:
        with _lacks():
            iterator = iter(dataset)
            iterator.start_prefetch()
        self._iterators = [iterator]
        self.close = weakref.finalize(self, _close_all, self._iterators)

    def __next__(self) -> T:
        with _lacks():
            return next(self._iterators[0])


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def end_with_parent(index: int, count: int) -> None:
    """Has this worker process end as soon as the one that started it is gone; grain calls it in each worker.

    Ctrl-C, which a terminal sends to all processes of a program, is left to that one.

    A thread waits for a pipe of the parent to close, as it does however the parent ends. (Linux can send a signal when
    the parent's thread that started a process ends, but grain's threads that do so end early.)
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, name="end with parent", daemon=True).start()


@contextlib.contextmanager
def _lacks() -> Iterator[None]:
    """Sources have sentences for what the disk refuses; what else the system refuses is what worker processes need."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        ended = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))  # grain's words
        number = int(ended[1]) if ended else 0
        if number == signal.SIGKILL:
            raise MachineError(
                "A worker process that reads data was killed, most likely for want of memory; lower data.workers, or "
                "set it to 0."
            ) from error
        # Writing to a page of shared memory that there is no room for is a bus error.
        if number == signal.SIGBUS or (isinstance(error, OSError) and error.errno in _LACKING):
            why = "bus error" if ended else reason(error)
            raise MachineError(
                f"The worker processes that read data found no room in shared memory ({why}): see `df -h /dev/shm`; "
                "make it larger (a container's by --shm-size=8g), lower data.workers, or set it to 0."
            ) from error
        raise
