"""Command lines: whatever is given to an option, a sentence and exit code 2, or the command goes on as it does usually.

Commands run in this process, up to where they would train, draw, compile or measure.
"""

import contextlib
import hashlib
import io
import os

import hypothesis
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import TINY, lively_model

from hmar_jax.commands.main import main
from hmar_jax.errors import InputError
from hmar_jax.sampling.schedule import Schedule

REACHED = "This is as far as the test goes."
CONFIG = """
from hmar_jax.config import DataConfig, TrainConfig, to_config_dict

def get_config():
    data = DataConfig("tokens", path="cache")
    return to_config_dict(TrainConfig(init_from="model", data=data))
"""
PICTURES = """
from hmar_jax.config import DataConfig, TrainConfig, to_config_dict

def get_config():
    return to_config_dict(TrainConfig(stage="tokenizer", data=DataConfig("folder", path="pictures")))
"""
FILES = ("keep.json", "keep.png", "keep.md", "keep.safetensors", "keep.py")
PATHS = [
    *FILES, "folder", "folder/x", "pipe", "pipe.json", "pipe.png", "loop", "loop.json", "loop.png", "full.json",
    "full.png", "zero.json", "zero.png", "keep.json/x.json", "folder.json", "folder.png", "A" * 300,
    "A" * 300 + ".json", "A" * 249 + ".png", "\udcff.json", "\udcff.png", "\n.png", "\x1b[2J.json", "model",
    "model/config.json", "/dev/zero", "/dev/full", "~nobody-here/x", "gs://bucket/x", "/", ".", "..", "~",
]  # fmt: skip
WORDS = [
    "", " ", "\0", "\n", "\x1b[2J", "A" * 5000, "\udcff", "--", "-", "=", "²", "٣", "%s", "{0}", "*", "[]", "(",
    "None", "True", "0-999999999", "0,1", "a,,b", '"', "a-b-c", "small", "cosine:4", "power1e308:4",
    "equal:999999999", "power" + "9" * 400 + ":4", "1,2,3", "1,30000", ",".join(map(str, range(1, 3000))), "v5e:2x2",
    "v5e:99999x99999", "h200:999999999", "d16", "256", "0,0,1,1", "0,0,-1,1e9", ",,,", ":", "1:2", "5:1", "all",
]  # fmt: skip
NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "30000000",
    "500000000",
    str(10**30),
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
    "1e400",
    "0.5",
    "1_0",
]

