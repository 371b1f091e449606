"""Model directories: back bit for bit, whole or not at all, one sentence for every kind of damage."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from official_files import rewrite
from tiny_models import TINY, lively_model, tiny

import hmar_jax.model_card
import hmar_jax.tensors
from hmar_jax import InputError, files, from_pretrained
from hmar_jax import params as trees
from hmar_jax.errors import MachineError, TransientError
from hmar_jax.model import Model
from hmar_jax.pretrained import read_config, save_model, tokenizer_fingerprint, write_model
from hmar_jax.tensors import Tensor

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def saved(model, tmp_path):
    return save_model(tmp_path / "model", model, "made by a test")


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed"])
def exchanges(request, monkeypatch):
    """Whether the file system has two folders change places in one step."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def in_half_precision(model):
    """The model with its matrices in bfloat16, the rest in float32."""
    flat = trees.flatten(model.params)
    halved = {name: leaf.astype(jnp.bfloat16) if name.endswith("kernel") else leaf for name, leaf in flat.items()}
    return Model(model.config, trees.unflatten(halved))


@pytest.mark.parametrize(
    "make",
    [
        lambda model, stage1: model,
        lambda model, stage1: stage1,
        lambda model, stage1: lively_model(tiny(shared_adaln=True, masked=False, pattern="block_causal")),
        lambda model, stage1: Model(
            TINY.__class__(TINY.ladder, TINY.tokenizer), {"tokenizer": model.params["tokenizer"]}
        ),
        lambda model, stage1: in_half_precision(model),
    ],
    ids=["hmar", "stage 1", "var shared adaln", "tokenizer alone", "hmar of two types"],
)
def test_a_saved_model_comes_back_bit_for_bit(model, stage1_model, tmp_path, make):
    original = make(model, stage1_model)
    loaded = from_pretrained(save_model(tmp_path / "deep" / "model", original, "x"))
    assert loaded.config == original.config
    before, after = trees.flatten(original.params), trees.flatten(loaded.params)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype
        np.testing.assert_array_equal(leaf, after[name])
    assert listing(tmp_path / "deep") == ["model", *(f"model/{name}" for name in FILES)]


def test_the_config_file_says_where_the_weights_come_from(saved, model):
    config, meta = read_config(saved)
    assert config == model.config
    assert (meta["source"], meta["licences"], meta["layout"]) == ("made by a test", [], "")
    assert meta["sha256"] == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert meta["tokenizer_sha256"] == tokenizer_fingerprint(model)


def test_the_config_file_says_what_binds_the_weights(model, tmp_path):
    flat = {
        name: Tensor(leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: [np.asarray(leaf)])
        for name, leaf in trees.flatten(model.params).items()
    }
    licences = ["Not for sale.", "Nor for „Füchse“."]
    path = write_model(tmp_path / "model", TINY, flat, source="elsewhere", licences=licences, layout="hmar")
    meta = read_config(path)[1]
    assert (meta["source"], meta["licences"], meta["layout"]) == ("elsewhere", licences, "hmar")
    saved = save_model(tmp_path / "again", from_pretrained(path), "elsewhere", licences=licences)
    assert read_config(saved)[1] == meta | {"layout": ""}


def test_a_directory_without_its_card_is_a_model(saved):
    (saved / "README.md").unlink()
    assert from_pretrained(saved).config == TINY


def test_the_tokenizers_fingerprint_is_of_its_values_alone(model, stage1_model):
    assert tokenizer_fingerprint(model) == tokenizer_fingerprint(stage1_model)
    assert tokenizer_fingerprint(model) != tokenizer_fingerprint(lively_model(TINY, seed=1))


# --- numbers and dtypes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_number_that_is_not_finite_is_named(saved, value, dtype):
    def spoil(flat):
        flat["transformer.pos"] = flat["transformer.pos"].astype(dtype)
        flat["transformer.pos"][3, 5] = value

    rewrite(saved, spoil)
    expected = rf"transformer\.pos of {saved}/model\.safetensors has the value {value}; weights must be finite"
    with pytest.raises(InputError, match=expected):
        from_pretrained(saved)


