"""What a work directory insists on: one process, the same classes, and settings that its stage uses."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_training import CLASSES, LADDER, SIZE, TRANSFORMER, idle_steps, stage_config

from hmar_jax.config import (
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TransformerConfig,
)
from hmar_jax.data.tokens import write_shard
from hmar_jax.errors import InputError
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.objectives import base, open_start
from hmar_jax.training.settings import check_same_classes, check_used, used
from hmar_jax.training.workdir import check_same_run

HERE = Path(__file__).parent


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())


def rename_classes(cache, names):
    file = cache / "cache.json"
    header = json.loads(file.read_text()) | {"class_names": names}
    file.write_text(json.dumps(header))


def rename_classes_of_model(model, names):
    file = model / "config.json"
    meta = json.loads(file.read_text())
    meta["model"]["class_names"] = names
    del meta["digest"]
    file.write_text(json.dumps(meta))


# --- one process


def test_a_second_training_in_a_work_directory_is_refused_and_the_first_is_not_disturbed(starts, tmp_path, idle):
    code = f"""
    import sys, time
    sys.path.insert(0, {str(HERE)!r})
    from pathlib import Path
    from hmar_jax.parallel.processes import locked
    with locked(Path({str(tmp_path)!r}), "trains"):
        print("held", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=f"Another process trains in {tmp_path}: PID {first.pid} on .*, since"):
            loop.train(stage_config("next_scale", starts, steps=1), tmp_path)
        assert sorted(tmp_path.iterdir()) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert loop.train(stage_config("next_scale", starts, steps=1), tmp_path) is not None
    assert not (tmp_path / ".lock").exists()


def test_a_training_that_was_held_up_until_another_took_over_saves_nothing_more(starts, tmp_path, monkeypatch):
    def take_over(step, metrics):
        (tmp_path / ".lock").write_text('{"token": "another"}')
        return metrics

    monkeypatch.setattr(loop, "jit_train_step", lambda step, *_: step)
    monkeypatch.setattr(loop, "make_train_step", idle_steps(take_over))
    with pytest.raises(InputError, match=f"Another process trains in {tmp_path} by now"):
        loop.train(stage_config("next_scale", starts), tmp_path)
    assert Checkpoints(tmp_path).latest() is None


# --- class names


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("ABC", "ABD", "H has the classes A, B, C, but T has A, B, D, so choose."),
        ("AB", "ABC", "H has the classes A, B, but T has A, B, C, so choose."),
        (["1", "10", "zzz"], ["0", "1", "10"], "H has the classes 1, 10, zzz, but T has 0, 1, 10, so choose."),
        (["a" * 99, "b\n"], ["c"], f"H has the classes {'a' * 31}…, b\\n, but T has c, so choose."),
    ],
)
def test_class_names_that_differ_are_refused_with_both_lists(here, there, expected):
    with pytest.raises(InputError) as caught:
        check_same_classes(("H", list(here)), ("T", list(there)), "so choose")
    assert str(caught.value) == expected


def test_of_many_class_names_those_around_the_first_that_differs_are_shown():
    names = [f"c{i}" for i in range(1000)]
    with pytest.raises(InputError) as caught:
        check_same_classes(("H", names), ("T", [*names[:500], "x", *names[501:]]), "so choose")
    said = str(caught.value)
    assert (
        "…, c498, c499, c500, c501, c502, c503, c504, c505, … (1000 in all), but T has …, c498, c499, x, c501" in said
    )


@pytest.mark.parametrize(("here", "there"), [("ABC", "ABC"), ("", "ABC"), ("ABC", "")])
def test_the_same_names_or_none_fit(here, there):
    check_same_classes(("H", list(here)), ("T", tuple(there)), "so choose")


@pytest.mark.parametrize("names", [["B", "A", "C"], ["A", "B", "zzz"], ["A", "B"]])
def test_the_masked_stage_refuses_a_cache_of_other_classes_than_its_model(starts, tmp_path, idle, names):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    rename_classes(cache, names)
    config = stage_config("masked", starts, steps=1, data=DataConfig("tokens", path=str(cache)))
    expected = (
        f"The token cache has the classes {', '.join(names)}, but init_from=.* has A, B, C, whose class embeddings"
    )
    with pytest.raises(InputError, match=expected):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def damage_header(cache):
    (cache / "cache.json").write_text("{}")


