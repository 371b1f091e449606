"""What is no model directory, or a damaged one, gets one sentence that says what it is."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from official_files import rewrite
from tiny_models import TINY

from hmar_jax import InputError, from_pretrained
from hmar_jax.errors import TransientError

FIELDS = ["format", "model", "source", "licences", "layout", "sha256", "tokenizer_sha256"]


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


def test_what_is_no_directory_gets_one_sentence(saved):
    for path in (saved / "nowhere", saved / "model.safetensors"):
        with pytest.raises(InputError, match="is not a model directory"):
            from_pretrained(path)


@pytest.mark.parametrize(("here", "path"), [("", "."), ("", "./"), ("sub", ".."), ("", Path())])
def test_the_folder_where_one_is_may_be_the_model(saved, monkeypatch, here, path):
    (saved / "sub").mkdir()
    monkeypatch.chdir(saved / here)
    assert from_pretrained(path).config == TINY


def test_the_root_is_no_model():
    with pytest.raises(InputError, match=r"^/ is not a model directory: "):
        from_pretrained("/")


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