def test_a_model_that_is_not_finite_is_not_saved(model, tmp_path):
    pos = model.params["transformer"]["pos"].at[3, 5].set(jnp.nan)
    wrong = Model(TINY, model.params | {"transformer": model.params["transformer"] | {"pos": pos}})
    with pytest.raises(InputError, match=r"^transformer\.pos has the value nan; weights must be finite"):
        save_model(tmp_path / "model", wrong, "a test")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool", "float64", "int64"])
def test_weights_of_another_dtype_are_refused(saved, dtype):
    rewrite(saved, lambda flat: flat.update({"transformer.pos": flat["transformer.pos"].astype(dtype)}))
    expected = rf"has transformer\.pos as {dtype}; expected float32, bfloat16 or float16, so"
    with pytest.raises(InputError, match=expected):
        from_pretrained(saved)


def test_float16_weights_are_loaded_and_saved(saved, tmp_path):
    rewrite(saved, lambda flat: flat.update({"transformer.pos": flat["transformer.pos"].astype(np.float16)}))
    again = save_model(tmp_path / "again", from_pretrained(saved), "a test")
    found = [safetensors.numpy.load_file(path / "model.safetensors")["transformer.pos"] for path in (saved, again)]
    assert found[1].dtype == np.float16
    np.testing.assert_array_equal(*found)


def test_the_compute_type_is_chosen_when_loading(saved):
    loaded = from_pretrained(str(saved), dtype="bfloat16")
    assert (loaded.dtype, loaded.params["transformer"]["word"]["kernel"].dtype) == ("bfloat16", "bfloat16")
    with pytest.raises(InputError, match="dtype is 'int8'; use 'float32' or 'bfloat16'"):
        from_pretrained(saved, dtype="int8")


def test_an_existing_output_is_refused_and_untouched(saved, model):
    before = {name: (saved / name).read_bytes() for name in listing(saved)}
    with pytest.raises(InputError, match=r"model exists already; remove it, or choose another"):
        save_model(saved, model, "again")
    assert {name: (saved / name).read_bytes() for name in listing(saved)} == before


@pytest.mark.usefixtures("exchanges")
def test_replace_swaps_the_whole_directory(saved):
    (saved / "notes.txt").write_text("old")
    save_model(saved, lively_model(TINY, seed=1), "second", replace=True)
    assert read_config(saved)[1]["source"] == "second"
    from_pretrained(saved)
    assert listing(saved.parent) == ["model", *(f"model/{name}" for name in FILES)]
    assert "second" in (saved / "README.md").read_text()


# --- damage


def truncate(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip(saved):
    weights = saved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)


def drop(*names):
    return lambda saved: rewrite(saved, lambda flat: [flat.pop(name) for name in names])


def add(name):
    return lambda saved: rewrite(saved, lambda flat: flat.update({name: np.zeros(2, np.float32)}))


def misshape(name, shape):
    return lambda saved: rewrite(saved, lambda flat: flat.update({name: np.zeros(shape, np.float32)}))


def configure(**changes):
    return lambda saved: rewrite(saved, change_config=lambda meta: meta.update(changes))


def forget(name):
    return lambda saved: rewrite(saved, change_config=lambda meta: meta.pop(name))


def replace_by(kind, name):
    def damage(saved):
        (saved / name).unlink()
        # What lies under the link is there, and no read of it succeeds.
        (saved / name).mkdir() if kind == "folder" else (saved / name).symlink_to("/proc/self/mem")

    return damage