def damage_records(cache):
    """Leaves the first record, which is looked at as the cache is opened, and damages others."""
    (shard,) = cache.glob("*.array_record")
    records = [np.int32(label).tobytes() + bytes(2 * 2 * LADDER.length) for label in [0] * 2 + [-1] * 30]
    write_shard(shard, records, cache)
    header = json.loads((cache / "cache.json").read_text())
    del header["digest"], header["ends"]
    (cache / "cache.json").write_text(json.dumps(header))


def cut_shard(cache):
    (shard,) = cache.glob("*.array_record")
    os.truncate(shard, 1000)


def no_shard(cache):
    (shard,) = cache.glob("*.array_record")
    shard.unlink()


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
@pytest.mark.parametrize("damage", [damage_header, damage_records, cut_shard, no_shard])
def test_a_damaged_cache_is_refused_and_leaves_nothing(starts, tmp_path, idle, damage, there):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    damage(cache)
    if there == "an empty folder":
        (tmp_path / "run").mkdir()
    config = stage_config("next_scale", starts, steps=9, data=DataConfig("tokens", path=str(cache)))
    with pytest.raises(InputError, match="Token cache"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run").exists() == (there == "an empty folder")
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("", {"codebook_size": 17}, "tokens was written by another tokenizer"),
        ("validation", {"codebook_size": 17}, "validation was written by another tokenizer"),
        ("validation", {"tokenizer": "another"}, "validation was written by another tokenizer"),
        ("validation", {"class_names": ["A", "C", "B"]}, "has the classes A, B, C, but .*validation has A, C, B"),
        ("validation", {"crops": 7}, "its record has"),
    ],
)
def test_a_cache_and_its_held_out_part_must_be_of_this_tokenizer(starts, tmp_path, idle, part, changes, expected):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    shutil.copytree(starts / "tokens", cache / "validation")
    header = json.loads((cache / part / "cache.json").read_text()) | changes
    del header["digest"]
    (cache / part / "cache.json").write_text(json.dumps(header))
    config = stage_config("next_scale", starts, data=DataConfig("tokens", path=str(cache)), evals=(EvalConfig(),))
    with pytest.raises(InputError, match=expected):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("nameless", ["the cache", "the model"])
def test_the_masked_stage_takes_the_names_that_there_are(starts, tmp_path, idle, nameless):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    model = shutil.copytree(starts / "next_scale", tmp_path / "model")
    if nameless == "the cache":
        rename_classes(cache, [])
    else:
        rename_classes_of_model(model, [])
    data = DataConfig("tokens", path=str(cache))
    loop.train(stage_config("masked", starts, steps=1, data=data, init_from=str(model)), tmp_path / "run")
    trained = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert trained["model"]["class_names"] == list(CLASSES)


def test_fine_tuning_on_other_classes_is_allowed(starts, tmp_path, idle):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    rename_classes(cache, ["x", "y", "z"])
    data, start = DataConfig("tokens", path=str(cache)), str(starts / "next_scale")
    loop.train(stage_config("next_scale", starts, steps=1, data=data, init_from=start), tmp_path / "run")
    trained = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert trained["model"]["class_names"] == ["x", "y", "z"]


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
def test_a_run_does_not_go_on_with_a_cache_of_other_classes(starts, tmp_path, idle, stage):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    model = shutil.copytree(starts / ("tokenizer" if stage == "next_scale" else "next_scale"), tmp_path / "model")
    data = DataConfig("tokens", path=str(cache))
    config = stage_config(stage, starts, steps=1, data=data, init_from=str(model))
    loop.train(config, tmp_path / "run")
    rename_classes(cache, ["C", "B", "A"])
    if stage == "masked":  # so that the two agree, and the run alone does not
        rename_classes_of_model(model, ["C", "B", "A"])
    with pytest.raises(
        InputError, match=r"The data has the classes C, B, A, but the run in .*/run has A, B, C, and lab"
    ):
        loop.train(dataclasses.replace(config, steps=2), tmp_path / "run")
    assert Checkpoints(tmp_path / "run").latest() == 1


