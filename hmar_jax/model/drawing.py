"""A sampling request → its pictures on the host: all at once, in batches of one size, or scale by scale.

Axis letters: B batch, S pixels a side, L tokens, N tokens of one scale.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hmar_jax.arrays import on_host, one_ahead
from hmar_jax.model.sample import DrawRecord, Sample
from hmar_jax.sampling import program, progress
from hmar_jax.sampling.program import Request


class Event(NamedTuple):
    """A finished scale, as `Model.stream` yields it.

    Attributes:
      scale: from 0. step: the last of the scale, from 0.
      images: (B,S,S,3) float32 in [0,1], the pictures as far as they have grown; None with `decode=False`,
        which their type leaves out as in `Sample`.
      tokens: (B,N) int32, of this scale, final.
    """

    scale: int
    step: int
    images: np.ndarray | Any
    tokens: np.ndarray


def draw(request: Request, mesh: Mesh, batch_size: int | None = None) -> Sample:
    """Runs a request of NumPy arrays on a mesh, `batch_size` samples at a time; by default all at once.

    The last batch is padded with repeats, so that one program serves all.
    """
    number = len(request.labels)
    size = min(batch_size or number, number)

    def rows(start: int, array: np.ndarray) -> np.ndarray:
        return np.resize(array[start : start + size], (size, *array.shape[1:]))

    def dispatch(start: int) -> Any:
        with jax.set_mesh(mesh):
            return program.sample(request.mapped(lambda array: rows(start, array)).on(mesh))

    def join(*batches: np.ndarray) -> np.ndarray:
        return batches[0][:number] if len(batches) == 1 else np.concatenate(batches)[:number]

    # The devices may have padded a batch too.
    fetched = [
        jax.tree.map(lambda array: on_host(array)[:size], out) for _, out in one_ahead(dispatch, range(0, number, size))
    ]
    images, tokens, draws = jax.tree.map(join, *fetched)
    return Sample(images, tokens, _records(request, draws) if request.record else None)


def _records(request: Request, draws: list[Any]) -> list[DrawRecord]:
    passes = [at for scale in range(len(request.plan.counts)) for at in request.plan.passes(scale)]
    return [DrawRecord(at.scale, at.step, *draw) for at, draw in zip(passes, draws, strict=True)]


def stream(request: Request, mesh: Mesh, decode: Callable[[np.ndarray, int], np.ndarray] | None) -> Generator[Event]:
    """An event for each finished scale of a request of NumPy arrays, while its program runs in a thread.

    The program is compiled before this returns, in the caller's thread: in that of its own, what the caller has set by
    JAX's context managers (the precision of products, the default device) does not hold.

    Args:
      decode: (tokens (B,L) of the scales so far, the scale) → images, called in the thread that reads the events; None
        for events without images.
    """
    spread = dataclasses.replace(request, ticket=np.uint32(0)).on(mesh)
    with jax.set_mesh(mesh):
        compiled = program.sample.lower(spread).compile()

    def run(ticket: np.uint32) -> object:
        return jax.block_until_ready(compiled(dataclasses.replace(spread, ticket=ticket)))

    return _events(request, run, decode)


def _events(
    request: Request, run: Callable[[np.uint32], object], decode: Callable[[np.ndarray, int], np.ndarray] | None
) -> Generator[Event]:
    number, ladder = len(request.labels), request.config.ladder
    so_far = np.zeros((number, ladder.length), np.int32)
    with contextlib.closing(progress.posts(run)) as posts:
        for scale, padded in posts:
            tokens = padded[:number]
            so_far[:, ladder.slices[scale]] = tokens
            images = None if decode is None else decode(so_far, scale)
            yield Event(scale, len(request.plan.counts[scale]) - 1, images, tokens)
