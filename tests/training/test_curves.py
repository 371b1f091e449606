"""What only changes how a step is computed leaves the loss curve where it is."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_training import TRANSFORMER, next_scale_config

from hmar_jax.config import OptimizerConfig
from hmar_jax.training import loop
from hmar_jax.training.metrics import read_metrics

STEPS = 8
# Largest difference in loss at any step; the curve falls by about 0.1.
TOLERANCE = {"remat": 1e-6, "scanned": 1e-6, "bfloat16": 1e-2}
CHANGES = {
    "remat": {"remat": "all"},
    "scanned": {"scan_layers": True},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def curve(starts, tmp_path_factory):
    """changes → losses (steps,) of a run with them."""
    plain = dataclasses.replace(TRANSFORMER, depth=4, branch_depth=2, drop_path=0.0, class_dropout=0.0)

    @functools.cache
    def of(name):
        workdir = tmp_path_factory.mktemp("curve")
        changes = {"optimizer": OptimizerConfig(base_lr=1.0), "transformer": plain} | CHANGES.get(name, {})
        loop.train(next_scale_config(starts, steps=STEPS, checkpoint_every=STEPS, **changes), workdir)
        return np.array([line["loss"] for line in read_metrics(workdir / "metrics.jsonl")])

    return of


@pytest.mark.parametrize("name", CHANGES)
def test_the_curve_stays(curve, name):
    plain, changed = curve("plain"), curve(name)
    assert len(plain) == len(changed) == STEPS
    assert np.ptp(plain) > 10 * TOLERANCE[name], plain
    np.testing.assert_allclose(changed, plain, rtol=0, atol=TOLERANCE[name])
