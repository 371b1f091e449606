"""Model directories: back bit for bit, whole or not at all, one sentence for every kind of damage."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from official_files import rewrite
from tiny_models import TINY, fingerprint, lively_model, tiny

import hmar_jax.formats.model_card
import hmar_jax.formats.safetensors_files
from hmar_jax import InputError, from_pretrained
from hmar_jax import params as trees
from hmar_jax.errors import MachineError, TransientError
from hmar_jax.files import whole_files
from hmar_jax.formats.model_directory import open_model, read_config, write_model
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.model import Model

FILES = ["README.md", "config.json", "model.safetensors"]
FIELDS = ["format", "model", "source", "licences", "layout", "sha256", "tokenizer_sha256"]


@pytest.fixture
def saved(model, tmp_path):
    return model.save(tmp_path / "model", source="made by a test")


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed"])
def exchanges(request, monkeypatch):
    """Whether the file system has two folders change places in one step."""
    if not request.param:
        monkeypatch.setattr(whole_files, "_exchange", lambda one, other: False)
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
    loaded = from_pretrained(original.save(tmp_path / "deep" / "model", source="x"))
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
    assert meta["tokenizer_sha256"] == fingerprint(model)


def test_the_config_file_says_what_binds_the_weights(model, tmp_path):
    flat = {
        name: Tensor(leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: [np.asarray(leaf)])
        for name, leaf in trees.flatten(model.params).items()
    }
    licences = ["Not for sale.", "Nor for „Füchse“."]
    path = write_model(tmp_path / "model", TINY, flat, source="elsewhere", licences=licences, layout="hmar")
    meta = read_config(path)[1]
    assert (meta["source"], meta["licences"], meta["layout"]) == ("elsewhere", licences, "hmar")
    loaded = from_pretrained(path)
    assert read_config(loaded.save(tmp_path / "again"))[1] == meta
    assert read_config(pickle.loads(pickle.dumps(loaded)).save(tmp_path / "pickled"))[1] == meta
    other = read_config(loaded.save(tmp_path / "other", source="here", licences=()))[1]
    assert other == meta | {"source": "here", "licences": [], "digest": other["digest"]}


def test_a_directory_without_its_card_is_a_model(saved):
    (saved / "README.md").unlink()
    assert from_pretrained(saved).config == TINY


def test_the_tokenizers_fingerprint_is_of_its_values_alone(model, stage1_model):
    assert fingerprint(model) == fingerprint(stage1_model)
    assert fingerprint(model) != fingerprint(lively_model(TINY, seed=1))


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
        wrong.save(tmp_path / "model", source="a test")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool", "float64", "int64"])
def test_weights_of_another_dtype_are_refused(saved, dtype):
    rewrite(saved, lambda flat: flat.update({"transformer.pos": flat["transformer.pos"].astype(dtype)}))
    expected = rf"has transformer\.pos as {dtype}; expected float32, bfloat16 or float16, so"
    with pytest.raises(InputError, match=expected):
        from_pretrained(saved)


def test_float16_weights_are_loaded_and_saved(saved, tmp_path):
    rewrite(saved, lambda flat: flat.update({"transformer.pos": flat["transformer.pos"].astype(np.float16)}))
    again = from_pretrained(saved).save(tmp_path / "again", source="a test")
    found = [safetensors.numpy.load_file(path / "model.safetensors")["transformer.pos"] for path in (saved, again)]
    assert found[1].dtype == np.float16
    np.testing.assert_array_equal(*found)


def test_the_compute_type_is_chosen_when_loading(saved):
    loaded = from_pretrained(str(saved), dtype="bfloat16")
    assert (loaded.dtype, loaded.params["transformer"]["word"]["kernel"].dtype) == ("bfloat16", "bfloat16")
    with pytest.raises(InputError, match="dtype is 'int8'; expected 'float32' or 'bfloat16'"):
        from_pretrained(saved, dtype="int8")
    with pytest.raises(
        InputError, match=r"dtype is array\(\['float32', 'bfloat16'\].*; expected 'float32' or 'bfloat16'"
    ):
        from_pretrained(saved, dtype=np.array(["float32", "bfloat16"]))


def test_an_existing_output_is_refused_and_untouched(saved, model):
    before = {name: (saved / name).read_bytes() for name in listing(saved)}
    with pytest.raises(InputError, match=r"model exists already; remove it, or choose another"):
        model.save(saved, source="again")
    assert {name: (saved / name).read_bytes() for name in listing(saved)} == before


@pytest.mark.usefixtures("exchanges")
def test_replace_swaps_the_whole_directory(saved):
    (saved / "notes.txt").write_text("old")
    lively_model(TINY, seed=1).save(saved, source="second", replace=True)
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
    links = {"unreadable": "/proc/self/mem", "device": "/dev/zero", "loop": name}  # of the first no read succeeds

    def damage(saved):
        (saved / name).unlink()
        if kind in links:
            (saved / name).symlink_to(links[kind])
        else:
            {"folder": os.mkdir, "pipe": os.mkfifo}[kind](saved / name)

    return damage


def enlarge(saved):
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate(10**11)  # takes no room on the disk


def duplicate(saved):
    """An entry twice in the header; the library takes the last."""
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = json.dumps({"transformer.pos": json.loads(header)["transformer.pos"]}).encode()
    header = entry[:-1] + b"," + header[1:]
    weights.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    rewrite(saved, change_config=lambda meta: meta.update(sha256=hashlib.sha256(weights.read_bytes()).hexdigest()))


def of_model(name, value):
    """A field of the `ModelConfig` changed; a dot leads into a group."""

    def change(meta):
        *groups, field = name.split(".")
        inner = meta["model"]
        for group in groups:
            inner = inner[group]
        inner[field] = value

    return lambda saved: rewrite(saved, change_config=change)


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
        (replace_by("folder", "config.json"), r"config\.json is a folder; give a file\."),
        (replace_by("unreadable", "config.json"), r"config\.json could not be read \("),
        (replace_by("folder", "model.safetensors"), r"model\.safetensors is a folder; give a file\."),
        (replace_by("pipe", "config.json"), r"config\.json is a named pipe; give a file\."),
        (replace_by("pipe", "model.safetensors"), r"model\.safetensors is a named pipe; give a file\."),
        (replace_by("device", "config.json"), r"config\.json is a device; give a file\."),
        (replace_by("device", "model.safetensors"), r"model\.safetensors is a device; give a file\."),
        (replace_by("loop", "config.json"), r"config\.json could not be read \(.*; a symbolic link leads to itself"),
        (replace_by("loop", "model.safetensors"), r"model\.safetensors could not be read \(.*; a symbolic link leads"),
        (enlarge, r"model\.safetensors has \d{12} bytes; a model of its config\.json has \d{8} at most, so copy"),
        (replace_by("unreadable", "model.safetensors"), r"Could not read .*model\.safetensors \("),
        (drop("transformer.pos"), r"lacks transformer\.pos; weights and config are not of one model"),
        (
            drop("transformer.pos", "transformer.level", "transformer.mask_embed", "tokenizer.quantizer.codebook"),
            r"lacks tokenizer\.quantizer\.codebook, transformer\.level, transformer\.mask_embed and 1 more",
        ),
        (add("transformer.extra"), r"has the unexpected transformer\.extra; weights"),
        (misshape("transformer.pos", (3, 2)), r"has transformer\.pos of shape \(3, 2\), not \(14, 32\); weights and"),
        (add("transformer.\x1b[2J" + "x" * 5000), r"has the unexpected transformer\.\\x1b\[2Jxx.{,80}; weights"),
        (duplicate, r"The header of .* is not JSON \(an object has the name 'transformer\.pos' twice\); copy or"),
        (write_config(b"{"), r"config\.json is not JSON \("),
        (write_config(b"\xff\xfe\x00"), r"config\.json is not JSON \(it is not UTF-8\)"),
        (write_config(b"[" * 100_000), r"config\.json is not JSON \(it is nested deeper than 64 levels\)"),
        (write_config(b'{"format": ' + b"1" * 5000 + b"}"), r"config\.json is not JSON \(the number 1+… does not fit"),
        (
            write_config(b'{"format": 1, "format": 1}'),
            r"config\.json is not JSON \(an object has the name 'format' twice",
        ),
        (write_config(b"[1]"), r"config\.json is damaged, as it has \[1\] and no fields"),
        (write_config(b"null"), r"config\.json is damaged, as it has None and no fields"),
        (configure(format=2), r"has format 2; this version reads 1"),
        (configure(format="1"), r"has format '1'; this version reads 1"),
        (configure(format=True), r"Config field 'format' is True; expected int\."),
        (configure(model=5), r"Config field 'model' is 5; expected ModelConfig\."),
        (configure(source=None), r"Config field 'source' is None; expected str\."),
        (configure(source={"a": "x" * 9999}), r"Config field 'source' is \{'a': 'x+…; expected str\."),
        (configure(sha256=7), r"Config field 'sha256' is 7; expected str\."),
        (configure(tokenizer_sha256=[]), r"Config field 'tokenizer_sha256' is \[\]; expected str\."),
        (configure(licences="none"), r"Config field 'licences' is 'none'; expected tuple\[str, \.\.\.\]\."),
        (configure(licences=[1]), r"Config field 'licences' is 1; expected str\."),
        (configure(layout="../x"), r"Config field 'layout' is '\.\./x'; expected 'vae' or "),
        (configure(layout=None), r"Config field 'layout' is None; expected 'vae' or "),
        (configure(schedules={"cfg": 2}), r"Config field 'schedules' does not exist; "),
        (of_model("phi_layout", 3), r"Config field 'model\.phi_layout' is 3; expected '' or 'qresi_ls' or 'each'\."),
        (of_model("tokenizer", []), r"Config field 'model\.tokenizer' is \[\]; expected TokenizerConfig\."),
        (of_model("ladder.sides", [1, 30000]), r"Sides \(1, 30000\) have 900000001 tokens; expected 262144 at most\."),
        (of_model("ladder.sides", [1, 2.9]), r"Config field 'model\.ladder\.sides' is 2\.9; expected int\."),
        (of_model("tokenizer.encoder_blocks", 10_000), r"tokenizer\.encoder_blocks is 10000; expected 128 at most\."),
        (
            of_model("tokenizer.encoder_blocks", 65),
            r"The tokenizer has 132 residual blocks; .* there are 128 at most\.",
        ),
        (of_model("tokenizer.multipliers", [1] * 10**5), r"The tokenizer has 200000 residual blocks; choose"),
        (of_model("tokenizer.multipliers", [1, -2]), r"tokenizer\.multipliers is \(1, -2\); expected whole numbers"),
        (of_model("tokenizer.multipliers", [1, 2**40]), r"tokenizer\.multipliers is \(1, 1099511627776\); expected"),
        (of_model("tokenizer.multipliers", []), r"tokenizer\.multipliers is \(\); expected whole numbers"),
        (
            of_model("tokenizer.codebook_size", 2**40),
            r"tokenizer\.codebook_size is 1099511627776; expected 16777216 at",
        ),
        (of_model("tokenizer.phis", 10**9), r"tokenizer\.phis is 1000000000; expected 128 at most\."),
        (of_model("tokenizer.phis", True), r"Config field 'model\.tokenizer\.phis' is True; expected int\."),
        (of_model("tokenizer.channels", 0), r"tokenizer\.channels is 0; expected 1 or more\."),
        (of_model("tokenizer.downsampling", 3), r"tokenizer\.downsampling is 3; 2 levels allow a power of two"),
        (of_model("transformer.depth", 10**9), r"transformer\.depth is 1000000000; expected 1024 at most\."),
        (
            of_model("transformer.num_classes", 2**63),
            r"transformer\.num_classes is 9223372036854775808; expected 1048576",
        ),
        (of_model("transformer.width", 2**62), r"transformer\.width is 4611686018427387904; expected 1048576 at most"),
        (of_model("transformer.pattern", "causal"), r"'model\.transformer\.pattern' is 'causal'; expected 'block_"),
        (of_model("class_names", ["a", "b", "c", "d"]), r"There are 4 class names for 5 classes of the transformer"),
        (of_model("class_names", ["a", "b", "c", "d", "a"]), r"Two classes are called 'a'; give one of them another"),
        (
            of_model("class_names", ["a", "b", "", "d", "e"]),
            r"The name of class 2 is '', which is blank; give it a name",
        ),
        (
            of_model("class_names", ["a", "b", "\x1b[2J", "d", "e"]),
            r"The name of class 2 is '\\x1b\[2J', which has a control",
        ),
        (of_model("class_names", "abcde"), r"Config field 'model\.class_names' is 'abcde'; expected tuple"),
        (of_model("class_names", ["a", "b", 3, "d", "e"]), r"Config field 'model\.class_names' is 3; expected str"),
        (
            of_model("transformer.depth", 4),
            r"has transformer\.trunk\..* of shape \(2, .*, not \(3, .*; weights and config",
        ),
        (configure(model={"ladder": {"sides": [2, 1]}, "tokenizer": {}}), r"describes no model: Sides \(2, 1\)"),
        (configure(model={"ladder": {"sides": [1]}, "tokenizer": {}, "head": 1}), r"'model\.head' does not exist"),
        (configure(model={"tokenizer": {}}), r"describes no model: Config field 'model\.ladder' is missing\.$"),
        *((forget(name), f"describes no model: Config field '{name}' is missing") for name in FIELDS),
    ],
)
def test_damage_gets_one_sentence_that_names_it(saved, damage, message):
    damage(saved)  # "unreadable" is a disk that fails, which may pass
    with pytest.raises((InputError, TransientError), match=message) as error:
        from_pretrained(saved)
    assert isinstance(error.value, TransientError) == ("Input/output error" in str(error.value))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300 + len(str(saved))
    assert str(saved) in str(error.value)


# --- the digest of the description


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["model"]["class_names"].reverse(),
        lambda meta: meta["model"]["tokenizer"].update(phi_of_scale=[0, 1, 2]),
        lambda meta: meta["model"]["tokenizer"].update(norm_groups=2),
        lambda meta: meta["model"]["transformer"].update(leak_free=True),
        lambda meta: meta["model"]["transformer"].update(class_dropout=0.2),
        lambda meta: meta.update(licences=[]),
        lambda meta: meta.update(tokenizer_sha256=meta["sha256"]),
        lambda meta: meta.update(digest=meta["digest"][::-1]),
    ],
)
def test_a_description_that_fits_the_weights_but_is_not_what_was_written_is_told(saved, change, caplog):
    """Until somebody says, by deleting the digest, that it was changed on purpose."""
    file = saved / "config.json"
    rewrite(saved, change_config=lambda meta: meta.update(licences=["Not for sale."]))
    from_pretrained(saved).save(saved, source="made by a test", licences=["Not for sale."], replace=True)
    meta = json.loads(file.read_text())
    open_model(saved)
    assert not caplog.records
    change(meta)
    file.write_text(json.dumps(meta, indent=2))
    assert open_model(saved).meta == meta
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{file} is not as it was written, since its digest is of other fields. If you have changed it, delete the "
        "line with its digest; if not, copy or export it again."
    )
    caplog.clear()
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"digest"' not in line))
    assert open_model(saved).meta == {name: value for name, value in meta.items() if name != "digest"}
    assert not caplog.records


def test_a_description_may_be_laid_out_anew(saved):
    file = saved / "config.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(meta.items()))))
    assert read_config(saved) == (TINY, meta)


def test_directories_from_before_the_digest_are_read(saved):
    rewrite(saved)
    assert "digest" not in json.loads((saved / "config.json").read_text())
    assert from_pretrained(saved).config == TINY


def test_what_is_no_directory_gets_one_sentence(saved):
    for path in (saved / "nowhere", saved / "model.safetensors"):
        with pytest.raises(InputError, match="is not a model directory"):
            from_pretrained(path)


def test_a_model_whose_parameters_do_not_fit_is_not_saved(model, tmp_path):
    params = model.params | {"transformer": {"pos": model.params["transformer"]["pos"]}}
    with pytest.raises(InputError, match=r"The model lacks transformer\."):
        Model(TINY, params).save(tmp_path / "model", source="x")
    assert listing(tmp_path) == []


# --- interrupted and refused writes


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


# --- folders that are something else


def work_directory(folder, model):
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "config.json").write_text('{"stage": "masked", "steps": 5}')
    if model:
        model.save(folder / "model", source="x")


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
