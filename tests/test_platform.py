"""Compiler flags: XLA and libtpu take them, and a user's own win."""

import importlib.util
import os
import subprocess
import sys

import pytest

from hmar_jax.platform import FLAGS, set_flags


def test_flags_are_added_and_one_that_is_set_keeps_its_value():
    ours = FLAGS["XLA_FLAGS"][0]
    theirs = ours.replace("true", "false")
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {theirs}"}
    set_flags(environment)
    assert ours not in environment["XLA_FLAGS"]
    assert environment["XLA_FLAGS"].split()[-2:] == ["--xla_force_host_platform_device_count=2", theirs]
    assert environment["LIBTPU_INIT_ARGS"] == " ".join(FLAGS["LIBTPU_INIT_ARGS"])
    before = dict(environment)
    set_flags(environment)
    assert environment == before


def run(program):
    environment = {name: value for name, value in os.environ.items() if name not in FLAGS}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    set_flags(environment)
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_xla_knows_its_flags():
    """It aborts on an unknown one, on a CPU too."""
    done = run("import jax; print(jax.numpy.ones(3).sum())")
    assert (done.returncode, done.stdout.strip()) == (0, "3.0"), done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
def test_libtpu_knows_its_flags():
    done = run(
        "import jax; from jax.experimental import topologies\n"
        "chip = topologies.get_topology_desc('v5e:1x1', platform='tpu', chips_per_host_bounds=[1, 1, 1]).devices[0]\n"
        "x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=jax.sharding.SingleDeviceSharding(chip))\n"
        "print(jax.jit(lambda x: x + 1).lower(x).compile().as_text()[:9])"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "HloModule"), done.stderr
