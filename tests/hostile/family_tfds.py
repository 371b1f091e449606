"""A prepared TFDS dataset, damaged: its examples are those that were written, or a sentence; no module is imported."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import damaged, odd_json
from tfds_datasets import LABEL, encoded, pictures, prepare

from hmar_jax.data.tfds import TfdsSource
from hmar_jax.errors import HmarError

FILES = ("features.json", "dataset_info.json", "label.labels.txt", "small-train.array_record-00000-of-00001")
MODULES = ("this", "antigravity", "turtledemo", "leaves_a_trace")


def opened(path):
    """Examples and class names of the training split."""
    source = TfdsSource("small", str(path))
    return [(example["image"].tolist(), int(example["label"])) for example in source], source.class_names


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    prepare(path, "small", LABEL, [{"image": encoded(p), "label": i} for i, p in enumerate(pictures(2))])
    return path, opened(path)


def check(whole, name, content):
    """Opens a copy in which a file has other content: the same examples, or a sentence."""
    path, expected = whole
    with tempfile.TemporaryDirectory() as parent:
        copy = shutil.copytree(path, Path(parent) / "copy")
        (copy / "small/1.0.0" / name).write_bytes(content)
        try:
            found = opened(copy)
        except HmarError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 700
        else:
            assert found[0] == expected[0]
            assert len(found[1]) == 2
            if name != "label.labels.txt":
                assert found[1] == expected[1]
    assert not set(MODULES) & sys.modules.keys()


@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_damaged_dataset_gives_the_examples_that_were_written_or_a_sentence(whole, data, name):
    content = (whole[0] / "small/1.0.0" / name).read_bytes()
    check(whole, name, data.draw(damaged(content.rstrip(b"\0"))) + content[len(content.rstrip(b"\0")) :])


@given(data=st.data(), name=st.sampled_from(FILES[:2]))
def test_odd_metadata_give_the_examples_that_were_written_or_a_sentence(whole, data, name):
    content = json.loads((whole[0] / "small/1.0.0" / name).read_bytes())
    check(whole, name, data.draw(odd_json(content)))


@given(module=st.sampled_from(MODULES), key=st.sampled_from(["pythonClassName", "python_class_name", "type"]))
@example(module="os", key="type")
def test_no_module_is_imported(whole, module, key):
    content = (whole[0] / "small/1.0.0/features.json").read_text()
    for place in range(content.count("pythonClassName")):
        parts = content.split('"pythonClassName": "')
        parts[place + 1] = f"{module}.X" + parts[place + 1][parts[place + 1].index('"') :]
        changed = '"pythonClassName": "'.join(parts).replace("pythonClassName", key)
        check(whole, "features.json", changed.encode())


def test_the_undamaged_dataset_is_read(whole):
    examples, names = whole[1]
    assert [label for _, label in sorted(examples, key=lambda one: one[1])] == [0, 1]
    assert np.shape(examples[0][0])[2] == 3
    assert names == ("cat", "dog")
