"""Models by hub id, from a stand-in of the hub on this machine: downloaded once, whole, or refused in one sentence."""

import dataclasses
import importlib
import logging
import os
import re
import sys
import time

import numpy as np
import pytest
from hub_stand_in import ID, WEIGHTS, Hub
from tiny_models import TINY, lively_model, tiny

from hmar_jax import InputError, from_pretrained
from hmar_jax import params as trees
from hmar_jax.commands.main import main
from hmar_jax.scales import ScaleLadder

FILES = ["config.json", "model.safetensors"]


def modules_of_the_library():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "huggingface_hub"}


@pytest.fixture
def as_new_process():
    """Makes the next import of huggingface_hub read the environment, and forget what it knew, as a new process does."""
    modules, log = modules_of_the_library(), logging.getLogger("huggingface_hub")
    handlers = list(log.handlers)

    def forget():
        loaded = modules_of_the_library()
        if (library := loaded.get("huggingface_hub")) is not modules.get("huggingface_hub"):
            library.close_session()
        for name in loaded:
            del sys.modules[name]
        log.handlers.clear()

    yield forget
    forget()
    sys.modules.update(modules)
    log.handlers.extend(handlers)


@pytest.fixture
def hub(as_new_process, monkeypatch, tmp_path):
    """A hub, and an environment in which it is the only one and nothing is cached."""
    hub = Hub()
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # before it tries again
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    as_new_process()
    yield hub
    as_new_process()
    hub.close()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("models") / "hmar-tiny", source="first")


@pytest.fixture(scope="module")
def other_model():
    return lively_model(TINY, seed=1)


@pytest.fixture(scope="module")
def other_directory(other_model, tmp_path_factory):
    return other_model.save(tmp_path_factory.mktemp("models") / "hmar-tiny", source="second")


def assert_same(loaded, expected):
    assert loaded.config == expected.config
    loaded, expected = trees.flatten(loaded.params), trees.flatten(expected.params)
    assert loaded.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(loaded[name], leaf)


def refusal(*args, **options):
    """The sentence with which a model is refused."""
    with pytest.raises(InputError) as error:
        from_pretrained(*args, **options)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# --- what is downloaded


def test_a_hub_id_loads_what_the_directory_holds(hub, directory, model):
    hub.put(directory, "main", change=lambda files: files.update({"optimizer.bin": b"large", "sub/config.json": b"{"}))
    assert_same(from_pretrained(ID), model)
    assert sorted(name for method, name, _ in hub.requests if method == "GET") == FILES


def test_the_compute_type_is_chosen_for_a_hub_id_too(hub, directory):
    hub.put(directory, "main")
    assert from_pretrained(ID, dtype="bfloat16").dtype == "bfloat16"


def test_a_second_load_downloads_nothing(hub, directory, model, as_new_process):
    hub.put(directory, "main")
    from_pretrained(ID)
    hub.requests.clear()
    as_new_process()
    assert_same(from_pretrained(ID), model)
    assert hub.requests == []


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE=1", "no connection", "the hub is down"])
def test_what_was_downloaded_loads_without_the_hub(hub, directory, model, as_new_process, monkeypatch, why):
    hub.put(directory, "main", "v1")
    for revision in (None, "v1"):
        from_pretrained(ID, revision=revision)
    as_new_process()
    hub.requests.clear()
    match why:
        case "HF_HUB_OFFLINE=1":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        case "no connection":
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        case "the hub is down":
            hub.answer = (500, "")
    for revision in (None, "v1", hub.revisions["v1"]):
        assert_same(from_pretrained(ID, revision=revision), model)
    assert hub.requests == []


@pytest.mark.parametrize("revision", [7, "", b"main", ["main"]], ids=repr)
def test_a_revision_that_is_no_text_is_refused(hub, revision):
    with pytest.raises(InputError, match=rf"^revision is .*; expected a branch, a tag or a commit of {ID}\.$"):
        from_pretrained(ID, revision=revision)
    assert hub.requests == []


def test_a_revision_chooses_the_files(hub, directory, other_directory, model, other_model):
    first = hub.put(directory, "v1", "refs/pr/1")
    second = hub.put(other_directory, "main", "a-branch")
    for revision in (None, "main", "a-branch", second):
        assert_same(from_pretrained(ID, revision=revision), other_model)
    for revision in ("v1", "refs/pr/1", first):
        assert_same(from_pretrained(ID, revision=revision), model)
    assert len(hub.downloads()) == 2


def test_a_branch_is_followed_when_it_moves(hub, directory, other_directory, model, other_model, as_new_process):
    hub.put(directory, "main")
    assert_same(from_pretrained(ID), model)
    hub.put(other_directory, "main")
    as_new_process()
    assert_same(from_pretrained(ID), other_model)


# --- downloads that break off


def test_a_broken_download_goes_on_where_it_stopped(hub, directory, model, monkeypatch):
    hub.put(directory, "main")
    hub.breaks = ["closed"]
    chunk = (directory / WEIGHTS).stat().st_size // 4 + 1
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "DOWNLOAD_CHUNK_SIZE", chunk)
    assert_same(from_pretrained(ID), model)
    assert hub.downloads() == [None, f"bytes={chunk}-"]


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_download_that_keeps_breaking_gets_one_sentence_and_the_next_is_whole(
    hub, directory, model, as_new_process, how
):
    hub.put(directory, "main")
    hub.breaks = [how] * 100
    assert ID in refusal(ID)
    hub.breaks.clear()
    as_new_process()
    assert_same(from_pretrained(ID), model)


