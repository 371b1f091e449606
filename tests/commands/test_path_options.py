"""Every path that a user gives: `~` is the home folder, a URL is refused at once, and no input is written over."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
from PIL import Image

from hmar_jax.commands.main import main
from hmar_jax.commands.options import LocalPath, PathOrName
from hmar_jax.config import DataConfig, TokenizerLossConfig
from hmar_jax.data.folder import FolderSource
from hmar_jax.data.tfds import TfdsSource
from hmar_jax.data.tokens import TokenSource, write_token_cache
from hmar_jax.errors import InputError
from hmar_jax.formats.lpips_files import load_perceptual
from hmar_jax.formats.model_directory import locate, write_model
from hmar_jax.model import from_pretrained
from hmar_jax.sampling.schedule import Schedule
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.loop import open_inputs
from hmar_jax.training.metrics import MetricsWriter
from hmar_jax.training.trained import load_trained

COMMANDS = (
    ["train"],
    ["sample"],
    ["edit"],
    ["convert"],
    ["schedule"],
    ["export"],
    ["demo"],
    ["bench"],
    ["compile-check"],
)
PATHS = {"--output", "--workdir", "--config", "--image", "--mask", "--input", "--json", "--init-from", "--model-dir"}
MODELS = {"--model", "--tokenizer", "--next-scale"}
NO_PATHS = {
    ("bench train", "--model"),
    ("bench train", "--image"),
    ("bench sample", "--model"),
    ("bench sample", "--image"),
}


class SeenError(BaseException):
    """Not an Exception, which `main` would report as a bug."""


def parser_of(command):
    """The parser that a command makes, stopped before it reads anything."""
    found = []

    def stop(self, *_, **__):
        found.append(self)
        raise SeenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "hmar_jax.commands.main._arguments", lambda argv: argparse.Namespace(command=argv[0], rest=argv[1:])
        )
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(SeenError):
            main(command)
    return found[0]


def options_of(parser, words):
    """(words of the subcommand, option) → its action, of all of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, deeper in action.choices.items():
                yield from options_of(deeper, [*words, name])
        elif not isinstance(action, argparse._HelpAction):
            yield " ".join(words), (action.option_strings or [action.dest])[0], action


OPTIONS = [found for command in COMMANDS for found in options_of(parser_of(command), command)]
OF_PATHS = {(words, option): action for words, option, action in OPTIONS if isinstance(action, LocalPath)}


def test_every_option_that_is_a_path_is_read_as_one():
    named = {(words, option) for words, option, _ in OPTIONS if option in PATHS | MODELS} - NO_PATHS
    schedules = {("sample", "--schedule"), ("edit", "--schedule"), ("schedule show", "schedule")}
    assert named | schedules == set(OF_PATHS)
    assert not [(words, option) for words, option, action in OPTIONS if action.type is Path]


