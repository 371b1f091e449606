"""What resuming promises: a run that was stopped, whenever and however, ends bit for bit like one that was not."""

import functools
import itertools

import jax
import numpy as np
import pytest
from tiny_training import assert_bit_equal, stage_config

from hmar_jax.config import OptimizerConfig
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.metrics import read_metrics

CHANGES = {
    "tokenizer": {},
    "next_scale": {"optimizer": OptimizerConfig(base_lr=0.1, ema=0.9)},
    "masked": {"accumulate": 2},
}
TIMES = ("step_seconds", "images_per_second")


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
    assert all(line["adaptive_weight"] > 0 for line in lines)
    assert np.ptp(end["state"].extra["usage"]) > 0
    moments = [np.abs(leaf).max() for leaf in jax.tree.leaves(end["state"].opt) if leaf.ndim]
    assert np.mean(np.array(moments) > 0) > 0.9  # some biases have no gradient, by symmetry


def test_the_averages_are_what_a_run_exports(straight):
    _, workdir, end = straight("next_scale")
    model = loop.load_trained(workdir)[0]
    assert_bit_equal(model.params["transformer"], end["state"].ema["transformer"])
    assert not np.array_equal(end["state"].ema["transformer"]["pos"], end["state"].params["transformer"]["pos"])


def test_running_a_finished_run_again_changes_nothing(straight):
    config, workdir, _ = straight("next_scale")
    before = {file: (workdir / file).read_bytes() for file in ("model/model.safetensors", "metrics.jsonl")}
    run(config, workdir)
    assert {file: (workdir / file).read_bytes() for file in before} == before
