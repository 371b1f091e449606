"""What the loop promises: what it reads, the order of its hooks, and training from Python."""

import dataclasses
import itertools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_training import SIZE, assert_bit_equal, idle_steps, stage_config

import hmar_jax
from hmar_jax.config import DataConfig, EvalConfig, to_config_dict
from hmar_jax.data.folder import FolderSource
from hmar_jax.data.tokens import TokenSource, validation_of, write_token_cache
from hmar_jax.errors import InputError
from hmar_jax.files.lock import Lock
from hmar_jax.formats import safetensors_files
from hmar_jax.model import Model, from_pretrained
from hmar_jax.parallel import processes
from hmar_jax.params import flatten
from hmar_jax.tokenizer import codebook
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.objectives import base
from hmar_jax.training.trained import load_trained


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", idle_steps())


def spy(monkeypatch, owner, name, seen, label=None):
    """Has calls of a method noted in `seen`, by their first argument after `self` or by a label."""
    call = getattr(owner, name)

    def noted(self, *args, **kwargs):
        seen.append(label or args[0])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, noted)


# --- what is read


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / "AB"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8))
        picture.save(folder / "AB"[i % 2] / f"{i}.png")
    return folder


def test_a_folder_is_opened_once_for_classes_k_means_batches_evals_and_samples(pictures, tmp_path, monkeypatch, idle):
    opened = []
    spy(monkeypatch, FolderSource, "__init__", opened)
    data = DataConfig("folder", path=str(pictures), held_out=0.3)
    changes = {"evals": (EvalConfig(every=1, count=4),), "sample_every": 1, "data": data}
    config = stage_config("tokenizer", tmp_path, steps=1, **changes)
    assert config.tokenizer_loss.kmeans_batches
    loop.train(config, tmp_path / "run")
    assert opened == [str(pictures)]
    loop.train(dataclasses.replace(config, steps=2), tmp_path / "run")
    assert len(opened) == 2


def test_a_token_cache_and_its_held_out_part_are_opened_once_each(starts, tmp_path, monkeypatch, idle):
    train = TokenSource(starts / "tokens")
    header = {name: getattr(train, name) for name in ("ladder", "codebook_size", "crops", "class_names", "tokenizer")}
    batch = np.stack([train[i]["tokens"] for i in range(8)], axis=1), np.array([train[i]["label"] for i in range(8)])
    for path in (tmp_path / "tokens", validation_of(tmp_path / "tokens")):
        write_token_cache(path, [batch], source="a test", **header)
    opened = []
    spy(monkeypatch, TokenSource, "__init__", opened)
    data, evals = DataConfig("tokens", path=str(tmp_path / "tokens")), (EvalConfig(every=1),)
    loop.train(stage_config("next_scale", starts, steps=1, data=data, evals=evals), tmp_path / "run")
    assert [str(path) for path in opened] == [data.path, f"{data.path}/validation"]


@pytest.mark.parametrize("stage", ["tokenizer", "next_scale", "masked"])
def test_weights_are_read_once_and_resuming_reads_the_frozen_ones_and_initialises_nothing(
    starts, tmp_path, monkeypatch, idle, stage
):
    read, seen = safetensors_files.File.read, []
    monkeypatch.setattr(safetensors_files.File, "read", lambda self, name: seen.append(name) or read(self, name))
    changes = {"init_from": str(starts / "next_scale")} if stage == "tokenizer" else {}
    config = stage_config(stage, starts, steps=1, **changes)
    loop.train(config, tmp_path)
    networks = {name.partition(".")[0] for name in seen}
    assert networks == {"tokenizer", "transformer"} if stage == "masked" else networks == {"tokenizer"}
    assert len(seen) == len(set(seen))

    def refused(config, seed, only, place):
        assert isinstance(jnp.zeros(()), jax.core.Tracer), f"{only} is initialised"  # else for its shapes alone
        return initialised(config, seed, only, place)

    initialised = base.init_params
    monkeypatch.setattr(base, "init_params", refused)
    monkeypatch.setattr(codebook, "kmeans", lambda *_: pytest.fail("k-means was run"))
    for resume in (
        lambda: loop.train(dataclasses.replace(config, steps=2), tmp_path),
        lambda: load_trained(tmp_path),
    ):
        seen.clear()
        model = resume()
        assert sorted(seen) == sorted(set(seen))
        trained = {name for name in flatten(model.params) if ".masked." in name or name.endswith("mask_embed")}
        frozen = {"tokenizer": set(), "next_scale": networks, "masked": networks}[stage]
        expected = {name for name in flatten(model.params) if name.partition(".")[0] in frozen} - trained
        assert set(seen) == expected


# --- hooks


def test_the_hooks_of_a_step_come_in_one_order(starts, tmp_path, monkeypatch, idle):
    seen = []
    for name in ("check", "evaluate", "log", "save", "sample"):
        spy(monkeypatch, loop.Run, name, seen, name)
    spy(monkeypatch, Lock, "check", seen, "lock")
    spy(monkeypatch, Checkpoints, "save", seen, "write")
    monkeypatch.setattr(loop, "SampleWriter", lambda *_: lambda step, params: None)
    changes = {"log_every": 2, "checkpoint_every": 3, "sample_every": 4, "sample_labels": (0,)}
    loop.train(stage_config("next_scale", starts, steps=5, **changes), tmp_path)
    log, save = ["evaluate", "log"], ["save", "lock", "write"]
    steps = [log, log, save, [*log, "sample"], [*log, *save, "sample"]]
    assert seen == list(itertools.chain.from_iterable(["check", *due] for due in steps))