@pytest.mark.parametrize("source", ["glyphs", "folder"])
def test_a_tokenizer_does_not_go_on_with_other_classes(starts, tmp_path, idle, source):
    data = DataConfig("glyphs", classes="ABC")
    if source == "folder":
        for name in "ABC":
            (tmp_path / "pictures" / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((SIZE, SIZE, 3), 9 * i, np.uint8)).save(
                    tmp_path / "pictures" / name / f"{i}.png"
                )
        data = DataConfig("folder", path=str(tmp_path / "pictures"))
    loss = TokenizerLossConfig(adversarial=0.0, kmeans_batches=0)
    config = stage_config("tokenizer", starts, steps=1, data=data, tokenizer_loss=loss)
    loop.train(config, tmp_path / "run")
    if source == "folder":
        (tmp_path / "pictures" / "A").rename(tmp_path / "pictures" / "Z")
        other, names = data, "B, C, Z"
    else:
        other, names = DataConfig("glyphs", classes="ABQ"), "A, B, Q"
    with pytest.raises(InputError, match=f"The data has the classes {names}, but the run in .* has A, B, C"):
        loop.train(dataclasses.replace(config, steps=2, data=other), tmp_path / "run")


# --- settings that a stage does not use

OTHER = dataclasses.replace(TRANSFORMER, depth=4)


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        (
            "masked",
            {"transformer": OTHER},
            r"transformer\.depth is 4 in this config and 2 in init_from=.*stage 'masked'",
        ),
        ("masked", {"sides": (1, 4)}, r"sides is \(1, 4\) in this config and \(1, 2, 8\) in init_from="),
        ("next_scale", {"sides": (1, 4)}, r"sides is \(1, 4\) in this config and \(1, 2, 8\) in init_from="),
        (
            "next_scale",
            {"tokenizer": TokenizerConfig(channels=64)},
            r"tokenizer\.channels is 64 in this config and 8 in",
        ),
        (
            "next_scale",
            {"tokenizer_loss": TokenizerLossConfig(l1=0.5)},
            r"'next_scale' does not use tokenizer_loss\.l1",
        ),
        (
            "masked",
            {"tokenizer_loss": TokenizerLossConfig(l1=0.5)},
            r"'masked' does not use tokenizer_loss\.l1, which is",
        ),
        ("tokenizer", {"objective": ObjectiveConfig("uniform")}, r"'tokenizer' does not use objective\.scale_weights"),
        (
            "tokenizer",
            {"objective": ObjectiveConfig(leak_free=True)},
            r"does not use objective\.leak_free, which is True",
        ),
        (
            "next_scale",
            {"objective": ObjectiveConfig(leak_free=True)},
            r"'next_scale' does not use objective\.leak_free",
        ),
        (
            "next_scale",
            {"objective": ObjectiveConfig(per_sample_masks=True)},
            r"does not use objective\.per_sample_masks",
        ),
        (
            "masked",
            {"objective": ObjectiveConfig("equal")},
            r"'masked' does not use objective\.scale_weights, which is eq",
        ),
        ("tokenizer", {"transformer": OTHER}, r"'tokenizer' does not use transformer\.\w+, which is"),
        ("tokenizer", {"remat": "all"}, "'tokenizer' does not use remat, which is all; leave it out of the config"),
        ("tokenizer", {"scan_layers": True}, "'tokenizer' does not use scan_layers"),
    ],
)
def test_a_setting_that_the_stage_does_not_use_is_refused(starts, tmp_path, stage, changes, expected):
    with pytest.raises(InputError, match=expected) as caught:
        loop.train(stage_config(stage, starts, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_init_from_has_may_be_repeated(starts):
    model = open_start(stage_config("masked", starts)).config
    repeated = {"sides": model.ladder.sides, "tokenizer": model.tokenizer}
    check_used(stage_config("next_scale", starts, **repeated), model)
    other_classes = dataclasses.replace(model.transformer, masked=False, num_classes=7)
    check_used(stage_config("masked", starts, transformer=other_classes, **repeated), model)
    check_used(stage_config("masked", starts, transformer=TransformerConfig.preset("d16", masked=False)), model)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("masked", {"transformer": OTHER, "sides": (1, 4), "tokenizer_loss": TokenizerLossConfig(adversarial=0.0)}),
        ("next_scale", {"sides": (1, 4), "tokenizer_loss": TokenizerLossConfig(l1=1.0)}),
        ("tokenizer", {"transformer": OTHER, "objective": ObjectiveConfig("uniform")}),
    ],
)
def test_on_resume_only_what_the_stage_uses_is_compared(starts, stage, changes):
    config = stage_config(stage, starts)
    check_same_run(dataclasses.replace(config, **changes), config, Path("run"))
    assert used(dataclasses.replace(config, **changes)) == used(config)


