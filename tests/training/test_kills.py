"""A run that is killed at any moment goes on from a whole checkpoint, and loses one save at most.

A killed process leaves its files as they are at that moment; so does one that is held still. One run is held at 50
random moments, its work directory copied each time, and killed in the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_training import idle_steps, next_scale_config

from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.state import TrainState, state_shapes

HERE = Path(__file__).parent
KILLS, EVERY = 50, 3
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_kills import endless, marked_steps
from hmar_jax.training import loop
loop.make_train_step = marked_steps
loop.train(endless(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def endless(starts, **changes):
    return next_scale_config(starts, **({"steps": 10**6, "checkpoint_every": EVERY} | changes))


def marked_steps(config, objective, optimizer):
    """Steps that leave their number in every parameter and moment."""
    count = idle_steps()(config, objective, optimizer)

    def step(state, frozen, batch):
        state, metrics = count(state, frozen, batch)

        def mark(tree):
            return jax.tree.map(lambda leaf: 0 * leaf + state.step.astype(leaf.dtype), tree)

        return TrainState(state.step, state.key, mark(state.params), state.ema, mark(state.opt), {}), metrics

    return step


def hold(process):
    """Stops a process wherever it is, and returns when all of its threads stand still."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


@pytest.fixture(scope="module")
def killed(starts, tmp_path_factory):
    """Copies of a work directory at random moments of a run."""
    folder = tmp_path_factory.mktemp("kills")
    workdir, copies = folder / "run", []
    rng = np.random.default_rng(0)
    command = [sys.executable, "-c", SCRIPT, str(HERE), str(starts), str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (workdir / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        for i in range(KILLS):
            time.sleep(rng.uniform(0, 0.15))
            assert process.poll() is None, process.stderr.read()[-3000:]
            hold(process)
            copies.append(Path(shutil.copytree(workdir, folder / str(i))))
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.communicate()
    return copies


def whole_and_half(workdir):
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    return {int(name) for name in names if name.isdigit()}, {name for name in names if not name.isdigit()}


def test_the_moments_are_in_the_middle_of_saves_too(killed):
    half = [whole_and_half(copy)[1] for copy in killed]
    assert sum(map(bool, half)) >= 5
    assert sum(not names for names in half) >= 1
    assert len({tuple(sorted(whole_and_half(copy)[0])) for copy in killed}) >= 5


def test_every_moment_leaves_a_whole_checkpoint_that_is_one_save_old_at_most(killed, starts):
    like = state_of(endless(starts))
    for copy in killed:
        checkpoints = Checkpoints(copy)
        latest = checkpoints.latest()
        done = max((line["step"] for line in read_metrics(copy / "metrics.jsonl")), default=0)
        due = done // EVERY * EVERY
        assert (latest or 0) >= due - EVERY, (latest, done)  # `due` may be half on disk
        if latest is not None:
            state, position = checkpoints.restore(like)
            assert int(state.step) == latest
            assert position["examples"] == 8 * latest
            for leaf in jax.tree.leaves((state.params, state.opt)):
                assert (np.asarray(leaf) == latest).all()
        checkpoints.close()


def state_of(config):
    """What its checkpoints are restored into."""
    mesh = loop.sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return state_shapes(config, loop.open_inputs(config)[1], mesh)[0]


@pytest.mark.parametrize("moment", [7, 23, 41])
def test_a_killed_run_goes_on_to_its_end(killed, starts, moment, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "make_train_step", marked_steps)
    workdir = shutil.copytree(killed[moment], tmp_path / "run")
    before = Checkpoints(workdir).latest() or 0
    loop.train(endless(starts, steps=before + 2), workdir)
    assert not whole_and_half(workdir)[1]
    assert Checkpoints(workdir).latest() == before + 2
    assert json.loads((workdir / "config.json").read_text())["steps"] == before + 2
    assert (workdir / "model" / "model.safetensors").exists()
