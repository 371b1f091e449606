"""The parts of a source: each example in one of them, by its name alone."""

import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image

from hmar_jax.config import DataConfig
from hmar_jax.data import pipeline
from hmar_jax.data.held_out import PartOfSource
from hmar_jax.data.sources import Sources
from hmar_jax.errors import InputError

SHARE = 0.25


def write_pictures(folder, names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), tuple(hashlib.sha256(name.encode()).digest()[:3])).save(file)


def names_of(source):
    return {source.name(i) for i in range(len(source))}


def parts(folder, share=SHARE):
    config = DataConfig("folder", path=str(folder), held_out=share)
    sources = Sources(config, 16)
    return [sources.open(part) for part in ("train", "validation")]


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path, [f"{kind}/{i}.png" for kind in "ab" for i in range(20)])
    return tmp_path


def test_every_picture_is_in_one_part_which_its_name_decides(folder):
    train, validation = parts(folder)
    assert not names_of(train) & names_of(validation)
    assert names_of(train) | names_of(validation) == {f"{kind}/{i}.png" for kind in "ab" for i in range(20)}
    for name in names_of(validation):
        assert int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 < SHARE
    assert train.class_names == validation.class_names == ("a", "b")
    for source in (train, validation):
        for index in range(len(source)):
            expected = list(hashlib.sha256(source.name(index).encode()).digest()[:3])
            assert source[index]["image"][0, 0].tolist() == expected
            assert source[index]["label"] == "ab".index(source.name(index)[0])


def test_a_picture_stays_in_its_part_when_others_join(folder):
    before = [names_of(part) for part in parts(folder)]
    write_pictures(folder, [f"c/{i}.png" for i in range(20)])
    for old, new in zip(before, parts(folder), strict=True):
        assert old <= names_of(new)


def test_the_lowest_hash_is_held_out_where_none_is_below_the_share(folder):
    train, validation = parts(folder, 1e-9)
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in names_of(train) | names_of(validation)}
    assert names_of(validation) == {min(hashes, key=hashes.get)}


def test_a_folder_of_one_picture_cannot_be_parted(tmp_path):
    write_pictures(tmp_path, ["only.png"])
    with pytest.raises(InputError, match=r"data\.held_out=0\.25 leaves nothing to train on: the source has 1 examples"):
        parts(tmp_path)


def test_without_a_share_the_stream_is_that_of_all_pictures_and_nothing_is_held_out(folder):
    config = DataConfig("folder", path=str(folder))
    assert len(Sources(config, 16).open()) == 40
    assert not Sources(config, 16).has_validation()
    with pytest.raises(InputError, match=r"data\.held_out is 0, so that no picture of '.*' is held out"):
        Sources(config, 16).open("validation")


def test_held_out_glyphs_are_drawn_by_no_training_seed():
    config = DataConfig("glyphs", classes="AB")
    shown = [
        {Sources(config, 16).open(part, seed)[i]["image"].tobytes() for i in range(8)}
        for seed, part in ((0, "validation"), (0, "train"), (1, "train"), (2**32 - 1, "train"))
    ]
    assert all(not shown[0] & others for others in shown[1:])


def test_training_and_held_out_batches_share_no_picture(folder):
    config = DataConfig("folder", path=str(folder), resize=1.0, held_out=SHARE)
    sources, seen = Sources(config, 16), {}
    for part in ("train", "validation"):
        source = sources.open(part)
        size = len(source)
        batches = pipeline.batches(config, batch_size=size, image_size=16, seed=0, source=source)
        seen[part] = {tuple(image[0, 0]) for image in next(batches)["image"]}
        batches.close()
        assert len(seen[part]) == size  # an epoch
    assert not seen["train"] & seen["validation"]


def test_a_part_goes_to_worker_processes(folder):
    _, validation = parts(folder)
    again = pickle.loads(pickle.dumps(validation))
    assert names_of(again) == names_of(validation)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match=r"data\.held_out is .*; expected a share from 0 to below 1"):
        DataConfig("folder", held_out=share)


def test_half_of_many_names_are_held_out_by_a_half():
    class Numbers:
        class_names = ("all",)

        def __len__(self):
            return 2000

        def __getitem__(self, index):
            return {"label": np.int32(0)}

        def name(self, index):
            return str(index)

    assert len(PartOfSource(Numbers(), "validation", 0.5)) == pytest.approx(1000, abs=100)