@pytest.mark.parametrize("url", ["gs://bucket/x.json", "s3://bucket/x.png", "hf://someone/model", "file:///tmp/x"])
@pytest.mark.parametrize(("words", "option"), OF_PATHS, ids=lambda value: value)
def test_a_url_is_refused_at_once_and_makes_no_folder(words, option, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [f"{option}={url}"] if option.startswith("-") else [url]
    assert main([*words.split(), *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hmar-jax {words.split()[0]}: {option} is '{url}', a URL; expected a path on this machine")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_paths_are_refused_before_jax_is_imported(tmp_path):
    code = f"""
import sys
from hmar_jax.commands.main import main
for words, option in {list(OF_PATHS)}:
    assert main([*words.split(), *([option + "=gs://b/x"] if option.startswith("-") else ["gs://b/x"])]) == 2
    assert "jax" not in sys.modules, words
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize(("words", "option"), OF_PATHS, ids=lambda value: value)
def test_a_tilde_is_the_home_folder(words, option, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    action, got = OF_PATHS[words, option], argparse.Namespace()
    action(argparse.ArgumentParser(), got, "~/x.json", option)
    value = getattr(got, action.dest)
    if isinstance(action, PathOrName):  # a name as well: expanded where it is taken for a path, as below
        assert value == "~/x.json"
    else:
        assert value == tmp_path / "x.json"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    return tiny.once(tiny.shared_folder(tmp_path_factory) / "starts", tiny.write_starts)


def test_what_is_named_by_a_tilde_is_found(home, starts, capsys):
    for name in ("tokenizer", "next_scale", "tokens"):
        (home / name).symlink_to(starts / name)
    assert from_pretrained("~/tokenizer").config == from_pretrained(starts / "tokenizer").config
    assert main(["schedule", "show", "next-scale", "--model=~/next_scale", "--json=~/new/s.json"]) == 0
    assert (home / "new" / "s.json").is_file()
    shown = capsys.readouterr().out
    assert main(["schedule", "show", "~/new/s.json", "--model=~/next_scale"]) == 0
    assert capsys.readouterr().out == shown
    assert len(TokenSource("~/tokens")) == 32
    Image.new("RGB", (4, 4)).save(home / "p.png")
    assert len(FolderSource("~")) == 1
    from_pretrained("~/tokenizer").save("~/again", source="a test")
    assert locate("~/again") == home / "again"
    config = tiny.next_scale_config(home, init_from="~/next_scale", data=DataConfig("tokens", path="~/tokens"))
    assert open_inputs(config)[1].model_config.class_names == tiny.CLASSES
    assert Checkpoints(Path("~/run")).folder == home / "run" / "checkpoints"
    assert not (home / "~").exists()


URL = "gs://bucket/x"
CALLS = {
    "from_pretrained": lambda: from_pretrained(URL),
    "write_model": lambda: write_model(URL, None, {}, source="x"),
    "a Path": lambda: locate(Path(URL)),
    "Schedule.parse": lambda: Schedule.parse(f"{URL}.json", tiny.LADDER),
    "TokenSource": lambda: TokenSource(URL),
    "write_token_cache": lambda: write_token_cache(
        URL, [], ladder=tiny.LADDER, codebook_size=2, crops=1, class_names="a", tokenizer="", source=""
    ),
    "FolderSource": lambda: FolderSource(URL),
    "TfdsSource": lambda: TfdsSource("mnist", URL),
    "load_perceptual": lambda: load_perceptual(URL),
    "Checkpoints": lambda: Checkpoints(Path(URL)),
    "MetricsWriter": lambda: MetricsWriter(Path(URL), steps=1, start=0, name="x"),
    "train into": lambda: loop.train(tiny.tokenizer_config(), Path(URL)),
    "train from": lambda: loop.train(tiny.tokenizer_config(init_from=URL), Path("run")),
    "train on": lambda: loop.train(tiny.tokenizer_config(data=DataConfig("folder", path=URL)), Path("run")),
    "load_trained": lambda: load_trained(Path(URL)),
}


@pytest.mark.parametrize("call", CALLS)
def test_functions_refuse_a_url_too(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is 'gs:/.*, a URL; expected a path on this machine"):
        CALLS[call]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["init_from", "data.path", "tokenizer_loss.perceptual_weights"])
@pytest.mark.parametrize(
    "command",
    [["train", "--workdir=run"], ["compile-check", "--topology=h200"], ["export", "tokens", "--model=m", "--output=o"]],
)
def test_a_url_in_a_config_is_refused_before_anything_begins(
    write_config, tmp_path, monkeypatch, capsys, name, command
):
    monkeypatch.chdir(tmp_path)
    file = write_config(tmp_path / "c.py", tiny.tokenizer_config(tokenizer_loss=TokenizerLossConfig()))
    assert main([*command, f"--config={file}", f"--config.{name}=gs://bucket/x"]) == 2
    assert f"{name} is 'gs://bucket/x', a URL" in capsys.readouterr().err
    assert {entry.name for entry in tmp_path.iterdir()} <= {"c.py", "__pycache__"}


# --- outputs that are inputs


def links_to(path, kind):
    """Another path of a file."""
    match kind:
        case "the same":
            return path
        case "relative":
            return Path(os.path.relpath(path))
        case "a symbolic link":
            link = path.with_name(f"soft-{path.name}")
            link.symlink_to(path)
        case "a hard link":
            link = path.with_name(f"hard-{path.name}")
            os.link(path, link)
        case "through its folder":
            link = path.parent / "sub" / ".." / path.name
            (path.parent / "sub").mkdir()
    return link


LINKS = ["the same", "relative", "a symbolic link", "a hard link", "through its folder"]
CLASHES = {
    "edit's picture": (["edit", "--image={it}", "--box=0,0,1,1", "--output={link}"], "p.png", "--image"),
    "edit's mask": (["edit", "--image=p.png", "--mask={it}", "--output={link}"], "m.png", "--mask"),
    "edit's grid": (["edit", "--image={it}", "--box=0,0,1,1", "--output=q.png"], "q-grid.png", "--image"),
    "a variant": (["edit", "--image={it}", "--box=0,0,1,1", "--variants=2", "--output=q.png"], "q-1.png", "--image"),
    "a schedule": (["schedule", "show", "{it}", "--json={link}"], "s.json", "the schedule"),
    "weights of LPIPS": (["convert", "--kind=lpips", "--input={it}", "--output={link}"], "w.safetensors", "--input"),
    "an official file": (
        ["convert", "--kind=vae", "--sides=1,2", "--input={it}", "--output={link}"], "w.safetensors", "--input",
    ),
}  # fmt: skip


def test_a_folder_may_have_the_name_of_a_schedule(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert main(["sample", "--model=./none", "--labels=0", "--schedule=small", "--output=small"]) == 2
    assert "none is not a model directory" in capsys.readouterr().err


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("case", CLASHES)
def test_an_output_that_is_an_input_is_refused(case, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, name, option = CLASHES[case]
    for picture in ("p.png", "m.png", name):
        Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).save(tmp_path / picture, format="PNG")
    it = tmp_path / name
    if name == "s.json":
        it.write_text(Schedule.preset("next-scale", tiny.LADDER).to_json())
    link = links_to(it, kind)
    before = it.read_bytes()
    model = [] if words[0] in ("schedule", "convert") else ["--model=none"]
    given = it if "{link}" in " ".join(words) else link  # or else the input goes by the other name
    assert main([*(word.format(it=given, link=link) for word in words), *model]) == 2
    said = capsys.readouterr().err
    assert f"is what {option}={given} names, and would be lost; choose another --" in said
    assert it.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--model={it}", "--labels=0", "--output={it}/../next_scale"],
        ["sample", "--model={it}", "--classes=0", "--output={it}"],
        ["convert", "--kind=var", "--sides=1,2", "--input=w.safetensors", "--tokenizer={it}", "--output={it}"],
        ["export", "torch", "--model={it}", "--output={it}/model.safetensors"],
        ["export", "torch", "--model={it}", "--output={it}"],
        ["export", "model", "--workdir={it}", "--output={it}"],
        ["export", "model", "--workdir=run", "--init-from={it}", "--output={it}"],
        ["export", "tokens", "--model={it}", "--config={config}", "--output={it}"],
        ["schedule", "show", "next-scale", "--model={it}", "--json={it}/config.json"],
        ["compile-check", "--config={config}", "--topology=h200", "--output={it}/config.json"],
    ],
    ids=lambda words: " ".join(words).replace("{it}", "M"),
)
def test_a_model_that_is_read_is_not_written_over(words, starts, tmp_path, write_config, capsys):
    it = starts / "next_scale"
    before = {file.name: file.read_bytes() for file in it.iterdir()}
    config = write_config(tmp_path / "c.py", tiny.tokenizer_config())
    assert main([word.format(it=it, config=config) for word in words]) == 2
    said = capsys.readouterr().err
    assert "would be lost; choose another" in said or "is there already and is not" in said
    assert {file.name: file.read_bytes() for file in it.iterdir()} == before


def test_a_run_does_not_write_over_the_model_that_it_starts_from(tmp_path, write_config, capsys):
    config = write_config(tmp_path / "c.py", tiny.tokenizer_config(init_from=str(tmp_path / "run" / "model")))
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "is what init_from=" in (said := capsys.readouterr().err)
    assert said.endswith("would be lost; choose another --workdir.\n")
    assert not (tmp_path / "run").exists()


def test_only_a_schedule_is_replaced_by_a_schedule(tmp_path, caplog):
    file = tmp_path / "s.json"
    file.write_text('{"mine": 1}')
    assert main(["schedule", "show", "next-scale", f"--json={file}"]) == 2
    assert file.read_text() == '{"mine": 1}'
    file.unlink()
    with caplog.at_level("INFO", "hmar_jax"):
        assert main(["schedule", "show", "next-scale", f"--json={file}"]) == 0
        assert "Replacing" not in caplog.text
        assert main(["schedule", "show", "var", f"--json={file}"]) == 0
    assert f"Replacing {file}." in caplog.messages


# --- terminals


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_lacks_letters_gets_escapes(environment, tmp_path):
    code = f"from hmar_jax.commands.main import main; raise SystemExit(main({['schedule', 'list']}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert rb"cos(\u03c0r/2)" in ran.stdout
    code = "from hmar_jax.commands.main import main; raise SystemExit(main(['sample', '--model=x', '--labels=0', '--output=gs://\\u017d']))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, timeout=120, check=False
    )
    assert ran.returncode == 2
    assert rb"gs://\u017d" in ran.stderr
