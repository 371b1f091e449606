"""What a TFDS source promises: examples by name and split without TensorFlow, and a sentence for every fault."""

import dataclasses
import io
import json
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from hmar_jax.config import DataConfig
from hmar_jax.data import pipeline
from hmar_jax.data.tfds import TfdsSource
from hmar_jax.errors import InputError


def encoded(picture):
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data


def pictures(count):
    return [
        Image.new("L" if i == 3 else "RGB", (10 + i, 8), 20 * i if i == 3 else (20 * i, 0, 0)) for i in range(count)
    ]


LABEL = {"label": tfds.features.ClassLabel(names=["cat", "dog"])}


def prepare(path, name, features, examples):
    """Prepares a dataset whose code TFDS does not know afterwards: only its files are found."""
    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            url_infos = None  # or else TFDS looks for checksums beside this test

            def _info(self):
                image = {"image": tfds.features.Image()}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(image | features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(), "test": self._generate_examples(2)}

            def _generate_examples(self, count=None):
                yield from enumerate({**e, "image": io.BytesIO(e["image"].getvalue())} for e in examples[:count])

        Tiny.name = name
        Tiny(data_dir=path, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A TFDS data directory of small datasets, one good and three that cannot be used."""
    path = tmp_path_factory.mktemp("tfds")
    tiny = [{"image": encoded(p), "label": i % 2, "file": f"{i}"} for i, p in enumerate(pictures(6))]
    prepare(path, "tiny", LABEL | {"file": tfds.features.Text()}, tiny)
    prepare(path, "unlabelled", LABEL, [{"image": encoded(p), "label": -1} for p in pictures(2)])
    prepare(path, "broken", LABEL, [{"image": io.BytesIO(b"no picture"), "label": 0} for _ in range(2)])
    prepare(path, "nolabel", {}, [{"image": encoded(p)} for p in pictures(2)])
    return path


def test_examples_come_by_name_without_tensorflow(data):
    source = TfdsSource("tiny", str(data))
    assert source.class_names == ("cat", "dog")
    examples = sorted((source[i] for i in range(len(source))), key=lambda example: example["image"].shape[1])
    assert [int(example["label"]) for example in examples] == [0, 1, 0, 1, 0, 1]
    assert examples[0]["label"].dtype == np.int32
    for example, picture in zip(examples, pictures(6), strict=True):
        assert example["image"].dtype == np.uint8
        np.testing.assert_array_equal(example["image"], np.asarray(picture.convert("RGB")))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("split", "length"), [("train", 6), ("test", 2), ("train[:50%]", 3), ("train[1:5]", 4)])
def test_a_split_may_be_sliced(data, split, length):
    source = TfdsSource("tiny", str(data), split)
    assert len(list(source)) == len(source) == length


def test_slices_of_a_split_are_disjoint(data):
    parts = [list(TfdsSource("tiny", str(data), split)) for split in ("train[:50%]", "train[50%:]")]
    widths = sorted(example["image"].shape[1] for part in parts for example in part)
    assert widths == [10, 11, 12, 13, 14, 15]


def test_a_source_travels_to_another_process(data):
    source = TfdsSource("tiny", str(data), "train[2:]")
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 4
    np.testing.assert_array_equal(again[1]["image"], source[1]["image"])


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("nonsense", "train", "no dataset 'nonsense'"),
        ("tiny:9.9.9", "train", "tiny:9.9.9"),
        ("tiny/config", "train", "tiny/config"),
        ("", "train", "data.name"),
        ("tiny", "validation", "validation.*it has.*train"),
        ("tiny", "train[90%", r"train\[90%"),
        ("tiny", "train[3:3]", r"train\[3:3\]"),
        ("nolabel", "train", "has image, not an 'image' and a class 'label'"),
        ("mnist", "train", r"not prepared.*`tfds build mnist --file_format=array_record --data_dir="),
        ("imagenet2012", "train", r"`tfds build imagenet2012 --file_format=array_record --manual_dir="),
    ],
)
def test_what_cannot_be_opened_is_named(data, name, split, message):
    with pytest.raises(InputError, match=message) as caught:
        TfdsSource(name, str(data), split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("unlabelled", "label -1"), ("broken", "cannot be read")])
def test_an_example_that_cannot_be_used_is_named(data, name, message):
    with pytest.raises(InputError, match=f"Example 1 of '{name}'.*{message}"):
        TfdsSource(name, str(data))[1]


def test_a_dataset_prepared_as_tfrecord_says_how_to_convert_it(tmp_path):
    prepare(tmp_path, "old", LABEL, [{"image": encoded(p), "label": 0} for p in pictures(2)])
    file = tmp_path / "old/1.0.0/dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match=r"tfrecord.*tfds convert_format --dataset_version_dir=\S*old/1.0.0 --out"):
        TfdsSource("old", str(tmp_path))


def test_a_cut_file_is_named(tmp_path):
    prepare(tmp_path, "cut", LABEL, [{"image": encoded(p), "label": 0} for p in pictures(2)])
    (file,) = (tmp_path / "cut/1.0.0").glob("*train*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="'cut'"):
        list(TfdsSource("cut", str(tmp_path)))


def test_broken_examples_are_all_named_or_left_out(tmp_path):
    good = encoded(Image.new("RGB", (8, 8)))
    mixed = [{"image": io.BytesIO(b"no picture") if i in (1, 3) else good, "label": i % 2} for i in range(5)]
    prepare(tmp_path, "mixed", LABEL, mixed)
    config = DataConfig("tfds", path=str(tmp_path), name="mixed")
    with pytest.raises(InputError, match=r"^2 of 5 pictures cannot be used: Example . of 'mixed'.*Example . of 'mi"):
        list(pipeline.examples(config, 8))
    ((images, _),) = pipeline.examples(dataclasses.replace(config, skip_broken=True), 8)
    assert images.shape == (1, 3, 8, 8, 3)
