"""Training on 8 simulated devices tracks training on one; sizes that don't fit the devices are a sentence."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_training import LOSS, next_scale_config, once, shared_folder, stage_config, tokenizer_config

from hmar_jax.config import MeshConfig
from hmar_jax.errors import InputError
from hmar_jax.training import loop, sharding
from hmar_jax.training.metrics import read_metrics

# Without the discriminator, whose 8-device program takes long to compile.
SHORT = {
    "next_scale": {"steps": 3},
    "tokenizer": {"steps": 3, "tokenizer_loss": dataclasses.replace(LOSS, adversarial=0.0)},
}
# Width 16 and depth 2 divide by fsdp=2, so that parameters and moments are really split.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import jax
from tiny_training import next_scale_config, quick_compilation, stage_config
from test_devices import SHORT
from hmar_jax.config import MeshConfig
from hmar_jax.errors import InputError
from hmar_jax.training import loop
from hmar_jax.training.checkpoint import Checkpoints

starts, out = Path(sys.argv[2]), Path(sys.argv[3])
assert jax.device_count() == 8
report = {}
save = Checkpoints.save
def spy(self, step, state, *rest):
    leaves = jax.tree.leaves((state.params, state.opt))
    report[self.folder.parent.name] = [
        sum(leaf.addressable_shards[0].data.size for leaf in leaves), sum(leaf.size for leaf in leaves)
    ]
    save(self, step, state, *rest)
Checkpoints.save = spy
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **about: compiled.append(about.get("fun_name")) if "jaxpr_to_mlir" in event else None
)
quick = quick_compilation(starts.parent / "compiled")
quick.__enter__()
for stage, name, mesh in [
    ("next_scale", "data8", MeshConfig()),
    ("next_scale", "data4fsdp2", MeshConfig(data=4, fsdp=2)),
    ("tokenizer", "tokenizer", MeshConfig(data=-1, fsdp=2)),
]:
    loop.train(stage_config(stage, starts, mesh=mesh, **SHORT[stage]), out / name)
sentences = []
for changes in ({"batch_size": 12}, {"batch_size": 24, "accumulate": 2}, {"mesh": MeshConfig(data=3, fsdp=2)}):
    try:
        loop.train(next_scale_config(starts, **changes), out / "refused")
    except InputError as error:
        sentences.append(str(error))
steps = [str(name) for name in compiled if "train_step" in str(name)]
written = (out / "refused").exists()
print(json.dumps({"sizes": report, "compiled": len(steps), "sentences": sentences, "written": written}))
"""


@pytest.fixture(scope="module")
def eight(starts, tmp_path_factory):
    """The work directories of runs on 8 devices, and what was reported about them."""

    def run(out):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(starts), str(out)],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (out / "report.json").write_text(done.stdout.splitlines()[-1])

    out = once(shared_folder(tmp_path_factory) / "eight", run)
    return out, json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def one(starts, tmp_path_factory):
    """stage → work directory of the same run on one device."""
    out = tmp_path_factory.mktemp("one")
    for stage in ("next_scale", "tokenizer"):
        loop.train(stage_config(stage, starts, **SHORT[stage]), out / stage)
    return out


@pytest.mark.parametrize(
    ("name", "stage"), [("data8", "next_scale"), ("data4fsdp2", "next_scale"), ("tokenizer", "tokenizer")]
)
def test_runs_on_eight_devices_track_one_device(eight, one, name, stage):
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (eight[0] / name, one / stage))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    a, b = (
        safetensors.numpy.load_file(folder / "model" / "model.safetensors") for folder in (eight[0] / name, one / stage)
    )
    for entry, value in a.items():
        if not entry.endswith("qkv.bias"):  # the keys' part has no gradient but rounding, which Adam blows up
            np.testing.assert_allclose(value, b[entry], atol=1e-5, err_msg=entry)


def test_fsdp_splits_parameters_and_moments_and_keeps_them_split(eight):
    here, whole = eight[1]["sizes"]["data4fsdp2"]
    assert here < 0.6 * whole
    here, whole = eight[1]["sizes"]["data8"]
    assert here == whole


def test_each_run_compiles_its_step_once(eight):
    assert eight[1]["compiled"] == 3


def test_what_the_devices_do_not_divide_is_a_sentence_and_writes_nothing(eight):
    batch, accumulated, mesh = eight[1]["sentences"]
    assert "batch_size=12" in batch
    assert "12 examples to 8 devices" in batch
    assert "multiple of 8." in batch
    assert "gives 12 examples to 8 devices" in accumulated
    assert "multiple of 16." in accumulated
    assert "mesh.data=3 times mesh.fsdp=2 does not make the 8 devices" in mesh
    assert not eight[1]["written"]


@pytest.mark.parametrize("axes", [(2, 1), (1, 2), (-1, 2), (0, 1), (-1, 0), (0, -1), (-1, -1), (-1, -2), (-2, -2)])
def test_a_mesh_that_is_not_the_devices_is_a_sentence(axes):
    with pytest.raises(InputError, match=r"mesh.data=-?\d times mesh.fsdp=-?\d does not make the 1 devices here"):
        sharding.make_mesh(MeshConfig(*axes))


@pytest.mark.parametrize("axes", [(-1, 1), (1, -1), (1, 1)])
def test_minus_one_takes_the_devices_that_are_left(axes):
    assert dict(sharding.make_mesh(MeshConfig(*axes)).shape) == {"data": 1, "fsdp": 1}


def test_one_device_takes_any_batch():
    sharding.check_batch(tokenizer_config(batch_size=7), sharding.make_mesh(MeshConfig()))
    sharding.check_batch(next_scale_config(Path("x"), batch_size=6, accumulate=3), sharding.make_mesh(MeshConfig()))
