"""What the pipeline promises: the same stream for any process count, worker count and interruption; honest crops."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hmar_jax.config import DataConfig
from hmar_jax.data.glyphs import Glyphs
from hmar_jax.data.pipeline import ahead, batches, example_indices, examples
from hmar_jax.data.sources import Sources
from hmar_jax.data.tokens import write_token_cache
from hmar_jax.errors import InputError
from hmar_jax.scales import ScaleLadder

S = 16
COUNT = 10
LADDER = ScaleLadder((1, 2, 3))


def picture(i):
    """Picture i is grey level 20·i + x + y: smooth, so that a pixel tells picture and place."""
    height, width = 30 + i, 40 - i
    ramp = 20 * i + np.add.outer(np.arange(height), np.arange(width)) // 4
    return Image.fromarray(np.stack([ramp.astype(np.uint8)] * 3, axis=-1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        (path / f"class{i // 5}").mkdir(exist_ok=True)
        picture(i).save(path / f"class{i // 5}/{i:02d}.png")
    return DataConfig(source="folder", path=str(path))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Ten images of three crops; every token of image i, crop c is 4·i + c."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    tokens = np.broadcast_to((4 * np.arange(COUNT) + np.arange(3)[:, None])[..., None], (3, COUNT, LADDER.length))
    fields = {"class_names": "ab", "tokenizer": "sha:1", "source": "test", "codebook_size": 64, "crops": 3}
    write_token_cache(path, [(tokens, np.arange(COUNT) % 2)], ladder=LADDER, **fields)
    return DataConfig(source="tokens", path=str(path))


@pytest.fixture(params=["glyphs", "folder", "tokens"])
def config(request, folder, cache):
    return {"glyphs": DataConfig(), "folder": folder, "tokens": cache}[request.param]


def take(config, steps, *, start=0, batch_size=4, seed=7, **options):
    """The batches of `steps` steps, joined: {"image" or "tokens": (steps·b, …), "label": (steps·b,)}."""
    iterator = batches(config, batch_size=batch_size, image_size=S, seed=seed, **options)
    iterator.set_state({"examples": start * batch_size})
    parts = list(itertools.islice(iterator, steps))
    iterator.close()
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def which(batch):
    """Which pictures or images of the cache a batch shows."""
    if "tokens" in batch:
        return batch["tokens"][:, 0] // 4
    return batch["image"].reshape(len(batch["image"]), -1).min(1) // 20


def test_batches_have_the_promised_shapes_and_types(config):
    batch = take(config, 1)
    key, shape, dtype = ("image", (4, S, S, 3), np.uint8)
    if config.source == "tokens":
        key, shape, dtype = ("tokens", (4, LADDER.length), np.int32)
    assert set(batch) == {key, "label"}
    assert (batch[key].shape, batch[key].dtype) == (shape, dtype)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)


def test_the_stream_is_a_function_of_the_seed(config):
    assert_equal(take(config, 5), take(config, 5))
    key = "tokens" if config.source == "tokens" else "image"
    assert not np.array_equal(take(config, 5)[key], take(config, 5, seed=8)[key])


@pytest.mark.parametrize("rows", [[0, 1], [3], [0, 2], [2, 1, 3], [0, 1, 2, 3]])
def test_chosen_rows_are_those_of_the_global_batch(config, rows):
    whole, size = take(config, 3), len(rows)
    part = take(config, 3, rows=rows)
    for step in range(3):
        at = [4 * step + row for row in rows]
        assert_equal(
            {key: value[step * size :][:size] for key, value in part.items()}, {k: v[at] for k, v in whole.items()}
        )


def test_batches_made_ready_ahead_are_the_same_with_the_same_positions(config):
    plain = batches(config, batch_size=4, image_size=S, seed=7)
    data = batches(config, batch_size=4, image_size=S, seed=7)
    made = []
    feed = ahead(data, lambda batch: made.append(None) or batch)
    for _ in range(5):
        batch, position = next(feed)
        assert_equal(batch, next(plain))
        assert position == plain.get_state()
    feed.close()
    assert 5 <= len(made) <= 8
    data.close()


def test_a_failure_ahead_is_raised_in_its_turn(config):
    data = batches(config, batch_size=4, image_size=S, seed=7)
    numbers = itertools.count()
    feed = ahead(data, lambda _: 1 / (2 - next(numbers)))
    assert [next(feed)[0], next(feed)[0]] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(feed)
    data.close()


def test_a_restored_iterator_goes_on_bit_equal(config):
    iterator = batches(config, batch_size=4, image_size=S, seed=7)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    fresh = batches(config, batch_size=4, image_size=S, seed=7)
    fresh.set_state(state)
    assert fresh.get_state() == state == {"examples": 12}
    for batch in expected:
        assert_equal(next(fresh), batch)
    iterator.set_state(state)  # back again, on an iterator that has read ahead
    assert_equal(next(iterator), expected[0])
    assert iterator.get_state() == {"examples": 16}


def test_a_state_suits_another_batch_size_that_divides_it_and_no_other(cache):
    expected = take(cache, 2, start=3)
    iterator = batches(cache, batch_size=2, image_size=S, seed=7)
    iterator.set_state({"examples": 12})
    np.testing.assert_array_equal(np.concatenate([next(iterator)["tokens"] for _ in range(4)]), expected["tokens"])
    with pytest.raises(InputError, match=r"example 3.*batch_size=2"):
        iterator.set_state({"examples": 3})


@pytest.mark.parametrize("source", ["folder", "tokens"])
def test_workers_change_nothing_not_even_the_state_and_leave_ctrl_c_to_the_program(source, folder, cache):
    config = {"folder": folder, "tokens": cache}[source]
    expected = take(config, 5)
    iterator = batches(dataclasses.replace(config, workers=2), batch_size=4, image_size=S, seed=7)
    iterator.set_state({"examples": 8})
    parts = [next(iterator) for _ in range(2)]  # one of each worker
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    parts.append(next(iterator))
    assert iterator.get_state() == {"examples": 20}
    iterator.close()
    joined = {key: np.concatenate([part[key] for part in parts]) for key in expected}
    assert_equal(joined, {key: value[8:] for key, value in expected.items()})


@pytest.mark.parametrize("batch_size", [4, 20])
@pytest.mark.parametrize("source", ["folder", "tokens"])
def test_every_epoch_shows_each_example_once_in_another_order(source, batch_size, folder, cache):
    shown = which(take({"folder": folder, "tokens": cache}[source], 60 // batch_size, batch_size=batch_size))
    epochs = shown.reshape(6, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("source", ["glyphs", "folder", "tokens"])
@settings(max_examples=10)
@given(
    start=st.integers(0, 8),
    steps=st.integers(1, 4),
    batch_size=st.sampled_from([1, 4, 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_examples_named_are_those_delivered(source, start, steps, batch_size, seed, folder, cache):
    config = {"glyphs": DataConfig(), "folder": dataclasses.replace(folder, crop="center"), "tokens": cache}[source]
    batch = take(config, steps, start=start, batch_size=batch_size, seed=seed)
    span = {"start": start * batch_size, "count": steps * batch_size}
    opened = Sources(config, S).open(seed=seed)
    indices = example_indices(opened, config, **span, seed=seed)
    assert all(type(i) is int for i in indices)
    assert batch["label"].tolist() == [opened[i]["label"] for i in indices]
    match source:
        case "glyphs":
            assert indices == list(range(span["start"], span["start"] + span["count"]))
            np.testing.assert_array_equal(batch["image"], [opened[i]["image"] for i in indices])
        case "folder":
            ((central,), _) = next(examples(config, S))
            np.testing.assert_array_equal(batch["image"], central[indices])
        case "tokens":
            crops = [opened[i]["tokens"].tolist() for i in indices]
            assert all(crop in three for crop, three in zip(batch["tokens"].tolist(), crops, strict=True))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_examples_named_in_any_part_of_the_stream_are_those_of_the_whole(seed, folder):
    source = Sources(folder, S).open()

    def named(start, count):
        return example_indices(source, folder, start=start, count=count, seed=seed)

    whole = named(0, 5 * COUNT)
    assert all(sorted(whole[at : at + COUNT]) == list(range(COUNT)) for at in range(0, 5 * COUNT, COUNT))
    for start, count in ((0, 0), (3, 4), (COUNT - 1, 2), (17, 25), (5 * COUNT, 0)):
        assert named(start, count) == whole[start : start + count]


def test_labels_stay_with_their_examples(folder, cache):
    images, tokens = take(folder, 5), take(cache, 5)
    np.testing.assert_array_equal(images["label"], which(images) // 5)
    np.testing.assert_array_equal(tokens["label"], which(tokens) % 2)


def test_every_visit_draws_one_of_the_cached_crops(cache):
    crops = take(cache, 75)["tokens"] % 4
    assert (crops == crops[:, :1]).all()
    assert (np.bincount(crops[:, 0], minlength=3) > 300 / 3 * 0.7).all()


def test_every_visit_crops_anew_inside_the_picture(folder):
    batch = take(dataclasses.replace(folder, resize=1.5), 30)
    corners = {}
    for i, image in zip(which(batch), batch["image"], strict=True):
        corners.setdefault(int(i), set()).add(int(image[0, 0, 0]))
    assert all(len(values) > 2 for values in corners.values())


def test_the_central_crop_is_the_middle_of_the_resized_picture(folder):
    config = dataclasses.replace(folder, resize=1.25, crop="center")
    images = np.concatenate([images[0] for images, _ in examples(config, S)])
    for i, image in enumerate(images):
        whole = picture(i)
        scale = 20 / min(whole.size)  # 20 = 1.25 · S
        size = tuple(round(side * scale) for side in whole.size)
        left, top = ((side - S) // 2 for side in size)
        expected = np.asarray(whole.resize(size, Image.Resampling.LANCZOS))[top : top + S, left : left + S]
        assert np.abs(image.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [16, 64])
def test_a_picture_is_scaled_up_or_down_to_the_models_size(folder, size):
    images, _ = next(iter(examples(dataclasses.replace(folder, resize=1.0), size, count=1)))
    assert images.shape == (1, 1, size, size, 3)
    assert np.ptp(images) >= 10  # 30 of the ramp's 34 pixels each way, in steps of 1 per 4


def test_half_of_the_pictures_are_mirrored_when_asked(folder):
    # The ramp rises to the right; mirrored, it falls.
    def falls(config):
        images = take(config, 50)["image"].astype(int)
        return (images[:, 8, 0, 0] > images[:, 8, -1, 0]).mean()

    assert falls(folder) == 0
    assert 0.35 < falls(dataclasses.replace(folder, flip=True)) < 0.65


def test_glyphs_are_drawn_at_size_and_never_cut():
    batch = take(DataConfig(resize=2.0), 2)
    source = Glyphs(size=S, seed=7)
    for i in range(8):
        np.testing.assert_array_equal(batch["image"][i], source[i]["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_is_an_input_error_every_time_it_is_asked_for(tmp_path, workers):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    config = DataConfig(source="folder", path=str(tmp_path), workers=workers)
    iterator = batches(config, batch_size=2, image_size=S, seed=0)
    for _ in range(1 if workers else 2):
        with pytest.raises(InputError, match=r"2 of 2 pictures .*a\.png' cannot be read .*b\.png' cannot") as caught:
            next(iterator)
        assert type(caught.value) is InputError
        assert iterator.get_state() == {"examples": 0}
    iterator.close()


def test_a_program_may_end_in_the_middle_of_a_stream(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
from hmar_jax.config import DataConfig
from hmar_jax.data.pipeline import batches
if __name__ == "__main__":
    iterator = batches(DataConfig(workers=1), batch_size=64, image_size=32, seed=0)
    batch = next(iterator)
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_iterator_says_so():
    iterator = batches(DataConfig(), batch_size=2, image_size=S, seed=0)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_one_pass_shows_all_in_order_whatever_the_batch(folder, batch_size):
    parts = list(examples(folder, S, crops=2, batch_size=batch_size))
    assert [images.shape for images, _ in parts] == [
        (2, min(batch_size, COUNT - at), S, S, 3) for at in range(0, COUNT, batch_size)
    ]
    images, labels = (np.concatenate(p, axis) for p, axis in zip(zip(*parts, strict=True), (1, 0), strict=True))
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert labels.tolist() == [i // 5 for i in range(COUNT)]
    for crop in images:
        assert which({"image": crop}).tolist() == list(range(COUNT))
    assert (images[0] != images[1]).any(axis=(1, 2, 3)).all()
    again = np.concatenate([images for images, _ in examples(folder, S, crops=2, batch_size=7)], axis=1)
    np.testing.assert_array_equal(images, again)


def test_one_pass_mirrors_every_other_crop(folder):
    config = dataclasses.replace(folder, flip=True, crop="center")
    ((images, _),) = examples(config, S, crops=2)
    np.testing.assert_array_equal(images[0], images[1][:, :, ::-1])
    first = images[0].astype(int)
    assert 0 < (first[:, 8, 0, 0] > first[:, 8, -1, 0]).sum() < COUNT


def test_one_pass_over_glyphs_draws_each_class_again_for_every_crop():
    ((images, labels),) = examples(DataConfig(classes="abc"), S, crops=3, count=8, seed=4)
    source = Glyphs("abc", S, 4)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for crop, i in itertools.product(range(3), range(8)):
        np.testing.assert_array_equal(images[crop, i], source[9 * crop + i]["image"])


def test_one_pass_may_stop_early_and_use_workers(folder):
    config = dataclasses.replace(folder, workers=1)
    ((images, labels),) = examples(config, S, count=7)
    assert len(labels) == 7
    ((expected, _),) = examples(folder, S, count=7)
    np.testing.assert_array_equal(images, expected)
