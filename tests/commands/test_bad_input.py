"""Bad input to a command is one clear sentence on standard error, exit code 2, and nothing half-written."""

import dataclasses
import io
import json
import logging
import os
import re
import shutil

import numpy as np
import pytest
import tiny_training as tiny
from PIL import Image

from hmar_jax.commands import export
from hmar_jax.commands.main import main
from hmar_jax.config import DataConfig
from hmar_jax.model import from_pretrained


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    return tiny.once(tiny.shared_folder(tmp_path_factory) / "starts", tiny.write_starts)


@pytest.fixture
def refused(capsys):
    """Runs a command that is to be refused; what it said after its own name."""
    logging.getLogger("hmar_jax").setLevel(logging.WARNING)

    def run(*command):
        capsys.readouterr()
        code = main([str(word) for word in command])
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if not line.startswith("The perceptual term is off")]
        assert code == 2
        assert out == ""
        assert len(said) == 1, err
        name, _, sentence = said[0].partition(f"hmar-jax {command[0]}: ")
        assert (name, sentence[-1]) == ("", ".")
        return sentence

    return run


def left(folder):
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


SCHEDULES = {
    "sums": ({"counts": [[1], [1, 2], [64]]}, "Counts [1, 2] of scale 2 sum to 3"),
    "zero": ({"counts": [[1], [0, 4], [64]]}, "Counts [0, 4] of scale 2"),
    "ladder": ({"counts": [[1], [4], [9]]}, "is for the sides 1,2,3, but the model was built for 1,2,8"),
    "masked": ({"counts": [[1], [1, 3], [64]]}, "needs a mask branch, which this model has not"),
    "unknown": ({"counts": [[1], [4], [64]], "speed": 3}, "A schedule's JSON has 'counts' and perhaps"),
    "shape": ({"counts": [[1], [4], [64]], "cfg": [[1]]}, "cfg is [[1]]; expected a number, or"),
    "range": ({"counts": [[1], [4], [64]], "top_p": 1.5}, "top_p is 1.5; expected above 0 and at most 1"),
    "no counts": ([1, 2], "A schedule's JSON has 'counts'"),
}
SAMPLE = {
    "label too high": (["--labels=0,3"], "Label 3 is out of range; this model has classes 0 to 2"),
    "label below 0": (["--labels=-1"], "Label -1 is out of range"),
    "label of no class": (
        ["--labels=0,Q"],
        "is not a class of this model; expected a number or one of A, B, C.",
    ),
    "a small two": (["--labels=0,²"], "Label '²' is not a class of this model"),
    "no label": (["--labels="], "Label '' is not a class of this model"),
    "half a label": (["--labels=--1"], "Label '--1' is not a class of this model"),
    "unknown preset": (["--labels=0", "--schedule=quick"], "Schedule 'quick' is unknown; choose official-256"),
    "preset of another ladder": (["--labels=0", "--schedule=official-256"], "official-256 is for the sides 1,2,3,4"),
    "masked steps": (["--labels=0", "--schedule=small"], "needs a mask branch"),
    "no such schedule file": (["--labels=0", "--schedule=/nowhere/s.json"], "Schedule file /nowhere/s.json cannot be"),
    "bad scalar": (["--labels=0", "--temperature=0"], "temperature is 0.0; expected above 0"),
}


@pytest.mark.parametrize("case", SAMPLE)
def test_sampling_refuses(starts, tmp_path, refused, case):
    options, expected = SAMPLE[case]
    assert expected in refused("sample", "--model", starts / "next_scale", *options, "--output", tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize("case", SCHEDULES)
def test_sampling_refuses_a_schedule_file(starts, tmp_path, refused, case):
    fields, expected = SCHEDULES[case]
    file = tmp_path / "s.json"
    file.write_text(json.dumps(fields))
    model = ["--model", starts / "next_scale"]
    assert expected in refused("sample", *model, "--labels=0", f"--schedule={file}", "--output", tmp_path / "out")
    assert left(tmp_path) == ["s.json"]


def test_a_schedule_file_that_is_not_json(starts, tmp_path, refused):
    (tmp_path / "s.json").write_text("{")
    options = ["--labels=0", f"--schedule={tmp_path / 's.json'}", "--output", tmp_path / "out"]
    assert "The schedule is not JSON" in refused("sample", "--model", starts / "next_scale", *options)


def test_sampling_from_a_tokenizer_alone(starts, tmp_path, refused):
    said = refused("sample", "--model", starts / "tokenizer", "--labels=0", "--output", tmp_path / "out")
    assert "This model is a tokenizer alone" in said


def cut(model):
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)