# --- what is read, and what is left behind


@pytest.mark.parametrize("stage", ["next_scale", "masked"])
def test_a_run_ends_when_its_start_is_gone(starts, tmp_path, monkeypatch, stage):
    start = shutil.copytree(starts / ("tokenizer" if stage == "next_scale" else "next_scale"), tmp_path / "start")

    def remove(step, metrics):
        shutil.rmtree(start, ignore_errors=True)
        return metrics

    monkeypatch.setattr(loop, "jit_train_step", lambda step, *_: step)
    monkeypatch.setattr(loop, "make_train_step", idle_steps(remove))
    loop.train(stage_config(stage, starts, steps=2, init_from=str(start)), tmp_path / "run")
    assert not start.exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_model_to_start_from_is_opened_once(starts, tmp_path, monkeypatch, idle):
    opened, open_model = [], base.open_model
    monkeypatch.setattr(base, "open_model", lambda *args: opened.append(args) or open_model(*args))
    loop.train(stage_config("masked", starts, steps=1), tmp_path / "run")
    assert len(opened) == 1


@pytest.mark.parametrize("there", [False, True], ids=["a new work directory", "one with a note"])
def test_a_damaged_cache_leaves_no_work_directory_behind(starts, tmp_path, idle, there, capsys):
    cache = shutil.copytree(starts / "tokens", tmp_path / "tokens")
    (shard,) = cache.glob("*.array_record")
    content = bytearray(shard.read_bytes())
    content[100:2000] = bytes(b ^ 0x5A for b in content[100:2000])
    shard.write_bytes(content)
    workdir = tmp_path / "run"
    if there:
        workdir.mkdir()
        (workdir / "note.txt").write_text("mine")
    data = DataConfig("tokens", path=str(cache))
    with pytest.raises(InputError, match=r"Token cache .* is damaged"):
        loop.train(stage_config("next_scale", starts, data=data), workdir)
    assert os.listdir(workdir) == ["note.txt"] if there else not workdir.exists()


# --- Ctrl-C

INTERRUPTED = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from tiny_training import idle_steps, next_scale_config, quick_compilation
from hmar_jax.commands import main, train
from hmar_jax.training import loop
from hmar_jax.training.metrics import MetricsWriter

advance = MetricsWriter.advance
def slow(self):
    advance(self)
    print("step", flush=True)
    time.sleep({pause})

MetricsWriter.advance = slow
loop.make_train_step = idle_steps()
train.load = lambda *_: next_scale_config(Path(sys.argv[1]), steps=10**6, checkpoint_every=10**6)
sys.exit(main.main(["train", "--config=x", "--workdir=" + sys.argv[2], "--no-distributed"]))
"""


@pytest.mark.parametrize(
    ("signals", "code", "saved"),
    [([signal.SIGINT], 130, True), ([signal.SIGTERM], 0, True), ([signal.SIGINT] * 2, -signal.SIGINT, False)],
    ids=["one Ctrl-C", "SIGTERM", "two"],
)
def test_the_first_ctrl_c_saves_and_leaves_the_second_leaves_at_once(starts, tmp_path, signals, code, saved):
    script = INTERRUPTED.format(here=str(HERE), pause=0.1 if saved else 600)
    command = [sys.executable, "-c", script, str(starts), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "step\n", process.stderr.read()[-3000:]
        process.send_signal(signals[0])
        for number in signals[1:]:
            assert any("another Ctrl-C leaves at once" in line for line in iter(process.stderr.readline, ""))
            process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, said[-3000:]
    assert "Traceback" not in said
    done = Checkpoints(tmp_path).latest()
    assert (done is not None and done >= 1) == saved
    assert (tmp_path / ".lock").exists() != saved


def test_ctrl_c_in_the_last_step_keeps_the_model_and_is_heard(starts, tmp_path, monkeypatch):
    def press(step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(loop, "jit_train_step", lambda step, *_: step)
    monkeypatch.setattr(loop, "make_train_step", idle_steps(press))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
    with pytest.raises(KeyboardInterrupt):
        loop.train(stage_config("next_scale", starts, steps=2), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch])
def test_checkpoints_that_are_no_folder_are_refused_before_anything_is_written(starts, tmp_path, idle, make):
    make(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="checkpoints is no folder; remove it, or choose another --workdir"):
        loop.train(stage_config("next_scale", starts, steps=1), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoints"]
