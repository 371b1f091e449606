"""A sampler that serves thousands of requests: memory stays what it is, and nothing compiles twice."""

import dataclasses
import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import lively_model, tiny

from hmar_jax.sampling import program
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

REQUESTS, WARM, EVERY = 2000, 400, 50
MODEL = dataclasses.replace(tiny(depth=2, width=16, heads=2), ladder=ScaleLadder((1, 2)))
GUIDED = Schedule.from_counts([[1], [4]])
REFINED = Schedule.from_counts([[1], [1, 3]], cfg=0, noise=1.0)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a request compiles for; the rest of it is random."""

    batch: int
    schedule: Schedule
    record: bool = False
    greedy: bool = False
    edit: bool = False


SHAPES = (
    Shape(1, GUIDED),
    Shape(3, GUIDED, record=True),
    Shape(4, REFINED),
    Shape(1, REFINED, greedy=True),
    Shape(2, GUIDED, edit=True),
    Shape(3, REFINED, edit=True),
)


@pytest.fixture
def quick_compilation():
    """Compiles fast rather than fast code."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def compiled():
    """Names of the functions that are compiled meanwhile."""
    names = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def serve(model, shape, rng):
    """One request: random labels, numbers, seed, scalars, pictures and masks."""
    scalars = {
        "temperature": rng.uniform(0.5, 2),
        "top_k": int(rng.integers(1, 16)),
        "top_p": rng.uniform(0.3, 1),
        "seed": int(rng.integers(2**32)),
        "numbers": rng.integers(2**32, size=shape.batch),
        "record": shape.record,
        "greedy": shape.greedy,
    }
    if shape.schedule is GUIDED:
        scalars["cfg"] = rng.uniform(0.5, 4)
    labels = rng.integers(5, size=shape.batch)
    if not shape.edit:
        return model.sample(labels, shape.schedule, **scalars)
    size = model.config.image_size
    mask = rng.random((shape.batch, size, size)) < rng.random()
    pictures = rng.integers(256, size=(shape.batch, size, size, 3)).astype(np.uint8)
    return model.edit(pictures, mask, labels, shape.schedule, composite=bool(rng.integers(2)), **scalars)


def resident():
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_thousands_of_requests_leave_nothing_behind_and_compile_each_shape_once(quick_compilation, compiled):
    model, rng = lively_model(MODEL), np.random.default_rng(0)
    programs = program.sample._cache_size()
    arrays, memory = [], []
    for number in range(REQUESTS):
        shape = SHAPES[number] if number < len(SHAPES) else SHAPES[rng.integers(len(SHAPES))]
        out = serve(model, shape, rng)
        assert out.images.shape[0] == shape.batch
        if number == WARM:
            warm = list(compiled)
            gc.collect()
            gc.freeze()  # what other tests have left in this process is not to be looked through each time
        if number >= WARM and number % EVERY == 0:
            del out
            gc.collect()
            arrays.append(len(jax.live_arrays()))
            memory.append(resident())
    assert program.sample._cache_size() - programs == len(SHAPES)
    assert compiled.count("jit(sample)") == len(SHAPES)
    assert compiled == warm  # nor anything else
    assert set(arrays) == {arrays[0]}
    half = len(memory) // 2
    assert np.median(memory[half:]) - np.median(memory[:half]) < 4 * 2**20
