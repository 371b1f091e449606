"""A model directory appears whole or not at all, and over another only where that is asked for."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from official_files import listing
from tiny_models import TINY, lively_model

import hmar_jax.formats.model_card
import hmar_jax.formats.safetensors_files
from hmar_jax import InputError, from_pretrained
from hmar_jax.errors import MachineError
from hmar_jax.files import whole_files
from hmar_jax.formats.model_directory import read_config
from hmar_jax.model import Model

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed"])
def exchanges(request, monkeypatch):
    """Whether the file system has two folders change places in one step."""
    if not request.param:
        monkeypatch.setattr(whole_files, "_exchange", lambda one, other: False)
    return request.param


@pytest.mark.usefixtures("exchanges")
def test_replace_swaps_the_whole_directory(saved):
    (saved / "notes.txt").write_text("old")
    lively_model(TINY, seed=1).save(saved, source="second", replace=True)
    assert read_config(saved)[1]["source"] == "second"
    from_pretrained(saved)
    assert listing(saved.parent) == ["model", *(f"model/{name}" for name in FILES)]
    assert "second" in (saved / "README.md").read_text()


def test_a_word_is_no_leave_to_replace(saved, model):
    with pytest.raises(InputError, match=r"replace is 'no'; expected True or False\."):
        model.save(saved, source="second", replace="no")
    assert read_config(saved)[1]["source"] != "second"


def test_a_model_whose_parameters_do_not_fit_is_not_saved(model, tmp_path):
    params = model.params | {"transformer": {"pos": model.params["transformer"]["pos"]}}
    with pytest.raises(InputError, match=r"The model lacks transformer\."):
        Model(TINY, params).save(tmp_path / "model", source="x")
    assert listing(tmp_path) == []


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


# What a save goes through, in order: each may be refused or interrupted.
WEIGHTS = (hmar_jax.formats.safetensors_files, "write")
AN_ARRAY = (hmar_jax.formats.safetensors_files, "_bytes")  # when others are in the file already
CARD = (hmar_jax.formats.model_card, "write")
TEXTS = (Path, "write_text")
RENAME = (os, "rename")


def fail_at(monkeypatch, at, error):
    """The nth call of a function fails; by default the first."""
    original, calls, last = getattr(*at), [], 5 if at == AN_ARRAY else 1

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == last:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(*at, fail)
    return calls, last


@pytest.mark.parametrize("at", [WEIGHTS, AN_ARRAY, TEXTS, RENAME], ids=lambda at: at[1])
def test_a_full_disk_leaves_nothing_and_says_so(model, tmp_path, monkeypatch, at):
    fail_at(monkeypatch, at, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(MachineError, match=r"Could not write the model to .*No space left.*make room on that disk"):
        model.save(tmp_path / "model", source="x")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("at", [WEIGHTS, AN_ARRAY, CARD, TEXTS, RENAME], ids=lambda at: f"{at[0].__name__}.{at[1]}")
@pytest.mark.parametrize("error", [OSError("no"), Interrupted()], ids=["refused", "interrupted"])
@pytest.mark.parametrize("replace", [False, True], ids=["anew", "over another"])
def test_an_interrupted_save_leaves_what_was_there(model, tmp_path, monkeypatch, at, error, replace):
    if at == RENAME:
        monkeypatch.setattr(whole_files, "_exchange", lambda one, other: False)
    if replace:
        model.save(tmp_path / "model", source="first")
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path) if (tmp_path / name).is_file()}
    calls, last = fail_at(monkeypatch, at, error)
    with pytest.raises(InputError if isinstance(error, OSError) else Interrupted):
        model.save(tmp_path / "model", source="x", replace=replace)
    assert len(calls) >= last
    monkeypatch.undo()
    assert listing(tmp_path) == (["model", *sorted(before)] if replace else [])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_an_interrupted_replacement_keeps_the_old_model(saved, monkeypatch):
    before, rename, calls = listing(saved.parent), os.rename, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(whole_files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(InputError, match="Could not write the model"):
        lively_model(TINY, seed=1).save(saved, source="second", replace=True)
    monkeypatch.undo()
    assert read_config(saved)[1]["source"] == "made by a test"
    assert listing(saved.parent) == before


@pytest.mark.parametrize("reader", [True, False], ids=["read", "saved again"])
def test_a_model_whose_replacement_was_killed_is_put_back(saved, model, reader):
    (saved.parent / ".model.old").mkdir()
    os.rename(saved, saved.parent / ".model.old" / "model")
    if reader:
        assert from_pretrained(saved).config == TINY
    else:
        with pytest.raises(InputError, match="model exists already"):
            model.save(saved, source="second")
    assert listing(saved.parent) == ["model", *(f"model/{name}" for name in FILES)]
    assert read_config(saved)[1]["source"] == "made by a test"


@pytest.mark.usefixtures("exchanges")
def test_a_save_clears_away_what_a_killed_one_left(saved, model):
    partial, old = saved.with_name(".model.partial"), saved.with_name(".model.old")
    for left in (partial, old):
        (left / "model").mkdir(parents=True)
        (left / "model.safetensors").touch()
    model.save(saved, source="second", replace=True)
    assert read_config(saved)[1]["source"] == "second"
    assert listing(saved.parent) == ["model", *(f"model/{name}" for name in FILES)]


def test_a_folder_that_cannot_be_made_gets_one_sentence(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Could not write the model to .*check the path"):
        model.save(tmp_path / "file" / "model", source="x")


_LIMITED = """
import resource, sys
from hmar_jax import from_pretrained
from hmar_jax.errors import MachineError
model = from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    model.save(sys.argv[2], source="x")
except MachineError as error:
    print(error)
"""


def test_a_really_refused_write_leaves_nothing(saved, tmp_path):
    (tmp_path / "full").mkdir()
    command = [sys.executable, "-c", _LIMITED, saved, tmp_path / "full" / "model"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("Could not write the model to ")
    assert "make room on that disk" in finished.stdout
    assert listing(tmp_path / "full") == []
