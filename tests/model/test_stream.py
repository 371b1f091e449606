"""`Model.stream`: an event for each finished scale while the program runs; a loop that is left early leaves nothing."""

import dataclasses
import gc
import os
import pickle
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from tiny_models import lively_model, tiny

from hmar_jax.model import Model
from hmar_jax.sampling import program, progress
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder

LABELS = [0, 3, 4]


@pytest.fixture(scope="module")
def small():
    """A model of two scales, which compiles soon."""
    return lively_model(dataclasses.replace(tiny(depth=2), ladder=ScaleLadder((1, 3))))


def tokens_of(events):
    return np.concatenate([event.tokens for event in events], axis=1)


def test_each_scale_comes_in_order_with_its_tokens_and_the_picture_so_far(small):
    plain = small.sample(LABELS, "equal:3@2", seed=2)
    events = list(small.stream(LABELS, "equal:3@2", seed=2))
    assert [(event.scale, event.step) for event in events] == [(0, 0), (1, 2)]
    np.testing.assert_array_equal(tokens_of(events), plain.tokens)
    assert {(event.tokens.dtype, event.images.dtype) for event in events} == {(np.dtype("int32"), np.dtype("float32"))}
    growth = np.asarray(small.tokenizer.growth(plain.tokens)) / 2 + 0.5
    np.testing.assert_allclose([event.images for event in events], growth, atol=1e-5)
    np.testing.assert_allclose(events[-1].images, plain.images, atol=1e-5)


def test_without_images_nothing_is_decoded(small, monkeypatch):
    monkeypatch.setattr(type(small.tokenizer), "decode_until", None)
    events = list(small.stream("d", per_label=3, decode=False))
    assert [event.images for event in events] == [None, None]
    np.testing.assert_array_equal(tokens_of(events), small.sample([3] * 3, decode=False).tokens)


@pytest.fixture
def compiled():
    """The samplers that are compiled meanwhile, in any thread."""
    found = []

    def listen(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration") and fun_name == "jit(sample)":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_program_serves_all_streams(small, compiled):
    list(small.stream(LABELS, decode=False))
    compiled.clear()
    events = [list(small.stream(LABELS, seed=seed, decode=False)) for seed in range(3)]
    assert not compiled
    assert len({tokens_of(each).tobytes() for each in events}) == 3


def test_what_jax_is_told_in_the_callers_thread_holds_for_the_program(small, compiled):
    """A precision is part of a program, so that without it another is compiled, and with it again none."""
    list(small.stream(LABELS, seed=2))
    compiled.clear()
    for programs in (1, 0):
        with jax.default_matmul_precision("highest"), jax.default_device(jax.devices()[-1]):
            events = list(small.stream(LABELS, seed=2))
        assert len(compiled) == programs
        compiled.clear()
    list(small.stream(LABELS, seed=2))
    assert not compiled
    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices()[-1]):
        plain = small.sample(LABELS, seed=2)
    np.testing.assert_array_equal(tokens_of(events), plain.tokens)
    np.testing.assert_allclose(events[-1].images, plain.images, atol=1e-5)


def test_a_check_for_nan_in_the_callers_thread_sees_the_program(small):
    broken = Model(small.config, jax.tree.map(lambda x: x * np.nan, small.params))
    for draw in (broken.sample, lambda *args, **options: list(broken.stream(*args, **options))):
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="invalid value"):
            draw(LABELS, seed=2)


@pytest.mark.parametrize("leave", ["break", "error", "close", "forgotten", "elsewhere", "not begun"])
def test_a_loop_that_is_left_early_leaves_nothing(small, leave):
    events = small.stream(LABELS, seed=2, decode=False)
    first = None if leave == "not begun" else next(events)
    if leave == "error":
        with pytest.raises(LookupError, match="no place to draw"):
            for _ in events:
                raise LookupError("no place to draw")
    elif leave == "break":
        for _ in events:
            break
    elif leave == "close":
        events.close()
    elif leave == "elsewhere":  # as the garbage collector does
        thread = threading.Thread(target=events.close)
        thread.start()
        thread.join()
    del events
    gc.collect()
    assert not progress._mailboxes
    again = list(small.stream(LABELS, seed=2, decode=False))
    assert len(again) == 2
    if first:
        np.testing.assert_array_equal(first.tokens, again[0].tokens)


def test_a_model_is_pickled_while_it_draws(small):
    events = small.stream(LABELS, seed=2)
    first = next(events)
    again = pickle.loads(pickle.dumps(small))
    assert len(list(events)) == 1
    np.testing.assert_array_equal(next(again.stream(LABELS, seed=2)).images, first.images)


def test_an_error_of_the_program_is_the_callers():
    def run(ticket):
        raise LookupError("out of memory")

    with pytest.raises(LookupError, match="out of memory"):
        list(progress.posts(run))
    assert not progress._mailboxes


def test_a_program_has_callbacks_and_a_decoder_only_where_they_are_wanted(small):
    schedule = Schedule.preset("next-scale", small.config.ladder)

    def text(**options):
        request = program.Request.of(small.config, "float32", schedule, small.params, np.zeros(2), **options)
        return program.sample.lower(request).as_text()

    assert len(re.findall("callback", text())) == 0
    assert len(re.findall("custom_call.*callback", text(ticket=np.uint32(0)))) == 2
    convolutions = [len(re.findall("stablehlo.convolution", text(decode=decode))) for decode in (True, False)]
    assert convolutions[0] > convolutions[1]


_ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
import hmar_jax
from hmar_jax.sampling import progress
assert jax.device_count() == 8
labels = np.arange(11) % 5
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for model in (hmar_jax.from_pretrained(sys.argv[1]), hmar_jax.from_pretrained(sys.argv[1], mesh=mesh)):
    for seed in range(3):
        out = model.sample(labels, seed=seed)
        events = list(model.stream(labels, seed=seed))
        assert [event.scale for event in events] == [0, 1], events
        np.testing.assert_array_equal(np.concatenate([event.tokens for event in events], axis=1), out.tokens)
        np.testing.assert_allclose(events[-1].images, out.images, atol=1e-5)
    for event in model.stream(labels):
        assert model.tokenizer.growth(out.tokens).shape[1] == 11
        break
    assert not progress._mailboxes
    np.testing.assert_array_equal(model.sample(labels, seed=2, batch_size=5).tokens, out.tokens)
    print(out.tokens.sum())
assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(model.params))
other = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
with jax.set_mesh(other):
    np.testing.assert_array_equal(model.sample(labels, seed=2).tokens, out.tokens)
"""


def test_eight_devices_draw_as_one_does(small, tmp_path):
    small.save(tmp_path / "model", source="a test")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "error", "-c", _ON_EIGHT_DEVICES, tmp_path / "model"]
    finished = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300, check=False
    )
    expected = f"{small.sample(np.arange(11) % 5, seed=2).tokens.sum()}\n" * 2
    assert (finished.returncode, finished.stdout) == (0, expected), finished.stderr