def test_an_evaluator_is_asked_when_it_is_due_and_its_metrics_are_logged(starts, tmp_path, monkeypatch, idle):
    class Counter:
        """Any kind of evaluation: when, and of what."""

        def due(self, step):
            return step == 3

        def __call__(self, step, params, frozen):
            return {"eval/counter/parameters": np.float32(len(flatten(params | frozen)))}

    monkeypatch.setattr(loop, "make_evaluators", lambda *_: [Counter()])
    model = loop.train(stage_config("next_scale", starts, log_every=100), tmp_path)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert sorted(lines) == [1, 3, 5]
    found = {step: line["eval/counter/parameters"] for step, line in lines.items() if "eval/counter/parameters" in line}
    assert found == {3: len(flatten(model.params))}


# --- from Python


def test_training_from_python_gives_a_model_that_samples_and_saves(starts, tmp_path):
    config = to_config_dict(stage_config("next_scale", starts, steps=1))
    model = hmar_jax.train(config, str(tmp_path / "run"))
    assert isinstance(model, Model)
    assert model.sample([0, 1]).images.shape == (2, SIZE, SIZE, 3)
    saved = from_pretrained(tmp_path / "run" / "model")
    assert_bit_equal(model.params, jax.tree.map(np.asarray, saved.params))
    again = from_pretrained(model.save(tmp_path / "again"))
    assert again.about == saved.about == model.about
    assert "1 steps of 8, seed 0" in model.about.source


def test_a_config_is_also_a_file_or_a_name(starts, tmp_path, idle):
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom tiny_training import next_scale_config\n"
        "from hmar_jax.config import to_config_dict\n"
        f"def get_config():\n    return to_config_dict(next_scale_config(Path({str(starts)!r}), steps=1))\n"
    )
    assert hmar_jax.train(file, tmp_path / "run") is not None
    with pytest.raises(InputError, match="glyphs_tokenise"):
        hmar_jax.train("glyphs_tokenise", tmp_path / "other")
    with pytest.raises(InputError, match="config is 3; expected a TrainConfig, a ConfigDict"):
        hmar_jax.train(3, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_callbacks_get_the_metrics_of_each_logged_step(starts, tmp_path, idle):
    seen, others = {}, []
    config = stage_config("next_scale", starts, steps=5, log_every=2)
    callbacks = [lambda step, metrics: seen.update({step: metrics}), lambda step, metrics: others.append(step) or "no"]
    assert hmar_jax.train(config, tmp_path, callbacks) is not None
    assert list(seen) == others == [1, 2, 4, 5]
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        metrics = seen[line.pop("step")]
        assert metrics.keys() == line.keys()
        assert type(metrics["loss"]) is float
        assert metrics["scale_loss"].dtype == np.float32
        for name, value in line.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


@pytest.mark.parametrize("answer", [True, np.bool_(True)])
def test_a_callback_that_returns_true_saves_the_step_and_stops(starts, tmp_path, idle, answer):
    config = stage_config("next_scale", starts, steps=5, checkpoint_every=100)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert hmar_jax.train(config, tmp_path, [lambda step, _: answer if step == 3 else None, lambda *_: False]) is None
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert Checkpoints(tmp_path).latest() == 3
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".lock").exists()
    assert hmar_jax.train(config, tmp_path, [lambda step, _: step == 5]) is not None  # there is nothing left to stop
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_what_a_callback_raises_ends_the_training_and_what_was_saved_stays(starts, tmp_path, idle):
    def fail(step, metrics):
        if step == 3:
            raise KeyError("mine")

    config = stage_config("next_scale", starts)
    with pytest.raises(KeyError, match="mine"):
        hmar_jax.train(config, tmp_path, [fail])
    assert Checkpoints(tmp_path).latest() == 2
    assert not (tmp_path / ".lock").exists()
    assert hmar_jax.train(config, tmp_path) is not None


def test_a_setup_that_fails_closes_what_it_has_opened(starts, tmp_path, monkeypatch, idle):
    def refuse(*args, **options):
        raise InputError("no metrics today")

    closed = []
    spy(monkeypatch, Checkpoints, "close", closed, "checkpoints")
    monkeypatch.setattr(loop, "MetricsWriter", refuse)
    with pytest.raises(InputError, match="no metrics today"):
        hmar_jax.train(stage_config("next_scale", starts), tmp_path)
    assert closed == ["checkpoints"]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("callbacks", [print, ["print"], [None]])
def test_what_is_no_list_of_callbacks_is_refused(starts, tmp_path, callbacks):
    with pytest.raises(InputError, match=r"callbacks is .*; expected a list of functions of a step and its metrics"):
        hmar_jax.train(stage_config("next_scale", starts), tmp_path / "run", callbacks)
    with pytest.raises(InputError, match=r"profile is 3; expected a range of steps"):
        hmar_jax.train(stage_config("next_scale", starts), tmp_path / "run", profile=3)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_the_step_and_is_a_keyboard_interrupt(starts, tmp_path, idle):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it

    def press(step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        hmar_jax.train(stage_config("next_scale", starts, checkpoint_every=100), tmp_path, [press])
    assert Checkpoints(tmp_path).latest() == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("prompt", [True, False])
def test_a_process_with_a_prompt_outlives_a_second_ctrl_c(monkeypatch, prompt):
    if prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes.preemption() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests(1)
        assert signal.getsignal(signal.SIGINT) is (signal.default_int_handler if prompt else signal.SIG_DFL)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