# command → what must be there; its options; for some of these a value that is right
COMMANDS = {
    "schedule show": (
        ["small"],
        [
            "--pixels", "--sides", "--model", "--depth", "--cfg", "--refine-cfg", "--temperature", "--top-k",
            "--top-p", "--noise", "--order", "--json", "--output", "",
        ],
    ),
    "sample": (
        ["--model=model", "--labels=a", "--output=out"],
        [
            "--model", "--revision", "--labels", "--classes", "--schedule", "--cfg", "--top-k", "--seed",
            "--dtype", "--output", "--per-class", "--batch", "--format", "--processes", "--process",
        ],
    ),
    "sample ": (
        ["--model=model", "--classes=a", "--output=out", "--no-distributed"],
        ["--classes", "--schedule", "--seed", "--output", "--per-class", "--batch", "--format"],
    ),
    "edit": (
        ["--model=model", "--image=picture.png", "--box=0,0,2,2", "--output=out.png"],
        [
            "--model", "--image", "--mask", "--box", "--keep", "--pad", "--label", "--variants", "--feather",
            "--schedule", "--seed", "--output",
        ],
    ),
    "convert": (
        ["--kind=vae", "--input=keep.safetensors", "--sides=1,2,3", "--output=out"],
        ["--kind", "--input", "--tokenizer", "--next-scale", "--sides", "--key", "--dtype", "--output"],
    ),
    "export model": (["--workdir=folder", "--output=out"], ["--workdir", "--init-from", "--output"]),
    "export torch": (
        ["--model=model", "--kind=vae", "--output=out.safetensors"], ["--model", "--kind", "--output"],
    ),
    "export tokens": (
        ["--model=model", "--config=pictures.py", "--output=cache", "--count=2", "--no-distributed"],
        [
            "--model", "--config", "--crops", "--count", "--batch-size", "--seed", "--dtype", "--output",
            "--config.data.path",
        ],
    ),
    "train": (
        ["--config=config.py", "--workdir=run", "--no-distributed"],
        [
            "--config", "--workdir", "--profile", "--config.steps", "--config.sides", "--config.data.path",
            "--config.seed", "--config.optimizer.base_lr", "--config.evals", "--config.", "--config.x",
            "--config.stage", "--config.mesh.fsdp",
        ],
    ),
    "compile-check": (
        ["--config=config.py", "--topology=h200:2"],
        ["--config", "--topology", "--sample-batch", "--output", "--config.batch_size"],
    ),
    "bench attention": (
        ["--output=out"],
        [
            "--pixels", "--sides", "--batch", "--heads", "--head-size", "--dtype", "--pattern",
            "--implementations", "--peers", "--repeats", "--output",
        ],
    ),
    "bench train": (["--output=out"], ["--config", "--image", "--model", "--batch", "--repeats", "--output"]),
    "bench sample": (["--output=out"], ["--model-dir", "--image", "--model", "--batch", "--repeats", "--output"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of things that may be named, among them every kind of file."""
    folder = tmp_path_factory.mktemp("home")
    lively_model(TINY).save(folder / "model", source="a test")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "picture.png")
    for name in FILES:
        (folder / name).write_text("mine")
    (folder / "config.py").write_text(CONFIG)
    (folder / "pictures.py").write_text(PICTURES)
    (folder / "pictures" / "a").mkdir(parents=True)
    for name in "01":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "pictures" / "a" / f"{name}.png")
    (folder / "s.json").write_text(Schedule.preset("next-scale", TINY.ladder).to_json())
    for name in ("folder", "folder.json", "folder.png"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("mine")
    for ending in ("", ".json", ".png"):
        os.mkfifo(folder / f"pipe{ending}")
        (folder / f"loop{ending}").symlink_to(f"loop{ending}")
    for ending in (".json", ".png"):
        (folder / f"full{ending}").symlink_to("/dev/full")
        (folder / f"zero{ending}").symlink_to("/dev/zero")
    return folder


@pytest.fixture(autouse=True, scope="module")
def _nothing_takes_long(home):
    """The functions that would take long are where the commands end."""

    def reached(*_, **__):
        raise InputError(REACHED)

    with pytest.MonkeyPatch.context() as patch:
        for long in (
            "hmar_jax.model.Model._draw",
            "hmar_jax.bulk.samples._write_missing",
            "hmar_jax.training.loop.train",
            "hmar_jax.bulk.token_caches._write_missing",
            "hmar_jax.compile_check.programs.prepare",
            "pallas_kernels.scale_attention.bench.times.measure_rates",
            "hmar_jax.sampling.commitment.commitment",
            "hmar_jax.formats.hub.download",
        ):
            patch.setattr(long, reached)
        patch.chdir(home)
        patch.setenv("HOME", str(home / "nowhere"))
        yield


def fingerprint(home):
    """What is in the folder that nobody may change."""
    files = [path for path in sorted(home.rglob("*")) if "out" not in path.name and "nowhere" not in path.parts]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name in KEPT
    }


KEPT = (*FILES, "config.py", "config.json", "model.safetensors", "picture.png", "s.json", "mine.txt")


def run(argv):
    """The exit code of a command, and what it wrote."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stopped:
            code = stopped.code
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def check(home, argv):
    before = fingerprint(home)
    code, out, err = run(argv)
    assert fingerprint(home) == before
    assert code in (0, 2), err
    assert all(line.isprintable() for line in (out + err).split("\n"))
    said = err.rstrip("\n").split("\n")[-1]
    assert (code == 2) == (said != "" and ": " in said) or code == 0
    assert len(said) < 700, said
    assert "Traceback" not in err


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(sorted(COMMANDS)))
    needed, options = COMMANDS[name]
    given = list(needed)
    for option in draw(st.lists(st.sampled_from(options), min_size=1, max_size=2, unique=True)):
        value = draw(st.sampled_from(PATHS) | st.sampled_from(WORDS) | st.sampled_from(NUMBERS) | st.text(max_size=5))
        # An option that is there already is given the other value; of those that exclude each other both are given.
        given = [word for word in given if not option or word.partition("=")[0] != option]
        given.append(f"{option}={value}" if option else value)
    return [*name.split(), *given]


@hypothesis.settings(max_examples=12 * hypothesis.settings().max_examples)
@given(argv=command_lines())
@example(argv=["schedule", "show", "small", "--json=model/config.json"])
@example(argv=["schedule", "show", "small", "--json=pipe.json"])
@example(argv=["schedule", "show", "small", "--output=keep.png"])
@example(argv=["schedule", "show", "equal:999999999", "--sides=1,30000"])
@example(argv=["sample", "--model=model", "--output=out", "--labels=" + "a," * 40_000 + "a"])
@example(argv=["sample", "--model=model", "--output=out", "--classes=0-1000000000000"])
@example(argv=["sample", "--model=model", "--output=out", "--labels=" + "-" * 120_000])
@example(argv=["compile-check", "--config=config.py", "--topology=h200", "--output=keep.json"])
@example(argv=["train", "--config=model/config.json", "--workdir=run"])
@example(argv=["train", "--config=config.py", "--workdir=run", "--config.sides=(1,3000)"])
@example(argv=["train", "--config=config.py", "--workdir=run", "--config.sides=" + "(" * 3000])
@example(argv=["sample", "--output=--"])
@example(argv=["export", "tokens", "--model=model", "--config=pictures.py", "--output=/", "--no-distributed"])
@example(argv=["A" * 5000])
@example(argv=["\x1b[2J\n"])
@example(argv=["sample", "\x1b[2J\n" * 500])
@example(argv=[])
def test_a_command_line_goes_its_way_or_is_refused_in_a_sentence(home, argv):
    check(home, argv)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_values_that_are_right_go_all_the_way(home, name):
    """So that the odd ones are what is refused above."""
    code, out, err = run([*name.split(), *COMMANDS[name][0]])
    if name == "schedule show":
        assert (code, out.split("\n")[-2][:8]) == (0, "digest: ")
    elif name in ("convert", "export model", "export torch"):  # of files that are none
        assert code in (0, 2), err
    elif name == "compile-check":
        assert REACHED in err or "plugin, the compiler for an H200, is not installed" in err
    else:
        assert (code, err.split(": ")[-1].strip()) == (2, REACHED)
