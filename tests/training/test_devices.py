"""Training on 8 simulated devices tracks training on one; sizes that don't fit the devices are a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_training import next_scale_config, stage_config, tokenizer_config

from hmar_jax.config import MeshConfig
from hmar_jax.errors import InputError
from hmar_jax.training import loop, sharding
from hmar_jax.training.metrics import read_metrics

# Width 16 and depth 2 divide by fsdp=2, so that parameters and moments are really split.
SCRIPT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import jax
from tiny_training import next_scale_config, quick_compilation, stage_config
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
quick = quick_compilation(out / "compiled")  # programs for 8 devices are of no use to others
quick.__enter__()
for stage, name, mesh in [
    ("next_scale", "data8", MeshConfig()),
    ("next_scale", "data4fsdp2", MeshConfig(data=4, fsdp=2)),
    ("tokenizer", "tokenizer", MeshConfig(data=-1, fsdp=2)),
]:
    began = time.time()
    loop.train(stage_config(stage, starts, mesh=mesh), out / name)
    print(name, time.time() - began, file=sys.stderr)
sentences = []
for changes in ({"batch_size": 12}, {"batch_size": 24, "accumulate": 2}, {"mesh": MeshConfig(data=3, fsdp=2)}):
    try:
        loop.train(next_scale_config(starts, **changes), out / "refused")
    except InputError as error:
        sentences.append(str(error))
print(json.dumps({"sizes": report, "sentences": sentences, "written": (out / "refused").exists()}))
"""


@pytest.fixture(scope="module")
def eight(starts, tmp_path_factory):
    """The work directories of runs on 8 devices, and what was reported about them."""
    out = tmp_path_factory.mktemp("eight")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(starts), str(out)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    print(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one(starts, tmp_path_factory):
    """stage → work directory of the same run on one device."""
    out = tmp_path_factory.mktemp("one")
    for stage in ("next_scale", "tokenizer"):
        loop.train(stage_config(stage, starts), out / stage)
    return out


@pytest.mark.parametrize(
    ("name", "stage"), [("data8", "next_scale"), ("data4fsdp2", "next_scale"), ("tokenizer", "tokenizer")]
)
def test_runs_on_eight_devices_track_one_device(eight, one, name, stage):
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (eight[0] / name, one / stage))
    assert len(ours) == len(theirs) == 5
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
