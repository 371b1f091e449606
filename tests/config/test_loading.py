"""config.load: a file, or the name of an installed config, with overrides → a TrainConfig that is checked once."""

import re
import threading

import pytest

from hmar_jax.config import DataConfig, TrainConfig, load
from hmar_jax.config.loading import names
from hmar_jax.config.plain import checked_later
from hmar_jax.errors import InputError

BODY = """
from hmar_jax.config import DataConfig, TrainConfig, to_config_dict

def get_config(stage="tokenizer"):
    return to_config_dict(TrainConfig({fields}))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config file of these arguments into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name, fields):
        (tmp_path / name).write_text(BODY.format(fields=fields))
        return name

    return write


@pytest.mark.parametrize("name", names())
def test_an_installed_config_is_found_by_its_name_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(load(name), TrainConfig)


def test_a_name_takes_an_argument_and_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, changed = load("imagenet256_d16:masked"), ["optimizer.base_lr=2e-4", "--config.steps=7"]
    assert (plain.stage, load("imagenet256_d16").stage) == ("masked", "next_scale")
    config = load("imagenet256_d16:masked", changed)
    assert (config.steps, config.optimizer.base_lr, config.stage) == (7, 2e-4, "masked")


def test_a_file_comes_before_a_name_and_a_folder_does_not(write, tmp_path):
    (tmp_path / "glyphs_masked").mkdir()
    assert load("glyphs_masked").stage == "masked"
    write("glyphs_tokenizer", 'stage="tokenizer", steps=3')
    assert load("glyphs_tokenizer").steps == 3


def test_an_unknown_name_gets_near_ones_and_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load("configs/imagenet256_d61.py:masked")
    said = str(caught.value)
    assert said.startswith("Config file configs/imagenet256_d61.py:masked does not exist, and no installed config is")
    assert "perhaps you mean imagenet256_d16; " in said
    assert said.endswith(f"the names are {', '.join(names())}.")
    assert len(names()) > 10


REFUSED_ALONE = {
    "a batch in unequal parts": ("batch_size=8, accumulate=3", "batch_size=9", "8 is not a multiple"),
    "a stage without its start": ('stage="masked", data=DataConfig("tokens")', "init_from=m", "needs init_from"),
    "a source without pictures": ('data=DataConfig("glyphs", skip_broken=True)', "data.source=folder", "skip_broken"),
    "no steps": ("steps=0", "steps=1", "steps is 0; expected 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED_ALONE)
def test_values_are_checked_together_with_overrides_and_not_before(write, case):
    fields, override, said = REFUSED_ALONE[case]
    file = write("c.py", fields if "stage" in fields else f"stage=stage, {fields}")
    assert isinstance(load(file, [override]), TrainConfig)
    with pytest.raises(InputError, match=re.escape(said)):
        load(file)


def test_checks_are_on_again_after_a_file_that_fails_and_in_other_threads(write, tmp_path):
    (tmp_path / "c.py").write_text("def get_config(): 1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load("c.py")
    with pytest.raises(InputError, match=r"data\.workers is -1"):
        DataConfig(workers=-1)
    refused = []

    def make():
        with pytest.raises(InputError):
            DataConfig(workers=-1)
        refused.append(True)

    with checked_later():
        assert DataConfig(workers=-1).workers == -1
        (thread := threading.Thread(target=make)).start()
        thread.join()
    assert refused


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_may_build_on_another_config(write, tmp_path, inside):
    line = "base = load('mine.py', ['batch_size=8'])"
    start, body = ("pass", line) if inside else (line, "pass")
    write("mine.py", 'stage="tokenizer", accumulate=3')
    (tmp_path / "outer.py").write_text(
        f"import dataclasses\nfrom hmar_jax.config import load, to_config_dict\n{start}\n"
        f"def get_config():\n    {body}\n    return to_config_dict(dataclasses.replace(base, steps=5))\n"
    )
    config = load("outer.py", ["accumulate=4"])
    assert (config.steps, config.batch_size, config.accumulate) == (5, 8, 4)


def test_types_are_refused_while_a_file_runs(write):
    with pytest.raises(InputError, match="'steps' is 'many'; expected int"):
        load(write("c.py", 'stage="tokenizer", steps="many"'), ["steps=3"])
