"""What a TFDS source promises: examples by name and split without TensorFlow, and a sentence for every fault."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tfds_datasets import LABEL, encoded, pictures, prepare

from hmar_jax.config import DataConfig
from hmar_jax.data import pipeline
from hmar_jax.data.tfds import TfdsSource
from hmar_jax.errors import InputError


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


# --- files that are damaged or made to harm


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a good dataset of two examples, to be copied and damaged."""
    path = tmp_path_factory.mktemp("small")
    prepare(path, "small", LABEL, [{"image": encoded(p), "label": i} for i, p in enumerate(pictures(2))])
    return path


@pytest.fixture
def harmed(small, tmp_path):
    """A copy of the dataset: (data directory, folder of the version)."""
    data = shutil.copytree(small, tmp_path / "data")
    return data, data / "small/1.0.0"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module whose import would leave a trace, for which each test that uses it looks."""
    (tmp_path / "leaves_a_trace.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    yield "leaves_a_trace"
    assert not (tmp_path / "trace").exists()
    assert "leaves_a_trace" not in sys.modules


IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
TEXT = "tensorflow_datasets.core.features.text_feature.Text"
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


def features_of(name, more):
    return {"pythonClassName": DICT, "featuresDict": {"features": {"image": {"pythonClassName": name}, "more": more}}}


NESTED = {
    "top": lambda name: {"pythonClassName": name},
    "snake": lambda name: {"python_class_name": name, "featuresDict": {}},
    "feature": lambda name: features_of(name, {}),
    "sequence": lambda name: features_of(
        IMAGE, {"pythonClassName": DICT, "sequence": {"feature": features_of(name, {})}}
    ),
    "text": lambda name: features_of(
        IMAGE, {"pythonClassName": DICT, "jsonFeature": {"json": json.dumps({"a": {"type": name, "content": {}}})}}
    ),
    "legacy": lambda name: {"type": name, "content": {}},
    "legacy in legacy": lambda name: {"type": DICT, "content": {"a": {"type": name, "content": {}}}},
    "legacy as text": lambda name: {
        "type": DICT,
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"a": {"pythonClassName": name}}}),
    },
}


@pytest.mark.parametrize("name", ["leaves_a_trace.X", "this.X", "antigravity.X", "os.system", "X", "", IMAGE + "\n"])
@pytest.mark.parametrize("place", NESTED)
def test_a_feature_class_that_is_not_of_tfds_is_refused_and_its_module_not_imported(harmed, module, place, name):
    data, folder = harmed
    (folder / "features.json").write_text(json.dumps(NESTED[place](name)))
    sys.modules.pop("this", None)
    with pytest.raises(InputError, match=r"has a feature of the class .*; expected classes of TFDS itself") as caught:
        TfdsSource("small", str(data))
    assert str(caught.value).isprintable()
    assert not {"this", "antigravity"} & sys.modules.keys()


@pytest.mark.parametrize("version", ["", ":1.0.0", ":1.*.*"])
def test_the_code_of_a_dataset_is_not_run_and_its_module_not_imported(harmed, module, version):
    data, folder = harmed
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"moduleName": module}))
    (data / "small/small.py").write_text(f"import {module}")
    assert len(TfdsSource(f"small{version}", str(data))) == 2


def _edit(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _replace(pattern, make):
    def apply(folder):
        (file,) = folder.glob(pattern)
        file.unlink()
        make(file)

    return apply


def _features(content):
    return content["featuresDict"]["features"]


HARMS = {
    "deep features": (_write("features.json", b'{"a":' * 5000), "not JSON"),
    "features 7": (_write("features.json", b"7"), "no JSON objects"),
    "deep info": (_write("dataset_info.json", b"[" * 100_000), "not JSON"),
    "info null": (_write("dataset_info.json", b"null"), "no JSON objects"),
    "info a list": (_edit("dataset_info.json", lambda info: info.update(splits=7)), "cannot open dataset 'small'"),
    "no features": (lambda folder: (folder / "features.json").unlink(), "no prepared TFDS dataset"),
    "a pipe of features": (_replace("features.json", os.mkfifo), "no regular file"),
    "a pipe of labels": (_replace("label.labels.txt", os.mkfifo), "no regular file"),
    "a pipe of records": (_replace("*train*", os.mkfifo), "no regular file"),
    "a link to itself": (_replace("*train*", lambda file: file.symlink_to(file)), "symbolic link|Too many levels"),
    "a device": (_replace("*train*", lambda file: file.symlink_to("/dev/zero")), "no regular file"),
    "names elsewhere": (
        _edit("features.json", lambda of: _features(of).update(label={"type": TEXT, "content": {"names_file": "/x"}})),
        "names are in another file, '/x'",
    ),
    "a name that is a path": (
        _edit("features.json", lambda of: _features(of).update({"../../x": {"pythonClassName": TEXT}})),
        r"feature of the name '\.\./\.\./x'",
    ),
    "a name that is a pattern": (
        _edit("features.json", lambda of: _features(of).update({"**": {"pythonClassName": TEXT}})),
        r"feature of the name '\*\*'",
    ),
    "records elsewhere": (
        _edit("dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate="../../{SPLIT}")),
        "has a file .* elsewhere|cannot open|cannot be read",
    ),
    "a billion classes": (
        lambda folder: (
            (folder / "label.labels.txt").unlink(),
            _edit("features.json", lambda of: _features(of)["label"]["classLabel"].update(numClasses=10**9))(folder),
        ),
        "has 1000000000 classes",
    ),
    "parquet": (_edit("dataset_info.json", lambda info: info.update(fileFormat="parquet")), "array_record"),
    "unknown format": (_edit("dataset_info.json", lambda info: info.update(fileFormat="x")), "cannot"),
    "names twice": (_write("label.labels.txt", b"cat\ncat\n"), "has 2 names, not 2 distinct ones"),
    "too few names": (_write("label.labels.txt", b"cat\n"), "has 1 names, not 2 distinct ones"),
    "names not UTF-8": (_write("label.labels.txt", b"cat\n\xff\n"), "not UTF-8"),
    "fewer examples": (
        _edit("dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["1"])),
        "has 2 examples, not 1",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_dataset_is_one_sentence(harmed, harm):
    data, folder = harmed
    make, expected = HARMS[harm]
    make(folder)
    with pytest.raises(InputError, match=expected) as caught:
        TfdsSource("small", str(data))[0]
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ["huggingface:small", "../small", "small/../small", "small/a=True", "a\nb", "/", "é" * 300]
)
def test_a_name_that_is_no_name_is_refused(small, name):
    with pytest.raises(InputError, match=r"TFDS has no dataset|too long|could not be read"):
        TfdsSource(name, str(small))


def test_a_flipped_byte_of_the_records_is_refused(harmed):
    data, folder = harmed
    (file,) = folder.glob("*train*")
    whole, good = file.read_bytes(), list(TfdsSource("small", str(data)))
    at = whole.index(b"IHDR") + 30
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(InputError, match="cannot be read"):
        list(TfdsSource("small", str(data)))
    file.write_bytes(whole)
    assert len(good) == 2


def test_a_picture_beside_the_image_is_not_opened(tmp_path):
    """TFDS would have Pillow open it in any format."""
    more = {"mask": tfds.features.Image()}
    good = encoded(Image.new("RGB", (8, 8)))
    prepare(
        tmp_path, "two", LABEL | more, [{"image": good, "mask": io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "label": 1}]
    )
    assert TfdsSource("two", str(tmp_path))[0]["image"].shape == (8, 8, 3)


def test_features_beside_image_and_label_may_have_any_name_that_tfds_gives(tmp_path):
    boxes = tfds.features.Sequence({"box": tfds.features.BBoxFeature()})
    more = {"image/filename": tfds.features.Text(), "objects": boxes}
    example = {"image": encoded(Image.new("RGB", (8, 8))), "label": 1, "image/filename": "a/b.png", "objects": []}
    prepare(tmp_path, "named", LABEL | more, [example])
    assert TfdsSource("named", str(tmp_path))[0]["label"] == 1


def test_several_configs_are_named(small, tmp_path):
    for config in ("a", "b"):
        shutil.copytree(small / "small/1.0.0", tmp_path / "small" / config / "1.0.0")
    with pytest.raises(InputError, match=r"several configs; set data\.name to one of them: 'small/a', 'small/b'"):
        TfdsSource("small", str(tmp_path))
    with pytest.raises(InputError, match=r"not prepared|no dataset"):
        TfdsSource("small/c", str(tmp_path))
