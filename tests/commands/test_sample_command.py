"""`hmar-jax sample --classes`: many pictures of each class in one directory, gone on with by the same command."""

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY, lively_model, tiny

from hmar_jax import from_pretrained
from hmar_jax.bulk import samples
from hmar_jax.commands.main import main
from hmar_jax.parallel import processes
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.scales import ScaleLadder


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs `hmar-jax sample` on a tiny model; its exit code."""
    logging.getLogger("hmar_jax").setLevel(logging.WARNING)
    model = lively_model(TINY).save(tmp_path_factory.mktemp("sample") / "model", source="a test")
    return lambda *options: main(["sample", "--model", str(model), *map(str, options)])


def drawn(folder):
    """(label, index) of the samples in a directory."""
    return sorted(
        pair
        for file in (folder / "tokens").iterdir()
        for part in [np.load(file)]
        for pair in zip(part["labels"].tolist(), part["indices"].tolist(), strict=True)
    )


def test_classes_are_drawn_and_the_same_command_goes_on(command, tmp_path, capsys):
    options = ["--output", tmp_path, "--batch=4", "--seed=3", "--cfg=2"]
    assert command("--classes=b,3-4", "--per-class=2", *options) == 0
    shown = "Folders have the numbers of classes: 1 has b, 3 has 3, 4 has 4"
    assert capsys.readouterr().out == f"6 pictures, 2 of each of 3 classes, are in {tmp_path}\n{shown}\n"
    assert drawn(tmp_path) == [(1, 0), (1, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    assert command("--classes=all", "--per-class=2", *options) == 0
    shown = "Folders have the numbers of classes: 0 has a, 1 has b, 2 has c, 3 has d, 4 has e"
    said = f"10 pictures, 2 of each of 5 classes, are in {tmp_path}, 6 of them from before\n{shown}\n"
    assert capsys.readouterr().out == said
    assert len(drawn(tmp_path)) == len(list(tmp_path.glob("pictures/?/0000?.png"))) == 10


def test_array_records_can_be_asked_for(command, tmp_path, capsys):
    assert command("--classes=0", "--per-class=4", "--batch=4", "--format=array_record", "--output", tmp_path) == 0
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["0000000000.array_record"]


def test_a_var_is_drawn_by_its_own_schedule_unless_told_otherwise(tmp_path, monkeypatch):
    asked = []

    def sample_classes(model, settings, *_, **__):
        asked.append(settings.schedule)
        return 0

    monkeypatch.setattr(samples, "sample_classes", sample_classes)
    var = tiny(masked=False, pattern="block_causal")
    lively_model(var).save(tmp_path / "var", source="a test")
    options = ["sample", f"--model={tmp_path / 'var'}", "--classes=0", f"--output={tmp_path / 'out'}"]
    assert main(options) == main([*options, "--schedule=next-scale"]) == 0
    assert asked == [Schedule.preset(name, var.ladder) for name in ("var", "next-scale")]


REFUSED = {
    "other settings": (["--classes=0", "--seed=4"], "with another seed; choose a new directory"),
    "other scalars": (["--classes=0", "--seed=3", "--top-k=5"], "with another schedule; choose a new"),
    "a class that is none": (["--classes=0,Q"], "Label 'Q' is not a class of this model; expected a number or one of"),
    "a class too high": (["--classes=3-5"], "Label 5 is out of range; this model has classes 0 to 4"),
    "a range the wrong way": (["--classes=4-2"], "Label '4-2' is not a class of this model"),
    "no pictures": (["--classes=all", "--per-class=0"], "0 per class were asked for"),
    "no batch": (["--classes=all", "--batch=0"], "batch is 0; expected 1 to"),
    "a seed below 0": (["--classes=all", "--seed=-1"], "seed is -1; expected 0 to 4294967295"),
    "half a job": (["--classes=all", "--coordinator=x"], "--coordinator='x', --processes=None, --process=None: give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_a_sentence(command, tmp_path, capsys, case):
    options, expected = REFUSED[case]
    if "other" in case:
        command("--classes=0", "--per-class=4", "--batch=4", "--seed=3", "--output", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert command(*options, "--output", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--labels=0", "--per-class=0"], "not with --labels, only with --classes: --per-class"),
        (["--labels=0", "--batch=0", "--format=png"], "only with --classes: --batch, --format"),
        (["--labels=0", "--coordinator="], "only with --classes: --coordinator"),
        (["--labels=0", "--processes=2", "--process=0"], "only with --classes: --processes, --process"),
        (["--classes=0", "--trace"], "not with --classes, only with --labels: --trace"),
        (["--classes=0", "--labels=0"], "not allowed with argument"),
        ([], "one of the arguments --labels --classes is required"),
        (["--classes=0", "--format=jpeg"], "invalid choice: 'jpeg'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(command, tmp_path, capsys, options, expected):
    with pytest.raises(SystemExit) as left:
        command(*options, "--output", tmp_path)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_command_joins_its_job_unless_told_not_to(command, tmp_path, monkeypatch):
    joined = []
    monkeypatch.setattr(processes, "join", lambda *arguments: joined.append(arguments))
    for options in ([], ["--coordinator=h:1", "--processes=3", "--process=2"], ["--no-distributed"]):
        assert command("--classes=9", *options, "--output", tmp_path) == 2
    assert joined == [(None, None, None), ("h:1", 3, 2)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_finishes_its_batch_and_leaves(command, tmp_path, capsys, monkeypatch, number, code):
    def sample_classes(*_, stop, **__):
        assert not stop(1)
        os.kill(os.getpid(), number)
        return None if stop(2) else 5

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to have it back
    monkeypatch.setattr("hmar_jax.bulk.samples.sample_classes", sample_classes)
    assert command("--classes=0", "--output", tmp_path) == code
    assert capsys.readouterr().out == f"Stopped; run the command again to go on with the pictures in {tmp_path}\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("which", "function", "remedy"),
    [
        ("--labels=0", "sampling.program.sample", "fewer labels"),
        ("--classes=0", "bulk.samples._sample", "a smaller --batch"),
    ],
)
def test_too_little_memory_is_a_sentence_with_the_remedy(
    command, tmp_path, capsys, monkeypatch, which, function, remedy
):
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 91268055040 bytes."

    def fail(*_):
        raise jax.errors.JaxRuntimeError(f"{said}\nBufferAssignment: …")

    monkeypatch.setattr(f"hmar_jax.{function}", fail)
    assert command(which, "--output", tmp_path) == 2
    expected = f"hmar-jax sample: The device has too little memory ({said[:-1]}); choose {remedy}.\n"
    assert capsys.readouterr().err == expected


NAMES = ("10", "11", "9", "fox, red", "a/b")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A model directory whose classes have the names `NAMES`."""
    config = dataclasses.replace(TINY, class_names=NAMES, ladder=ScaleLadder((1,)))
    config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, depth=1))
    return lively_model(config).save(tmp_path_factory.mktemp("named") / "model", source="a test")