def flip(files):
    data = bytearray(files[WEIGHTS])
    data[len(data) // 2] ^= 1
    files[WEIGHTS] = bytes(data)


def cut(files):
    files[WEIGHTS] = files[WEIGHTS][:-100]


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_weights_are_refused_by_their_checksum(hub, directory, damage):
    hub.put(directory, "main", change=damage)
    assert re.search(r"model\.safetensors is damaged: its checksum is not the one in config\.json", refusal(ID))


# --- what cannot be had


def close(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")


def no_address(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")


def go_offline(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def answer(status, content, **headers):
    def prepare(hub, _):
        hub.answer = (status, content, headers)

    return prepare


@pytest.mark.parametrize(
    ("name", "revision", "prepare", "reason"),
    [
        ("someone/none", None, None, "there is none of this name, or a private one"),
        ("someone/hmar..tiny", None, None, "hmar..tiny"),
        (ID, "v2", None, "there is no such revision"),
        (ID, "0" * 40, None, "there is no such revision"),
        (ID, None, close, "the hub cannot be asked"),
        (ID, None, no_address, "."),
        (ID, None, go_offline, "the hub cannot be asked"),
        (ID, None, answer(500, ""), "."),
        (ID, None, answer(403, "", **{"X-Error-Code": "GatedRepo"}), "it is gated: accept its terms"),
        (ID, None, answer(429, ""), "the hub cannot be asked"),
        (ID, None, answer(200, "<html>Log in to this network</html>"), "."),
    ],
    ids=[
        "unknown repository",
        "a name that none may have",
        "unknown revision",
        "unknown commit",
        "no connection",
        "no address",
        "offline",
        "hub down",
        "gated",
        "too many requests",
        "another page",
    ],
)
def test_what_cannot_be_had_gets_one_sentence(hub, directory, monkeypatch, name, revision, prepare, reason):
    hub.put(directory, "main")
    if prepare:
        prepare(hub, monkeypatch)
    at = f" at revision '{revision}'" if revision else ""
    said = rf"^{re.escape(name)} is neither a directory here nor a model to be had from the hub{at} \(.+\); check "
    sentence = refusal(name, revision=revision)
    assert re.search(said, sentence)
    assert re.search(reason, sentence.split("(", 1)[1])


@pytest.mark.parametrize("lost", ["config.json", WEIGHTS], ids=str)
def test_a_repository_without_a_model_gets_one_sentence(hub, directory, lost):
    hub.put(directory, "main", change=lambda files: files.pop(lost))
    sentence = refusal(ID)
    assert sentence == f"{ID} on the hub is no model of HMAR-JAX: it has no {lost}."


def test_without_the_library_a_sentence_says_what_to_install(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        sentence = refusal(ID)
    assert sentence.startswith(f"{ID} is not a directory here; ")
    assert "`pip install huggingface_hub`" in sentence


# --- directories go first


def test_a_directory_of_that_name_goes_first(hub, directory, other_model, tmp_path):
    hub.put(directory, "main")
    other_model.save(tmp_path / "here" / ID, source="mine")
    assert_same(from_pretrained(ID), other_model)
    assert hub.requests == []


def test_a_directory_needs_no_library(hub, directory, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert_same(from_pretrained(directory), model)


@pytest.mark.parametrize("path", [f"./{ID}", f"{ID}/", f"models/{ID}", "hmar-tiny", f"../{ID}", f"/{ID}", f"~/{ID}"])
def test_what_can_only_be_a_path_is_not_asked_for(hub, directory, path):
    hub.answer = (200, "nobody should ask")
    assert "is not a model directory: it has no config.json" in refusal(path)
    assert "huggingface_hub" not in sys.modules


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_path_into_a_folder_that_is_here_is_not_asked_for(hub, directory, tmp_path, revision):
    hub.put(directory, "main")
    (tmp_path / "here" / ID).parent.mkdir()
    assert refusal(ID, revision=revision) == (
        f"{ID} does not exist, and was not looked for on the Hugging Face hub, since there is a folder "
        f"{ID.partition('/')[0]} here; check the path, or, for a model of the hub, work in another folder."
    )
    assert "huggingface_hub" not in sys.modules
    assert hub.requests == []


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_has_no_revisions(hub, directory, there):
    path = directory if there else directory / "nowhere"
    assert refusal(path, revision="v1") == (f"{path} is a local path, which has no revision 'v1'; leave revision out.")


# --- commands


def test_a_command_samples_from_a_hub_id(hub, tmp_path):
    smallest = dataclasses.replace(tiny(depth=1, masked=False), ladder=ScaleLadder((1,)))  # it is compiled
    hub.put(lively_model(smallest).save(tmp_path / "model", source="a test"), "v1")
    assert main(["sample", f"--model={ID}", "--revision=v1", "--labels=0,4", f"--output={tmp_path / 'samples'}"]) == 0
    pictures = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert pictures == ["00000-class0-seed0.png", "00001-class4-seed0.png", "grid.png"]
    assert len(hub.downloads()) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("someone/none", "someone/none is neither a directory here nor a model to be had from the hub ("),
        (f"./{ID}", f"{ID} is not a model directory: it has no config.json;"),
    ],
    ids=["unknown hub id", "path"],
)
def test_a_command_refuses_in_one_sentence(hub, tmp_path, capsys, name, said):
    assert main(["sample", f"--model={name}", "--labels=4", f"--output={tmp_path / 'samples'}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hmar-jax sample: {said}")
    assert err.count("\n") == 1
    assert not (tmp_path / "samples").exists()