def write_config(text):
    return lambda saved: (saved / "config.json").write_bytes(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors is damaged: its checksum"),
        (flip, "model.safetensors is damaged: its checksum"),
        (lambda saved: (saved / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda saved: (saved / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda saved: (saved / "config.json").unlink(), "is not a model directory: it has no config.json"),
        (replace_by("folder", "config.json"), r"Could not read .*config\.json \(.*; check the path and"),
        (replace_by("unreadable", "config.json"), r"Could not read .*config\.json \("),
        (replace_by("folder", "model.safetensors"), "has no model.safetensors"),
        (replace_by("unreadable", "model.safetensors"), r"Could not read .*model\.safetensors \("),
        (drop("transformer.pos"), r"lacks transformer\.pos; weights and config are not of one model"),
        (
            drop("transformer.pos", "transformer.level", "transformer.mask_embed", "tokenizer.quantizer.codebook"),
            r"lacks tokenizer\.quantizer\.codebook, transformer\.level, transformer\.mask_embed and 1 more",
        ),
        (add("transformer.extra"), r"has the unexpected transformer\.extra; weights"),
        (misshape("transformer.pos", (3, 2)), r"has transformer\.pos of shape \(3, 2\), not \(14, 32\); weights and"),
        (write_config(b"{"), r"config\.json is damaged \("),
        (write_config(b"\xff\xfe\x00"), r"config\.json is damaged \("),
        (write_config(b"[1]"), r"config\.json is damaged \("),
        (configure(format=2), r"has format 2; this version reads 1"),
        (configure(model=5), r"config\.json is damaged"),
        (configure(model={"ladder": {"sides": [2, 1]}, "tokenizer": {}}), r"describes no model: Sides \(2, 1\)"),
        (configure(model={"ladder": {"sides": [1]}, "tokenizer": {}, "head": 1}), "no model: .*'head' does not exist"),
        (configure(model={"tokenizer": {}}), r"config\.json describes no model: Config field 'ladder' is missing\.$"),
        (forget("model"), r"config\.json is damaged \('model'\)"),
        (forget("format"), r"config\.json is damaged \('format'\)"),
        (forget("sha256"), r"config\.json is damaged \('sha256'\)"),
        (forget("source"), r"config\.json is damaged \('source'\)"),
        (forget("licences"), r"config\.json is damaged \('licences'\)"),
        (forget("layout"), r"config\.json is damaged \('layout'\)"),
        (forget("tokenizer_sha256"), r"config\.json is damaged \('tokenizer_sha256'\)"),
    ],
)
def test_damage_gets_one_sentence_that_names_it(saved, damage, message):
    damage(saved)  # "unreadable" is a disk that fails, which may pass
    with pytest.raises((InputError, TransientError), match=message) as error:
        from_pretrained(saved)
    assert isinstance(error.value, TransientError) == ("Input/output error" in str(error.value))
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_what_is_no_directory_gets_one_sentence(saved):
    for path in (saved / "nowhere", saved / "model.safetensors"):
        with pytest.raises(InputError, match="is not a model directory"):
            from_pretrained(path)


def test_a_model_whose_parameters_do_not_fit_is_not_saved(model, tmp_path):
    params = model.params | {"transformer": {"pos": model.params["transformer"]["pos"]}}
    with pytest.raises(InputError, match=r"The model lacks transformer\."):
        save_model(tmp_path / "model", Model(TINY, params), "x")
    assert listing(tmp_path) == []


# --- interrupted and refused writes


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


# What a save goes through, in order: each may be refused or interrupted.
WEIGHTS = (hmar_jax.tensors, "write")
AN_ARRAY = (hmar_jax.tensors, "_bytes")  # when others are in the file already
CARD = (hmar_jax.model_card, "write")
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
        save_model(tmp_path / "model", model, "x")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("at", [WEIGHTS, AN_ARRAY, CARD, TEXTS, RENAME], ids=lambda at: f"{at[0].__name__}.{at[1]}")
@pytest.mark.parametrize("error", [OSError("no"), Interrupted()], ids=["refused", "interrupted"])
@pytest.mark.parametrize("replace", [False, True], ids=["anew", "over another"])
def test_an_interrupted_save_leaves_what_was_there(model, tmp_path, monkeypatch, at, error, replace):
    if at == RENAME:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    if replace:
        save_model(tmp_path / "model", model, "first")
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path) if (tmp_path / name).is_file()}
    calls, last = fail_at(monkeypatch, at, error)
    with pytest.raises(InputError if isinstance(error, OSError) else Interrupted):
        save_model(tmp_path / "model", model, "x", replace=replace)
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

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(InputError, match="Could not write the model"):
        save_model(saved, lively_model(TINY, seed=1), "second", replace=True)
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
            save_model(saved, model, "second")
    assert listing(saved.parent) == ["model", *(f"model/{name}" for name in FILES)]
    assert read_config(saved)[1]["source"] == "made by a test"


