"""How far a long run is: a bar with its rate on a terminal, elsewhere a line a minute in the log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import tqdm

_LOG_SECONDS = 60

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def progress(total: int, done: int, verb: str, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows how many pictures of a run are done.

    Args:
      total: pictures of the whole run. done: those of earlier runs.
      verb: what is done to them, e.g. `written`. shown: False in processes that are to be silent.

    Yields:
      A function to be called with the number of pictures that have been done since the last call.
    """
    start, first, said = time.monotonic(), done, float("-inf")
    with tqdm.tqdm(total=total, initial=done, unit=" pictures", disable=None if shown else True) as bar:

        def advance(number: int) -> None:
            nonlocal done, said
            done += number
            bar.update(number)
            now = time.monotonic()
            if shown and bar.disable and now - said >= _LOG_SECONDS:
                rate = (done - first) / max(now - start, 1e-9)
                said = now
                logger.info("%d of %d pictures are %s (%.3g a second).", done, total, verb, rate)

        yield advance
