"""launch/notebooks/sampling.ipynb runs from top to bottom, from any folder; its setup leaves JAX as it is."""

import base64
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image
from tiny_models import lively_model, tiny

from hmar_jax.commands import demo
from hmar_jax.scales import ScaleLadder

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "launch" / "notebooks" / "sampling.ipynb"

# Run after the notebook's own cells, in its kernel.
CHECK = """
import json, sys, warnings
from hmar_jax.sampling import program

before = program.sample._cache_size()
at = {name: control.value for name, control in sliders.items()}
base = redraw(**at)
changes = {"cfg": 6.0, "temperature": 0.2, "top_k": 1, "top_p": 0.05, "noise": 9.0, "seed": 7}
changed = [name for name, value in changes.items() if (redraw(**at | {name: value}).tokens != base.tokens).any()]
sliders["cfg"].value = 5.0  # as a hand would
moved = len(shown.outputs)
scalars_compiled = program.sample._cache_size() - before
redraw(**at | {"order": "halton"})
print(json.dumps({
    "executable": sys.executable,
    "changed": changed,
    "moved": moved,
    "scalars_compiled": scalars_compiled,
    "plans_compiled": program.sample._cache_size() - before,
    "kept": bool((same.images[:, :, : size // 2] == out.images[:, :, : size // 2]).all()),
    "edited": bool((same.images != out.images).any()),
    "preview": bool((abs(event.images - out.images) < 1e-4).all()),
}))
"""