@pytest.mark.parametrize(("here", "path"), [("", "."), ("", "./"), ("sub", ".."), ("", Path())])
def test_the_folder_where_one_is_may_be_the_model(saved, monkeypatch, here, path):
    (saved / "sub").mkdir()
    monkeypatch.chdir(saved / here)
    assert from_pretrained(path).config == TINY


def test_the_root_is_no_model():
    with pytest.raises(InputError, match=r"^/ is not a model directory: "):
        from_pretrained("/")


@pytest.mark.usefixtures("exchanges")
def test_a_save_clears_away_what_a_killed_one_left(saved, model):
    partial, old = saved.with_name(".model.partial"), saved.with_name(".model.old")
    for left in (partial, old):
        (left / "model").mkdir(parents=True)
        (left / "model.safetensors").touch()
    save_model(saved, model, "second", replace=True)
    assert read_config(saved)[1]["source"] == "second"
    assert listing(saved.parent) == ["model", *(f"model/{name}" for name in FILES)]


def test_a_folder_that_cannot_be_made_gets_one_sentence(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Could not write the model to .*check the path"):
        save_model(tmp_path / "file" / "model", model, "x")


_LIMITED = """
import resource, sys
from hmar_jax import from_pretrained
from hmar_jax.errors import MachineError
from hmar_jax.pretrained import save_model
model = from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_model(sys.argv[2], model, "x")
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


# --- folders that are something else


def work_directory(folder, model):
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "config.json").write_text('{"stage": "masked", "steps": 5}')
    if model:
        save_model(folder / "model", model, "x")


def with_file(name, content="{}"):
    def make(folder, model):
        folder.mkdir()
        (folder / name).write_text(content)

    return make


OTHERS = {
    "a work directory": (work_directory, "is the work directory of a training run; give {path}/model."),
    "one without a model yet": (
        lambda folder, model: work_directory(folder, None),
        "is the work directory of a training run that has not ended; `hmar-jax export model --workdir={path} "
        "--output=MODEL` writes",
    ),
    "one without a checkpoint": (
        with_file("config.json", '{"stage": "masked"}'),
        "is the work directory of a training run that has saved no checkpoint yet; train on.",
    ),
    "a folder of work directories": (
        lambda folder, model: work_directory(folder / "masked", model),
        "has no config.json; give a model directory in it, such as {path}/masked/model.",
    ),
    "a pipeline of diffusers": (with_file("model_index.json"), "is a pipeline of diffusers"),
    "a part of one": (with_file("config.json", '{"_class_name": "VQModel"}'), "is a model of diffusers"),
    "a model of transformers": (with_file("config.json", '{"model_type": "gpt2"}'), "is a model of transformers"),
    "a token cache": (with_file("cache.json"), "is a token cache, for data.path; give the model directory"),
    "samples": (with_file("grid.png"), "holds samples; give the model directory that they were drawn from"),
    "many samples": (with_file("samples.json"), "holds samples; give the model directory"),
    "an official file": (
        lambda folder, model: folder.write_text("x"),
        "is a file; `hmar-jax convert` turns an official checkpoint into a model directory",
    ),
    "nothing": (lambda folder, model: None, "has no config.json; `hmar-jax export model` and `convert` write one"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_model_directory_is_called_what_it_is(model, tmp_path, case):
    make, expected = OTHERS[case]
    path = tmp_path / "given"
    make(path, model)
    with pytest.raises(InputError) as error:
        from_pretrained(path)
    said = str(error.value)
    assert said.startswith(f"{path} is not a model directory: it {expected.format(path=path)}")
    assert said.endswith(".")


@pytest.mark.parametrize("name", ["checkpoints", "samples.json", "grid.png", "cache.json", "model_index.json"])
def test_what_else_lies_in_a_model_directory_does_not_matter(saved, name):
    (saved / name).mkdir()
    assert from_pretrained(saved).config == TINY


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_directory_names_the_directory(saved, name):
    with pytest.raises(
        InputError, match=rf"{name} is not a model directory: it is a file; give the directory .*/model\."
    ):
        from_pretrained(saved / name)


@pytest.mark.parametrize("hidden", ["model", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_not_called_absent(saved, monkeypatch, hidden):
    stat = Path.stat

    def refuse(self, **options):
        if self.name == hidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match=rf"{hidden} may not be read \(.*Permission denied.*\); check its permissions"):
        from_pretrained(saved)
