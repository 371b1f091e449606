"""What is promised of broken pictures: all are named at once, or left out, as if they had never been there."""

import dataclasses
import logging
import os

import numpy as np
import pytest
from PIL import Image

from hmar_jax.config import DataConfig
from hmar_jax.data.broken import broken
from hmar_jax.data.folder import FolderSource
from hmar_jax.data.pipeline import batches, example_indices, examples
from hmar_jax.data.sources import Sources
from hmar_jax.errors import InputError, TransientError

S, COUNT, BROKEN = 16, 12, (0, 5, 7)


def fill(path, count=COUNT, wrong=BROKEN):
    """Pictures of one grey each, in two classes; some are cut, empty or text."""
    for i in range(count):
        file = path / f"class {i % 2}/{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i,) * 3).save(file)
        if i in wrong:
            file.write_bytes((file.read_bytes()[:50], b"", b"no picture")[i % 3])
    return DataConfig("folder", path=str(path), resize=1.0)


@pytest.fixture
def config(tmp_path):
    return fill(tmp_path / "pictures")


def all_named(message):
    return all(f"{i:02}.png' cannot be read" in message for i in BROKEN)


def test_all_broken_pictures_are_found_with_their_faults(config):
    source = FolderSource(config.path)
    found = broken(source, config)
    assert [os.path.basename(source.name(one.index)) for one in found] == ["00.png", "05.png", "07.png"]
    assert all(one.name in str(one) and "cannot be read" in one.fault for one in found)
    assert found == broken(source, dataclasses.replace(config, workers=1))


@pytest.mark.parametrize(
    "read",
    [
        lambda config: list(examples(config, S, batch_size=2)),
        lambda config: [next(batches(config, batch_size=COUNT, image_size=S, seed=0)) for _ in range(2)],
    ],
    ids=["one pass", "training"],
)
def test_one_broken_picture_has_all_of_them_named(config, read):
    with pytest.raises(
        InputError, match=r"^3 of 12 pictures cannot be used: .* set data\.skip_broken=True\.$"
    ) as caught:
        read(config)
    assert all_named(str(caught.value))
    assert "\n" not in str(caught.value)


def test_of_many_broken_pictures_a_sentence_names_some_and_the_log_all(tmp_path, caplog):
    config = fill(tmp_path, 30, range(25))
    with pytest.raises(InputError, match=r"^25 of 30 .*, and 15 more, which the log names; replace") as caught:
        list(examples(config, S))
    assert str(caught.value).count(".png") == 10
    assert all(f"{i:02}.png" in caplog.text for i in range(25))


def test_broken_pictures_are_left_out_listed_and_counted_once(config, caplog):
    caplog.set_level(logging.WARNING)
    skipping = dataclasses.replace(config, skip_broken=True)
    ((images, labels),) = examples(skipping, S)
    kept = [i for i in [*range(0, COUNT, 2), *range(1, COUNT, 2)] if i not in BROKEN]
    assert (images[0, :, 0, 0, 0] // 20).tolist() == kept
    assert labels.tolist() == [i % 2 for i in kept]
    assert Sources(skipping, S).open().class_names == ("class 0", "class 1")
    assert caplog.messages[0].startswith("3 of 12 pictures are left out")
    assert len(caplog.messages) == 1 + len(BROKEN)
    assert all_named(" ".join(caplog.messages))
    assert all(map(str.isprintable, caplog.messages))


def test_training_without_broken_pictures_is_that_on_a_folder_without_them(config, tmp_path):
    clean = fill(tmp_path / "clean", wrong=())
    for i in BROKEN:
        os.remove(f"{clean.path}/class {i % 2}/{i:02}.png")

    def stream(config, **options):
        iterator = batches(config, batch_size=4, image_size=S, seed=3, **options)
        iterator.set_state({"examples": 8})
        parts = [next(iterator) for _ in range(5)]
        iterator.close()
        return {key: np.concatenate([part[key] for part in parts]) for key in ("image", "label")}

    expected, skipping = stream(clean), dataclasses.replace(config, skip_broken=True)
    for given in (skipping, dataclasses.replace(skipping, workers=1)):
        for key, value in stream(given).items():
            np.testing.assert_array_equal(value, expected[key])
    named = [example_indices(Sources(c, S).open(), c, start=0, count=9, seed=3) for c in (skipping, clean)]
    assert named[0] == named[1]


def test_held_out_pictures_stay_held_out_where_some_are_broken(config):
    def names(part, skip):
        source = Sources(dataclasses.replace(config, held_out=0.4, skip_broken=skip), S).open(part)
        return {source.name(i) for i in range(len(source))}

    wrong = {f"class {i % 2}/{i:02}.png" for i in BROKEN}
    for part in ("train", "validation"):
        assert names(part, True) == names(part, False) - wrong


def test_a_folder_without_a_whole_picture_is_refused(tmp_path):
    config = dataclasses.replace(fill(tmp_path, 3, range(3)), skip_broken=True)
    with pytest.raises(InputError, match=r"None of 3 pictures can be used, such as .*\.png"):
        next(batches(config, batch_size=2, image_size=S, seed=0))


def test_a_disk_that_does_not_answer_is_no_broken_picture(config, monkeypatch):
    monkeypatch.setattr(FolderSource, "__getitem__", lambda *_: (_ for _ in ()).throw(TransientError("lost")))
    with pytest.raises(TransientError):
        len(Sources(dataclasses.replace(config, skip_broken=True), S).open())