def source(cell_id):
    (cell,) = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.id == cell_id]
    return cell.source


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run in a folder that is not a checkout, on a tiny model; its kernel is this Python."""
    folder = tmp_path_factory.mktemp("notebook")
    smaller = dataclasses.replace(tiny(depth=2), ladder=ScaleLadder((1, 3)))  # which compiles sooner
    lively_model(smaller).save(folder / "model", source="a test")
    (folder / "elsewhere").mkdir()
    notebook = nbformat.read(NOTEBOOK, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK, id="check"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / "jupyter"))  # so that none of the user's own takes part
        patch.setenv("HMAR_MODEL", str(folder / "model"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        patch.setenv("PYTHONWARNINGS", "error::::hmar_jax")
        elsewhere = {"metadata": {"path": str(folder / "elsewhere")}}
        nbclient.NotebookClient(notebook, timeout=600, resources=elsewhere).execute()
    return notebook


def data(cells, kind):
    return [output.data[kind] for cell in cells for output in cell.outputs if kind in output.get("data", {})]


def picture(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), int)


def test_it_is_valid_and_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_every_cell_runs_and_says_nothing_on_stderr(executed):
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [output.text for cell in code for output in cell.outputs if output.get("name") == "stderr"] == []


def test_it_names_the_classes_and_shows_pictures(executed):
    cells = {cell.id: cell for cell in executed.cells}
    assert "5 classes: a, b, c, d, e" in "".join(output.text for output in cells["model"].outputs)
    for name in ("grid", "growth", "trace", "edit", "schedules"):
        shown = data([cells[name]], "image/png")
        assert shown, name
        assert all(picture(text).std() > 5 for text in shown), name
    (animation,) = data([cells["animation"]], "image/gif")
    assert Image.open(io.BytesIO(base64.b64decode(animation))).n_frames == 3  # passes
    assert data([cells["sliders"]], "application/vnd.jupyter.widget-view+json")


def test_its_controls_act_and_its_pictures_are_what_it_says(executed):
    (line,) = executed.cells[-1].outputs[-1].text.splitlines()
    told = json.loads(line)
    assert Path(told.pop("executable")).samefile(sys.executable)
    assert told.pop("changed") == ["cfg", "temperature", "top_k", "top_p", "noise", "seed"]
    assert told == {
        "moved": 1,
        "scalars_compiled": 0,
        "plans_compiled": 1,
        "kept": True,
        "edited": True,
        "preview": True,
    }


# --- setup and training, outside of a kernel


class Setup:
    """The setup cell, run in a folder, where some packages are and some are not; remembers the commands."""

    def __init__(self, patch, folder, packages, repository=""):
        self.commands, self.pins = [], ""
        folder.mkdir(parents=True, exist_ok=True)
        patch.chdir(folder)
        distributions = [SimpleNamespace(name=name, version=version) for name, version in packages.items()]
        patch.setattr(importlib.metadata, "distributions", lambda: distributions)
        patch.setattr(subprocess, "run", self.run)
        exec(source("setup"), {"REPOSITORY": repository})

    def run(self, command, check):
        assert check
        self.commands.append(command)
        if "--constraint" in command:
            self.pins = Path(command[command.index("--constraint") + 1]).read_text()


COLAB = {"jax": "0.11.2", "jaxlib": "0.11.2", "jax-cuda12-plugin": "0.11.2", "numpy": "2.0.2", "flax": "0.11.1"}


def test_setup_installs_around_the_jax_that_is_there(monkeypatch, tmp_path):
    (tmp_path / "checkout" / "hmar_jax").mkdir(parents=True)
    done = Setup(monkeypatch, tmp_path / "checkout" / "launch" / "notebooks", COLAB)
    (command,) = done.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == f"{tmp_path / 'checkout'}[notebook]"
    assert done.pins.splitlines() == [f"{name}=={COLAB[name]}" for name in COLAB if name != "flax"]


def test_setup_leaves_an_installed_one_alone_but_does_not_take_a_checkout_for_it(monkeypatch, tmp_path):
    (tmp_path / "hmar_jax").mkdir()  # which can be imported, here as in this very process
    assert Setup(monkeypatch, tmp_path, COLAB).commands
    assert not Setup(monkeypatch, tmp_path, COLAB | {"HMAR-JAX": "0.1.0"}).commands


def test_setup_clones_where_there_is_no_checkout(monkeypatch, tmp_path):
    done = Setup(monkeypatch, tmp_path, COLAB, "https://example.org/r.git")
    assert done.commands[0] == ["git", "clone", "--quiet", "--depth=1", "https://example.org/r.git", "hmar-jax"]
    assert done.commands[1][-1] == f"{tmp_path / 'hmar-jax'}[notebook]"  # a name without a slash pip would look up


def test_setup_asks_for_a_repository_where_it_has_none(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="say in REPOSITORY, above, where to clone it from"):
        Setup(monkeypatch, tmp_path, COLAB)


def test_setup_without_jax_lets_pip_bring_it(monkeypatch, tmp_path):
    (tmp_path / "hmar_jax").mkdir()
    done = Setup(monkeypatch, tmp_path, {"numpy": "2.0.2"})
    assert done.pins == "numpy==2.0.2\n"


@pytest.mark.parametrize("version", ["0.7.2", "0.11.1", "0.13.0"])
def test_a_jax_that_does_not_fit_gets_one_sentence(monkeypatch, tmp_path, version):
    with pytest.raises(SystemExit, match=rf"JAX {re.escape(version)}, but HMAR-JAX needs .* 0\.11\.2 to 0\.12") as end:
        Setup(monkeypatch, tmp_path, COLAB | {"jax": version})
    assert "\n" not in str(end.value)


def test_setup_wants_what_the_package_wants():
    metadata = (ROOT / "setup.py").read_text()
    assert 'python_requires=">=3.12"' in metadata and '"jax>=0.11.2,<0.13"' in metadata


@pytest.mark.parametrize(("quick", "arguments", "folder"), [(True, ["--quick"], "demo-quick"), (False, [], "demo")])
def test_without_a_model_it_trains_the_demo(model, monkeypatch, tmp_path, quick, arguments, folder):
    model.save(tmp_path / "trained", source="a test")
    asked = []

    def train(argv):
        asked.append(argv)
        shutil.copytree(tmp_path / "trained", tmp_path / "runs" / folder / "masked" / "model")

    monkeypatch.setattr(demo, "run", train)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    space = {"MODEL": "", "QUICK": quick, "Path": Path}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(source("model"), space)
    assert asked == [arguments]
    assert space["model"].config == model.config
