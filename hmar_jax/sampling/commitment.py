"""schedule → when each token is committed, scale by scale, for a picture (`plots.commitment`); nothing is drawn.

Axis letters: p side of a scale.
"""

from __future__ import annotations

import jax
import numpy as np

from hmar_jax.sampling import orders
from hmar_jax.sampling.sampler import pass_keys
from hmar_jax.sampling.schedule import Plan, Schedule


def commitment(schedule: Schedule) -> tuple[list[tuple[str, np.ndarray]], str]:
    """For each scale a title and a map (p,p) int of the steps, from 0, that commit its tokens; and a title for all."""
    plan = schedule.plan
    what = {
        "confidence": "order: confidence; how many tokens each step commits (which ones, the sample decides)",
        "random": "order: random; those of sample 0 of seed 0, for example",
        "halton": "order: halton; the same for all samples",
    }
    maps = []
    for scale, (side, steps) in enumerate(zip(schedule.sides, schedule.counts, strict=True)):
        numbers = "+".join(map(str, steps)) if len(steps) < 6 else f"{len(steps)} steps"
        by_place = np.repeat(np.arange(len(steps)), steps)
        maps.append((f"{side}x{side}: {numbers}", by_place[_places(plan, scale, side)].reshape(side, side)))
    return maps, what[plan.order] if schedule.has_masked_steps else "one step a scale"


def _places(plan: Plan, scale: int, side: int) -> np.ndarray:
    """The place of each token, row by row, in the order of its scale: (p²,) int from 0."""
    if plan.order == "halton":
        return orders.halton(side)
    if plan.order == "random":
        sample = jax.random.fold_in(jax.random.key(0), 0)
        _, keys = pass_keys(sample[None], scale, 0)
        return np.argsort(np.argsort(-np.asarray(orders.random(keys, side * side)[0])))
    return np.arange(side * side)
