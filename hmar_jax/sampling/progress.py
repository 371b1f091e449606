"""tokens of each scale, as soon as it is finished → a function of the caller's, while the compiled program runs on.

The program knows no function, but a ticket, which is an argument: another function compiles nothing. The function is
called in the caller's thread, so that it may raise, draw and use JAX. It might not in XLA's host callback: what it
computed there would wait for a device that waits for the callback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import jax
import numpy as np
from jax.experimental import io_callback

OnScale = Callable[[int, np.ndarray], object]  # (scale from 0, its tokens (B,N) int32)

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


def relay[Result](run: Callable[[np.uint32], Result], on_scale: OnScale) -> Result:
    """Runs a program that tells, given its ticket, in a thread; calls `on_scale`, in order, in this one.

    With several processes, the scales reach that of the first device alone.

    Returns:
      What `run` gives, which is to wait for the program's end.

    Raises:
      Whatever `on_scale` or `run` raises, once the program has ended.
    """
    ticket = next(_tickets) % 2**32
    mailbox: SimpleQueue = SimpleQueue()
    _mailboxes[ticket] = mailbox
    try:
        with ThreadPoolExecutor(1, "sampling") as pool:
            running = pool.submit(run, np.uint32(ticket))
            running.add_done_callback(lambda _: mailbox.put(None))
            for scale, tokens in iter(mailbox.get, None):
                on_scale(scale, tokens)
        return running.result()
    finally:
        del _mailboxes[ticket]
