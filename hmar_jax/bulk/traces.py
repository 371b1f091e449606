"""a recorded sample → frames: the picture, which tokens stand and how sure the model was, pass by pass.

Axis letters: S pixels a side, p tokens a side of the pass's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hmar_jax.arrays import on_host, whole
from hmar_jax.errors import InputError, shown
from hmar_jax.images import from_signed

if TYPE_CHECKING:
    from hmar_jax.model import Model, Sample


class Frame(NamedTuple):
    """One picture after one pass.

    Attributes:
      scale, step: which pass, from 0. steps: how many its scale has.
      image: (S,S,3) float32 in [0,1], the tokens so far decoded; those still open are as the pass drew them.
      earlier, now: (p,p) bool, tokens committed before the pass (or kept, when editing) and by it. The rest is open.
      confidence: (p,p) float32 in [0,1], the probability of what the pass drew, after guidance and filters.
    """

    scale: int
    step: int
    steps: int
    image: np.ndarray
    earlier: np.ndarray
    now: np.ndarray
    confidence: np.ndarray


def frames(model: Model, sample: Sample, index: int = 0) -> list[Frame]:
    """How one picture of a sample came about: a frame for each pass, in order.

    Args:
      sample: what `model` gave, with `record=True`. index: which of its pictures, from 0.

    Raises:
      InputError: the sample has no draws, or no such picture.
    """
    from hmar_jax.model import Model, Sample

    if not isinstance(model, Model) or not isinstance(sample, Sample):
        raise InputError(f"model is {shown(model)} and sample {shown(sample)}; expected a Model and what it gave.")
    draws, ladder = sample.draws, model.config.ladder
    if not draws:
        raise InputError("This sample has no draws; have them recorded with model.sample(…, record=True).")
    index = whole("index", index, 0)
    if index >= len(sample.tokens):
        raise InputError(f"Picture {shown(index)} is not in this sample; it has 0 to {len(sample.tokens) - 1}.")
    tokens = np.stack([sample.tokens[index]] * len(draws))
    for state, draw in zip(tokens, draws, strict=True):
        where = ladder.slices[draw.scale]
        state[where] = np.where(draw.masked[index], draw.tokens[index], state[where])
    scales = [draw.scale for draw in draws]
    images = from_signed(on_host(model.tokenizer.decode_until(tokens[:, None], scales))[:, 0])
    made = []
    for draw, after, image in zip(draws, [*draws[1:], None], images, strict=True):
        masked = draw.masked[index]
        still_open = after.masked[index] if after is not None and after.scale == draw.scale else np.zeros_like(masked)
        side = ladder.sides[draw.scale]
        maps = (array.reshape(side, side) for array in (~masked, masked & ~still_open, draw.confidence[index]))
        made.append(Frame(draw.scale, draw.step, scales.count(draw.scale), image, *maps))
    return made
