"""tokens of each scale, as soon as it is finished → the caller, while the compiled program runs on.

The program calls no function of the caller's. It posts under a ticket, which is one of its arguments, into the mailbox
of that number, so that one program serves all callers. The caller reads the mailbox in a thread of its own choice,
where it may use JAX. It might not in XLA's host callback: what it computed there would wait for a device that waits for
the callback.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import jax
import numpy as np
from jax.experimental import io_callback

_mailboxes: dict[int, SimpleQueue] = {}
_tickets = itertools.count()


def tell(ticket: jax.Array, scale: int, tokens: jax.Array) -> jax.Array:
    """In a program: posts the tokens (B,N) of a finished scale. What is made of those given back comes after that."""
    posted = io_callback(_post, jax.ShapeDtypeStruct((), bool), ticket, np.int32(scale), tokens)
    return jax.lax.optimization_barrier((tokens, posted))[0]


def _post(ticket: jax.Array, scale: jax.Array, tokens: jax.Array) -> np.ndarray:
    mailbox = _mailboxes.get(int(ticket))
    if mailbox is not None:
        mailbox.put((int(scale), np.array(tokens)))  # a copy: the buffer is the program's
    return np.asarray(True)


def posts(run: Callable[[np.uint32], object]) -> Generator[tuple[int, np.ndarray]]:
    """Runs a program that posts, given its ticket, in a thread; yields each scale and its tokens (B,N), in order.

    With several processes, the scales reach that of the first device alone. The iterator ends once the program has
    ended, also where it is closed early: two programs that exchange arrays between devices are not to run at once.

    Raises:
      Whatever `run` raises.
    """
    ticket, mailbox, reader = (
        next(_tickets) % 2**32,
        SimpleQueue[tuple[int, np.ndarray] | None](),
        threading.get_ident(),
    )
    _mailboxes[ticket] = mailbox
    pool = ThreadPoolExecutor(1, "sampling")
    try:
        running = pool.submit(run, np.uint32(ticket))
        running.add_done_callback(lambda _: mailbox.put(None))
        yield from iter(mailbox.get, None)
        running.result()
    finally:
        del _mailboxes[ticket]
        # The garbage collector may close this in any thread, such as that of the program's callback.
        pool.shutdown(wait=threading.get_ident() == reader)