def test_pictures_have_the_names_that_were_asked_for(named, tmp_path, caplog):
    options = ["sample", f"--model={named}", '--labels=9-11,"fox, red",a/b', f"--output={tmp_path}"]
    assert main(options) == 0
    names = ["00000-class9", "00001-class10", "00002-class11", "00003-classfox, red", "00004-classa_b"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*(f"{name}-seed0.png" for name in names), "grid.png"]
    out = from_pretrained(named).sample([2, 0, 1, 3, 4])
    for name, image in zip(names, out.images, strict=True):
        shown = np.asarray(Image.open(tmp_path / f"{name}-seed0.png"))
        np.testing.assert_array_equal(shown, np.floor(image * 255 + 0.5))
    with caplog.at_level(logging.INFO, "hmar_jax"):
        assert main(options) == 0
    first, second, third = (f"{tmp_path}/{name}-seed0.png" for name in names[:3])
    assert f"Replacing {first}, {second}, {third} and 3 more." in caplog.messages


@pytest.mark.parametrize("name", ["grid.png", "00000-class9-seed0.png", "00000-class9-seed0-trace.gif"])
def test_what_is_no_picture_is_not_replaced_by_one(named, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["sample", f"--model={named}", "--labels=9", f"--output={tmp_path}", "--trace"]) == 2
    kind = Path(name).suffix[1:].upper()
    assert f"{name}, which is there already and is not a {kind} file; choose another file." in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def test_folders_of_many_pictures_are_told_by_name(named, tmp_path, capsys):
    options = ["--per-class=1", "--batch=1", f"--output={tmp_path}"]
    assert main(["sample", f"--model={named}", "--classes=9-10", *options]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "Folders have the numbers of classes: 2 has 9, 0 has 10"
    assert drawn(tmp_path) == [(0, 0), (2, 0)]


@pytest.mark.parametrize("which", ["--labels", "--classes"])
def test_how_classes_are_read_is_in_the_help(which, capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "by name, or by number from 0 where no class has a number for a name" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("which", ["--labels", "--classes"])
def test_a_class_number_is_refused_where_names_are_numbers(named, which, tmp_path, capsys):
    assert main(["sample", f"--model={named}", f"{which}=0", f"--output={tmp_path / 'out'}"]) == 2
    assert (
        "Label '0' is not a class of this model; expected one of 10, 11, 9, \"fox, red\", a/b (names and "
        "ranges that have a comma in double quotes); as some of these are" in (capsys.readouterr().err)
    )
