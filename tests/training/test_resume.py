"""What resuming promises: a run that was stopped, whenever and however, ends bit for bit like one that was not."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_training import LOSS, SIZE, assert_bit_equal, idle_steps, stage_config

from hmar_jax.commands.main import main
from hmar_jax.config import DataConfig, ObjectiveConfig, OptimizerConfig
from hmar_jax.errors import InputError
from hmar_jax.formats import hub, lpips_files
from hmar_jax.model import from_pretrained
from hmar_jax.tokenizer import codebook
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.metrics import MetricsWriter, read_metrics
from hmar_jax.training.trained import load_trained
from hmar_jax.training.workdir import check_same_run

CHANGES = {
    "tokenizer": {},
    "next_scale": {"optimizer": OptimizerConfig(base_lr=0.1, ema=0.9)},
    "masked": {"accumulate": 2},
}
TIMES = ("step_seconds", "images_per_second", "data_wait_share")


class StopError(Exception):
    pass


def run(config, workdir, stop=None):
    """Trains, stopping before step `stop` + 1 if given; the last state and data position that were to be saved."""
    saved, put, save = {}, loop.sharding.put_batch, Checkpoints.save
    steps = itertools.count()

    def counted(batch, mesh):
        if stop is not None and next(steps) == stop:
            raise StopError
        return put(batch, mesh)

    def recorded(self, step, state, data, config):
        saved.update(step=step, state=jax.device_get(state), data=data)
        save(self, step, state, data, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.sharding, "put_batch", counted)
        patch.setattr(Checkpoints, "save", recorded)
        if stop is None:
            loop.train(config, workdir)
        else:
            with pytest.raises(StopError):
                loop.train(config, workdir)
    return saved


@pytest.fixture(scope="module")
def straight(starts, tmp_path_factory):
    """stage → config, work directory and end of a run that nothing stopped."""

    @functools.cache
    def of(stage):
        config = stage_config(stage, starts, **CHANGES[stage])
        workdir = tmp_path_factory.mktemp(stage)
        return config, workdir, run(config, workdir)

    return of


@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        ("tokenizer", 3),  # between two checkpoints
        ("next_scale", 1),  # before the first
        ("next_scale", 4),  # right after the second
        ("masked", 3),
    ],
)
def test_a_stopped_and_resumed_run_is_bit_equal(straight, tmp_path, stage, stop):
    config, workdir, end = straight(stage)
    run(config, tmp_path, stop)
    assert not (tmp_path / "model").exists()
    resumed = run(config, tmp_path)

    assert (resumed["step"], resumed["data"]) == (end["step"], end["data"])
    assert (end["step"], end["data"]["examples"]) == (5, 40)
    assert_bit_equal(resumed["state"], end["state"])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / file).read_bytes() == (workdir / "model" / file).read_bytes()
    ours, theirs = (
        [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder)]
        for folder in (tmp_path / "metrics.jsonl", workdir / "metrics.jsonl")
    )
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5]
    assert ours == theirs


def test_the_tokenizer_run_has_all_that_could_go_astray(straight):
    _, workdir, end = straight("tokenizer")
    lines = read_metrics(workdir / "metrics.jsonl")
    assert sum(line["codes_revived"] for line in lines[2:]) > 0
    assert [line["adaptive_weight"] > 0 for line in lines] == [False, True, True, True, True]  # from its start on
    assert np.ptp(end["state"].extra["usage"]) > 0
    moments = [np.abs(leaf).max() for leaf in jax.tree.leaves(end["state"].opt) if leaf.ndim]
    assert np.mean(np.array(moments) > 0) > 0.9  # some biases have no gradient, by symmetry


def test_the_averages_are_what_a_run_exports(straight):
    _, workdir, end = straight("next_scale")
    model = load_trained(workdir)
    assert_bit_equal(model.params["transformer"], end["state"].ema["transformer"])
    assert not np.array_equal(end["state"].ema["transformer"]["pos"], end["state"].params["transformer"]["pos"])


def test_running_a_finished_run_again_changes_nothing(straight):
    config, workdir, _ = straight("next_scale")
    before = {file: (workdir / file).read_bytes() for file in ("model/model.safetensors", "metrics.jsonl")}
    run(config, workdir)
    assert {file: (workdir / file).read_bytes() for file in before} == before


# --- being told to stop


def test_a_run_told_to_stop_saves_the_step_leaves_with_zero_and_goes_on(straight, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    config, _, end = straight("next_scale")
    advance, steps = MetricsWriter.advance, itertools.count(1)

    def advance_and_tell(self):
        advance(self)
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "advance", advance_and_tell)
        assert loop.train(config, tmp_path) is None
    assert "Told to stop, and saved step 3" in caplog.text
    assert Checkpoints(tmp_path).latest() == 3
    assert not (tmp_path / "model").exists()
    assert_bit_equal(run(config, tmp_path)["state"], end["state"])


# --- what a work directory's run insists on


@pytest.fixture
def begun(starts, tmp_path, monkeypatch):
    """Config and work directory of a masked run of two idle steps, started from a copy of its model."""
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    shutil.copytree(starts / "next_scale", tmp_path / "start")
    config = stage_config("masked", starts, init_from=str(tmp_path / "start"), steps=2)
    loop.train(config, tmp_path / "run")
    return config, tmp_path / "run"


def another_model(config):
    model = from_pretrained(config.init_from)
    model.params["transformer"]["pos"] = model.params["transformer"]["pos"] + 1
    model.save(Path(config.init_from), source="another", replace=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, "The run in .* has seed=0, this config 1; set it back, or choose another --workdir."),
        (
            {"objective": ObjectiveConfig(leak_free=True)},
            "has objective=.*leak_free=False.*, this config .*leak_free=True",
        ),
        (
            {"steps": 1},
            "steps=1, and the run in .* has done 2 already; set steps to 2 or more, or choose another --workdir",
        ),
        ({}, "start is not what the run in .* started from; set init_from back to that model, or choose another"),
    ],
    ids=["seed", "leak_free", "steps that are done", "another model in init_from"],
)
def test_a_run_that_cannot_go_on_is_refused_and_its_record_stays(begun, changes, expected):
    config, workdir = begun
    before = (workdir / "config.json").read_bytes()
    if not changes:
        another_model(config)
    with pytest.raises(InputError, match=expected) as error:
        loop.train(dataclasses.replace(config, **({"steps": 3} | changes)), workdir)
    assert "\n" not in str(error.value)
    assert (workdir / "config.json").read_bytes() == before
    assert Checkpoints(workdir).latest() == 2


@pytest.mark.parametrize("stream", ["the same", "another"])
def test_a_run_goes_on_with_what_may_change_records_it_and_says_what_changed(begun, starts, stream, caplog):
    caplog.set_level(logging.INFO, "hmar_jax")
    config, workdir = begun
    moved = Path(config.init_from).rename(workdir.parent / "moved")
    changes, names = {"steps": 3, "init_from": str(moved)}, ["steps", "init_from"]
    if stream == "another":
        copied = shutil.copytree(starts / "tokens", workdir.parent / "tokens")
        changes["data"], names = DataConfig("tokens", path=str(copied)), [*names, "data.path"]
    loop.train(dataclasses.replace(config, **changes), workdir)
    assert '"steps": 3' in (workdir / "config.json").read_text()
    assert Checkpoints(workdir).latest() == 3
    assert "Going on with steps=3 instead of 2.\n" in caplog.text
    assert re.findall("Going on with (.*)=", caplog.text) == names
    assert ("The position in the data is that of the old stream" in caplog.text) == (stream == "another")


@pytest.mark.parametrize(("old", "new"), [(0.1, 0.2), (0.2, 0.1), (0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_the_adversarial_weight_may_change_but_the_discriminator_not_join_or_leave(starts, old, new):
    config = stage_config("tokenizer", starts)
    before, now = (
        dataclasses.replace(config, tokenizer_loss=dataclasses.replace(config.tokenizer_loss, adversarial=weight))
        for weight in (old, new)
    )
    if bool(old) == bool(new):
        check_same_run(before, now, Path("run"))
    else:
        with pytest.raises(InputError, match=rf"run was started with tokenizer_loss\.adversarial={old}; a discrim"):
            check_same_run(before, now, Path("run"))


def test_a_run_starts_from_a_hub_id_and_its_model_is_exported(starts, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name, revision, files: starts / name.removeprefix("someone/"))
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    loop.train(stage_config("next_scale", starts, steps=1, init_from="someone/tokenizer"), tmp_path)
    start = from_pretrained(starts / "tokenizer").params["tokenizer"]
    assert_bit_equal(from_pretrained(tmp_path / "model").params["tokenizer"], start)
    assert_bit_equal(load_trained(tmp_path).params["tokenizer"], start)


def test_the_model_of_a_moved_run_is_exported_once_its_start_is_given(starts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(starts / "tokenizer", here / "tokenizer")
    loop.train(stage_config("next_scale", starts, steps=1, init_from=str(here / "tokenizer")), here / "run")
    expected = from_pretrained(here / "run" / "model")
    here.rename(there)
    export = ["export", "model", f"--workdir={there / 'run'}", f"--output={tmp_path / 'out'}"]
    assert main(export) == 2
    said = capsys.readouterr().err
    assert f"{here / 'tokenizer'} is not the model that the run in {there / 'run'} started from (" in said
    assert said.endswith("give that model's directory as --init-from.\n")
    assert main([*export, f"--init-from={starts / 'next_scale'}"]) == 2
    assert "(its weights have another checksum); give that model's directory as --init-from." in capsys.readouterr().err
    assert main([*export, f"--init-from={there / 'tokenizer'}"]) == 0
    exported = from_pretrained(tmp_path / "out")
    assert_bit_equal(exported.params, expected.params)
    assert exported.config == expected.config


def test_a_run_that_started_from_nothing_needs_no_start(starts, straight, tmp_path, capsys):
    _, workdir, _ = straight("tokenizer")
    options = [f"--workdir={workdir}", f"--output={tmp_path / 'out'}", f"--init-from={starts / 'tokenizer'}"]
    assert main(["export", "model", *options]) == 2
    assert "started from no model; leave --init-from=" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["tokenizer", "next_scale"])
def test_a_model_is_exported_when_the_data_and_perceptual_weights_are_gone(starts, tmp_path, monkeypatch, stage):
    data = tmp_path / "data"
    changes = {}
    if stage == "tokenizer":
        monkeypatch.setattr(lpips_files, "load_perceptual", lambda file: {"scale": np.ones(3, np.float32)})
        changes["tokenizer_loss"] = dataclasses.replace(LOSS, perceptual_weights="vgg.safetensors")
        data.mkdir()
        rng = np.random.default_rng(0)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(data / f"{i}.png")
        source = DataConfig("folder", path=str(data))
    else:
        shutil.copytree(starts / "tokens", data)
        source = DataConfig("tokens", path=str(data))
    monkeypatch.setattr(loop, "make_train_step", idle_steps())
    loop.train(stage_config(stage, starts, steps=1, data=source, **changes), tmp_path / "run")
    shutil.rmtree(data)
    monkeypatch.setattr(lpips_files, "load_perceptual", lambda file: pytest.fail(f"{file} was read"))
    monkeypatch.setattr(codebook, "kmeans", lambda *_: pytest.fail("k-means was run"))
    assert main(["export", "model", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]) == 0
    exported, trained = (from_pretrained(folder) for folder in (tmp_path / "out", tmp_path / "run" / "model"))
    assert exported.config == trained.config
    assert_bit_equal(exported.params, trained.params)
