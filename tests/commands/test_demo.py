"""`hmar-jax demo --quick` in miniature: it ends with four pictures and, run again, redraws without retraining."""

import contextlib
import io

import numpy as np
import pytest
import tiny_demo
import tiny_training as tiny
from PIL import Image

from hmar_jax.commands.main import main
from hmar_jax.data.tokens import TokenSource
from hmar_jax.training import demo

PICTURES = ("reconstructions.png", "losses.png", "samples.png", "growth.png")


def run(folder):
    """Exit code of a demo of two steps a stage, and what it printed."""
    printed = io.StringIO()
    with tiny_demo.miniature(), contextlib.redirect_stdout(printed):
        code = main(["demo", "--quick", "--output", str(folder)])
    return code, printed.getvalue()


def trained(folder):
    """Relative path → bytes, of the metrics, models, token cache and checkpoints."""
    kept = ("metrics.jsonl", "model", "tokens", "checkpoints")
    files = ((file.relative_to(folder), file) for file in folder.rglob("*") if file.is_file())
    return {str(path): file.read_bytes() for path, file in files if any(name in path.parts for name in kept)}


def announced(printed):
    """The lines that name pictures."""
    return [line for line in printed.splitlines() if ".png" in line]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of a demo, its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "not made yet"
    return folder, *run(folder)


def test_the_demo_trains_all_three_stages(shown):
    folder, code, _ = shown
    assert code == 0
    assert [tiny.steps_on_disk(folder / stage) for stage in demo.STAGES] == [{"2"}] * 3
    assert len(TokenSource(folder / "tokens")) == 32


@pytest.mark.parametrize("name", PICTURES)
def test_the_demo_draws_and_names_its_pictures(shown, name):
    folder, _, printed = shown
    assert sum(str(folder / name) in line for line in announced(printed)) == 1
    with Image.open(folder / name) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_the_demo_run_again_redraws_and_retrains_nothing(shown):
    folder, _, printed = shown
    before = trained(folder)
    assert {f"{stage}/metrics.jsonl" for stage in demo.STAGES} < before.keys()
    (folder / "samples.png").unlink()
    code, again = run(folder)
    assert code == 0
    after = trained(folder)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    assert announced(again) == announced(printed)
    assert (folder / "samples.png").exists()


def test_a_longer_demo_does_not_go_on_from_a_quick_one(shown, capsys):
    folder, _, _ = shown
    before = trained(folder)
    assert main(["demo", "--output", str(folder)]) == 2
    assert "holds a demo of another length" in capsys.readouterr().err
    assert trained(folder) == before


@pytest.mark.parametrize("text", ["7", "{}", '{"steps": true}', "[" * 100_000, '{"steps": ' + "1" * 5000 + "}", "\0"])
def test_a_damaged_record_of_a_demo_is_a_sentence(tmp_path, capsys, text):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text(text)
    assert main(["demo", "--quick", f"--output={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hmar-jax demo: The demo's record {tmp_path / 'tokenizer' / 'config.json'} ")
    assert said.endswith("or choose another --output.\n")
    assert len(said) < 500