def flip(model):
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (model / "model.safetensors").write_bytes(data)


MODELS = {
    "missing": (shutil.rmtree, "is not a model directory: it has no config.json"),
    "without weights": (lambda model: (model / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut short": (cut, "model.safetensors is damaged"),
    "a bit flipped": (flip, "model.safetensors is damaged"),
    "config cut short": (lambda model: (model / "config.json").write_text('{"format": 1'), "config.json is not JSON"),
    "config of a list": (lambda model: (model / "config.json").write_text("[]"), "config.json is damaged"),
    "of another format": (lambda model: (model / "config.json").write_text('{"format": 99}'), "has format 99"),
    "of other class names": (
        lambda model: change_config(model, '"class_names": [', '"class_names": ["x",'),
        "class names",
    ),
    "a digit changed": (
        lambda model: change_config(model, '"codebook_size": 16', '"codebook_size": 18'),
        "weights and config are not of one model",
    ),
    "as deep as nobody writes": (
        lambda model: (model / "config.json").write_bytes(b"[" * 10**6),
        "deeper than 64 levels",
    ),
    "a named pipe": (lambda model: put_pipe(model / "model.safetensors"), "model.safetensors is a named pipe"),
}


def change_config(model, before, after):
    file = model / "config.json"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def put_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_directory_is_named(starts, tmp_path, refused, case):
    damage, expected = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(starts / "next_scale", model)
    damage(model)
    said = refused("sample", "--model", model, "--labels=0", "--output", tmp_path / "out")
    assert str(model) in said
    assert expected in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def files(tmp_path, write_config, starts):
    """stage → a config file of that stage."""
    return {
        stage: write_config(tmp_path / f"{stage}.py", tiny.stage_config(stage, starts))
        for stage in ("tokenizer", "next_scale", "masked")
    }


OVERRIDES = {
    "no such field": ("tokenizer", "speed=3", "speed"),
    "no such nested field": ("tokenizer", "optimizer.speed=3", "speed"),
    "a field of no group": ("tokenizer", "steps.more=3", "more"),
    "a word for a number": ("tokenizer", "steps=many", "many"),
    "a fraction for a whole number": ("tokenizer", "batch_size=1.5", "1.5"),
    "a word for a switch": ("tokenizer", "data.flip=perhaps", "perhaps"),
    "a choice that is none": ("tokenizer", "dtype=float8", "'dtype' is 'float8'; expected 'bfloat16' or 'float32'"),
    "a stage that is none": ("tokenizer", "stage=four", "'stage' is 'four'; expected 'tokenizer' or"),
    "a batch in unequal parts": ("tokenizer", "accumulate=3", "batch_size=8 is not a multiple of accumulate=3"),
    "widths and groups": ("tokenizer", "tokenizer.channels=10", "tokenizer.channels is 10, not a multiple of"),
    "a ladder that falls": ("tokenizer", "sides=(1,20,8)", "Sides (1, 20, 8) are not an increasing list"),
    "a ladder of nothing": ("tokenizer", "sides=()", "Sides () are not an increasing list of positive integers"),
    "no steps": ("tokenizer", "steps=0", "steps is 0; expected 1 or more"),
    "more devices than there are": ("tokenizer", "mesh.data=3", "does not make the 1 devices here"),
    "pixels for a ratio": ("tokenizer", "data.resize=288", "data.resize is 288; expected 1 to 16: it is not in pixels"),
    "a picture folder that is none": ("tokenizer", "data.source=folder", "data.path is empty; expected a path."),
    "a stage without its start": ("next_scale", "init_from=", "'next_scale' needs init_from"),
    "a start that is not there": ("next_scale", "init_from=/nowhere", "/nowhere is not a model directory"),
    "pictures for tokens": ("next_scale", "data.source=glyphs", "trains from a token cache: write one"),
    "a cache that is not there": ("next_scale", "data.path=/nowhere", "'/nowhere' is no token cache"),
    "heads and width": ("next_scale", "transformer.heads=3", "transformer.width is 16, not a multiple of"),
    "sample labels of no class": ("next_scale", "sample_labels=(0,7)", "sample_labels=(0, 7) is not a list of the"),
    "no sample labels": ("next_scale", "sample_labels=()", "sample_labels=() is not a list of the classes 0 to 2"),
    "a sample schedule that is none": ("next_scale", "sample_schedule=quick", "Schedule 'quick' is unknown"),
    "samples by a branch to come": ("next_scale", "sample_schedule=small", "'small' has masked steps, which stage"),
    "classes of another number": ("next_scale", "transformer.num_classes=4", "The token cache has 3 classes"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_training_refuses(files, tmp_path, refused, case):
    stage, override, expected = OVERRIDES[case]
    workdir = tmp_path / "run"
    options = [f"--config.{override}"] if "sample" not in case else ["--config.sample_every=2", f"--config.{override}"]
    if "sample_labels" not in override:
        options.append("--config.sample_labels=(0,1)")
    assert expected in refused("train", f"--config={files[stage]}", "--workdir", workdir, *options)
    assert not workdir.exists()


def test_a_missing_config_file_is_named(tmp_path, refused):
    said = refused("train", "--config=/nowhere/c.py", "--workdir", tmp_path / "run")
    assert said.startswith("Config file /nowhere/c.py does not exist")


NO_CONFIGS = {
    "a text": ("README.md", "# A title\n\nTrain a model first.\n", r" is not Python \(invalid syntax, line 3\)\."),
    "what fails": ("c.py", "x = 1\ny = x/0\n", r" fails at line 2 with ZeroDivisionError \(division by zero\)\."),
    "what fails in get_config": (
        "c.py",
        "def get_config():\n    return {}['a']\n",
        r" fails at line 2 with KeyError \('a'\)\.",
    ),
    "what raises": ("c.py", "raise ValueError('mine\\nx')\n", r" fails at line 1 with ValueError \(mine\)\."),
    "no get_config": ("c.py", "config = {}\n", r" has no get_config\(\), which is to return the config\."),
}


@pytest.mark.parametrize("case", NO_CONFIGS)
def test_a_file_that_is_no_config_is_named(tmp_path, refused, case):
    name, content, expected = NO_CONFIGS[case]
    file = tmp_path / name
    file.write_text(content)
    said = refused("train", f"--config={file}", "--workdir", tmp_path / "run")
    assert re.fullmatch(f"Config file {re.escape(str(file))}{expected}", said), said
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_kind_is_named(files, tmp_path, refused):
    (tmp_path / "config.json").write_text('{"stage": true}')
    for path in (tmp_path / "config.json", tmp_path):
        said = refused("train", f"--config={path}", "--workdir", tmp_path / "run")
        assert said == f"The config {path} is no Python file; give one, or a name such as folder_masked."
    said = refused("train", f"--config={files['tokenizer']}:small", "--workdir", tmp_path / "run")
    assert said.endswith("cannot be loaded: get_config() takes 0 positional arguments but 1 was given.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["speed", "optimizer.speed", "data.speed", "sides[0]", "evals[0].every"])
def test_a_field_that_does_not_exist_is_named_with_the_file(files, tmp_path, refused, field):
    file = files["tokenizer"]
    said = refused("train", f"--config={file}", "--workdir", tmp_path / "run", f"--config.{field}=3")
    assert said.startswith(f"No such field in the config of {file}: ")
    assert "speed" in said.removeprefix(f"No such field in the config of {file}: ") or "index" in said
    assert not (tmp_path / "run").exists()


def test_masked_training_needs_a_next_scale_model(files, starts, tmp_path, refused):
    start = f"--config.init_from={starts / 'tokenizer'}"
    said = refused("train", f"--config={files['masked']}", "--workdir", tmp_path / "run", start)
    assert "has no next-scale transformer" in said


def test_a_cache_of_another_tokenizer_is_refused(files, starts, tmp_path, refused):
    model = from_pretrained(starts / "tokenizer")
    codebook = model.params["tokenizer"]["quantizer"]["codebook"]
    model.params["tokenizer"]["quantizer"]["codebook"] = codebook.at[0, 0].add(1)
    model.save(tmp_path / "other", source="a test")
    start = f"--config.init_from={tmp_path / 'other'}"
    said = refused("train", f"--config={files['next_scale']}", "--workdir", tmp_path / "run", start)
    assert "was written by another tokenizer than that of" in said
    assert not (tmp_path / "run").exists()


def photograph(width, height):
    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


FOLDERS = {
    "empty": ({}, "holds no pictures; put"),
    "an empty class": ({"a/1.jpg": photograph(20, 20), "b/notes.txt": b"hello"}, "Class folder"),
    "splits": ({"train/a/1.jpg": photograph(20, 20), "val/a/1.jpg": photograph(20, 20)}, "pictures/train'"),
    "a cut picture": ({"1.jpg": photograph(20, 20), "2.jpg": photograph(40, 40)[:300]}, "2.jpg' cannot be read"),
    "a text called picture": ({"1.jpg": photograph(20, 20), "2.png": b"hello"}, "2.png' cannot be read"),
    "an empty picture": ({"1.jpg": photograph(20, 20), "2.png": b""}, "2.png' cannot be read"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder_of_pictures_makes_no_cache(starts, tmp_path, refused, write_config, case):
    pictures, expected = FOLDERS[case]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    file = write_config(tmp_path / "c.py", tiny.tokenizer_config(data=DataConfig("folder", path=str(folder))))
    before = left(tmp_path)
    options = ["--model", starts / "tokenizer", f"--config={file}", "--batch-size=2", "--output", tmp_path / "out"]
    assert expected in refused("export", "tokens", *options)
    assert [name for name in left(tmp_path) if "__pycache__" not in name] == before


def test_an_export_may_leave_out_broken_pictures_and_counts_them(starts, tmp_path, capsys, write_config):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(photograph(40, 40)[: 300 if i % 2 else None])
    file = write_config(tmp_path / "c.py", tiny.tokenizer_config(data=DataConfig("folder", path=str(folder))))
    options = ["--model", starts / "tokenizer", f"--config={file}", "--batch-size=2", "--output", tmp_path / "out"]
    export.run(["tokens", *map(str, options), "--skip-broken"])
    said = capsys.readouterr().out
    assert "Tokens of 2 pictures" in said
    assert f"Broken pictures that were left out: 2, listed in {tmp_path / 'out' / 'broken.txt'}" in said


def test_a_corrupt_picture_stops_training_with_its_name(tmp_path, refused, write_config):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(photograph(40, 40)[:300])
    config = dataclasses.replace(tiny.tokenizer_config(data=DataConfig("folder", path=str(folder))), batch_size=2)
    said = refused("train", f"--config={write_config(tmp_path / 'c.py', config)}", "--workdir", tmp_path / "run")
    assert f"Picture '{folder / '1.jpg'}' cannot be read" in said


EXPORTS = {
    "endless glyphs": ([], "data.source='glyphs' is endless; say how many pictures to take"),
    "no crops": (["--count=3", "--crops=0"], "crops=0"),
    "no pictures": (["--count=0"], "count=0"),
    "a seed below 0": (["--count=3", "--seed=-1"], "seed is -1; use an integer from 0"),
    "no such field": (["--count=3", "--config.data.speed=3"], "speed"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exporting_tokens_refuses(files, starts, tmp_path, refused, case):
    options, expected = EXPORTS[case]
    common = ["--model", starts / "tokenizer", f"--config={files['tokenizer']}", "--output", tmp_path / "out"]
    assert expected in refused("export", "tokens", *common, *options)
    assert not [name for name in left(tmp_path) if "out" in name]


def test_nothing_that_exists_is_written_over(files, starts, tmp_path, refused):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    tokens = ["--model", starts / "tokenizer", f"--config={files['tokenizer']}", "--count=8", "--output", taken]
    assert "exists already; remove it" in refused("export", "tokens", *tokens)
    assert "exists already; remove it" in refused("export", "model", "--workdir", tmp_path / "run", "--output", taken)
    assert left(taken) == ["mine.txt"]


@pytest.mark.parametrize(("made", "expected"), [(False, "has no checkpoints"), (True, "has no whole checkpoint yet")])
def test_a_work_directory_without_a_checkpoint_has_no_model(tmp_path, refused, made, expected):
    (tmp_path / "run" / ("checkpoints" if made else "")).mkdir(parents=True)
    said = refused("export", "model", "--workdir", tmp_path / "run", "--output", tmp_path / "out")
    assert expected in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["fly"],
        [],
        ["train", "--workdir=x"],
        ["train", "--config=x", "--workdir=y", "--speed=3"],
        ["sample", "--model=x", "--labels=0", "--output=y", "--seed=some"],
        ["export", "model", "--workdir=x", "--output=y", "--config.steps=3"],
        ["export"],
    ],
    ids=" ".join,
)
def test_a_malformed_command_line_exits_with_2_and_says_how_it_goes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "usage: hmar-jax" in capsys.readouterr().err
