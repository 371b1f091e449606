"""Model directories: what is read is what was written, or describes another model that has these weights."""

import hashlib
import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged, odd_json
from tiny_models import TINY

from hmar_jax import networks
from hmar_jax import params as trees
from hmar_jax.config.plain import from_plain, to_plain
from hmar_jax.errors import HmarError
from hmar_jax.formats import model_directory
from hmar_jax.formats.model_directory import open_model, read_params

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """(a model directory, the bytes of its config file and of its weights, its parameters by name)"""
    folder = model.save(tmp_path_factory.mktemp("models") / "model", source="a test", licences=["Not for sale."])
    return folder, *((folder / name).read_bytes() for name in (CONFIG, WEIGHTS)), trees.flatten(model.params)


def read(written, config, weights):
    """Config and parameters of the directory with other files in it; None where they are refused in a sentence."""
    folder = written[0]
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    if networks.structure.cache_info().currsize > 50:  # each config's would be kept
        networks.structure.cache_clear()
    try:
        opened = open_model(folder)
        return opened, trees.flatten(read_params(opened, put=lambda _, array: array))
    except HmarError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400 + len(str(folder))
        return None


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.asarray(found[name]).dtype == np.asarray(array).dtype and np.array_equal(found[name], array)
        for name, array in expected.items()
    )


def described(meta):
    """A description whose checksums are right again, without its digest."""
    return json.dumps({name: value for name, value in meta.items() if name != "digest"}).encode()


@settings(max_examples=settings().max_examples * 3)
@given(data=st.data())
def test_a_config_file_that_is_damaged_is_refused_or_told(written, data):
    _, config, weights, params = written
    meta = json.loads(config)
    content = data.draw(damaged(config) | odd_json(meta))
    with mock.patch.object(model_directory.logger, "warning") as warned:
        got = read(written, content, weights)
    if got is not None:
        opened, found = got
        said = {name: value for name, value in opened.meta.items() if name != "digest"}
        assert warned.called == (opened.meta != meta and "digest" in opened.meta)
        if said == {name: value for name, value in meta.items() if name != "digest"}:
            assert opened.config == TINY
        else:
            check_other_model(opened.config, said)
        assert same(found, params)


@given(data=st.data())
def test_a_config_file_changed_by_hand_is_refused_or_describes_another_model_of_these_weights(written, data):
    _, config, weights, params = written
    meta = {name: value for name, value in json.loads(config).items() if name != "digest"}
    changed = json.loads(data.draw(odd_json(meta["model"]).filter(is_json)))
    if (got := read(written, described(meta | {"model": changed}), weights)) is not None:
        opened, found = got
        check_other_model(opened.config, opened.meta)
        assert same(found, params)


def is_json(text):
    try:
        json.dumps(json.loads(text), allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def check_other_model(config, meta):
    """Of what the file says nothing is left out, and nothing that the weights tell is another."""
    model = meta["model"]
    assert from_plain(type(config), json.loads(json.dumps(to_plain(config)))) == config
    assert config.ladder.sides == tuple(model["ladder"]["sides"])
    assert list(config.class_names) == model.get("class_names", [])
    assert config.class_names == () or len(set(config.class_names)) == config.num_classes == 5
    for group, defaults in (("tokenizer", type(config.tokenizer)()), ("transformer", config.transformer)):
        for name, value in model[group].items():
            kept = getattr(getattr(config, group), name)
            assert name == "phi_of_scale" or kept == (tuple(value) if isinstance(value, list) else value)
            assert type(kept) in (type(getattr(defaults, name)), type(value))
    of_weights = ("depth", "width", "heads", "num_classes", "mlp_ratio", "branch_depth", "masked", "shared_adaln")
    assert [getattr(config.transformer, name) for name in of_weights] == [
        getattr(TINY.transformer, name) for name in of_weights
    ]
    assert (config.ladder.length, config.ladder.num_scales) == (TINY.ladder.length, TINY.ladder.num_scales)


@settings(max_examples=settings().max_examples * 2)
@given(data=st.data(), checksum=st.sampled_from(["kept", "recomputed", "recomputed"]))
def test_weights_that_are_damaged_are_refused_or_read_as_they_are(written, data, checksum):
    _, config, weights, params = written
    length = 8 + int.from_bytes(weights[:8], "little")
    part = data.draw(st.sampled_from(["length", "header", "json", "values", "all"]))
    match part:
        case "length":
            content = data.draw(damaged(weights[:8])) + weights[8:]
        case "header":
            content = weights[:8] + data.draw(damaged(weights[8:length])) + weights[length:]
        case "json":
            header = data.draw(odd_json(json.loads(weights[8:length])))
            content = len(header).to_bytes(8, "little") + header + weights[length:]
        case "values":
            content = weights[:length] + data.draw(damaged(weights[length:]))
        case _:
            content = data.draw(damaged(weights))
    if checksum == "recomputed":
        config = described(json.loads(config) | {"sha256": hashlib.sha256(content).hexdigest()})
    if (got := read(written, config, content)) is not None:
        opened, found = got
        assert opened.config == TINY
        if content == weights or checksum == "kept":
            assert same(found, params)
        else:
            check_values(content, found)


def check_values(content, found):
    """The parameters are what the file has by an independent reading, and finite."""
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header.pop("__metadata__", None)
    assert header.keys() == found.keys()
    for name, entry in header.items():
        assert found[name].shape == tuple(entry["shape"])
        assert entry["dtype"] in ("F32", "F16", "BF16")
        begin, end = entry["data_offsets"]
        assert found[name].tobytes() == content[length + begin : length + end]
        assert np.isfinite(found[name].astype(np.float32)).all()


def test_the_directory_itself_is_read(written):
    _, config, weights, params = written
    opened, found = read(written, config, weights)
    assert (opened.config, opened.meta) == (TINY, json.loads(config))
    assert same(found, params)
