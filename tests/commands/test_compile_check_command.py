"""`hmar-jax compile-check` from the command line: programs compiled for TPUs that are not here, and refusals.

Run as a script, with a folder that has the configs, it compiles and prints what came of it as JSON.
"""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hmar_jax.bench import train
from hmar_jax.commands.main import main
from hmar_jax.compile_check import costs, programs
from hmar_jax.compile_check.hlo import Program
from hmar_jax.compile_check.topology import CHIPS, Topology, open_topology
from hmar_jax.config import MeshConfig
from hmar_jax.formats.model_directory import read_config
from hmar_jax.training.objectives import OBJECTIVES, initial_parts, make_objective
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.state import TrainState

# Shared by the test and the process that it starts.
LAYERS, WIDTH, ROWS = 6, 256, 4096
COMMANDS = {
    "fits": ["--topology=v5e:2x2", "--sample-batch=3"],
    "bfloat16": ["--topology=v5e:2x2", "--sample-batch=0", "--config.dtype=bfloat16"],
    "too large": ["--topology=v5e:2x2", "--sample-batch=0", "--config.batch_size=4000000"],
}

REFUSED = {
    "topology": (["--topology=v9:2x2"], "No topology is named 'v9:2x2'"),
    "mesh": (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "does not make the 4 devices"),
    "batch": (["--topology=v5e:2x2", "--config.batch_size=6"], "gives 6 examples to 4 devices"),
    "output": (["--topology=v5e:2x2", "--output=report.txt"], "expected a file that ends in .json or .md"),
    "sample batch": (["--topology=v5e:2x2", "--sample-batch=-1"], "--sample-batch is -1; expected pictures"),
    "slice": (["--topology=v5e:3x3"], "libtpu knows no slice v5e:3x3"),
    "field": (["--topology=v5e:2x2", "--config.width=3"], "No such field in the config"),
}


def compile_for_tpus(folder):
    """Name → exit code, output and report of a command; and the collectives of a program with known ones."""
    found = {}
    for name, (options, _) in REFUSED.items():
        found[name] = _run(folder, options)
    for name, options in COMMANDS.items():
        file = folder / f"{name}.json"
        found[name] = _run(folder, [f"--output={file}", *options]) | {"report": json.loads(file.read_text())}
    return found | {"layers": _compile_layers()}


def _run(folder, options):
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            code = main(["compile-check", f"--config={folder / 'config.py'}", *options])
        except SystemExit as stopped:
            code = stopped.code
    return {"code": code, "said": said.getvalue(), "complained": complained.getvalue()}


def _compile_layers():
    """Layers whose weights four devices share, gathered as they are used: counts and payloads by kind."""
    mesh = Mesh(np.array(open_topology("v5e:2x2").devices), ("fsdp",), axis_types=(AxisType.Auto,))

    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(jax.lax.with_sharding_constraint(x, P("fsdp")) @ weight), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    def placed(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    weights, x = placed((LAYERS, WIDTH, WIDTH), P(None, "fsdp")), placed((ROWS, WIDTH), P("fsdp"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), out_shardings=weights.sharding).lower(weights, x).compile()
    program = Program(compiled.as_text())
    kinds = {kind: (sums.count, sums.payload) for kind, sums in costs.collectives(program).items()}
    return {"kinds": kinds, "products": costs.products(program)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, write_config):
    """What `compile_for_tpus` returns, in a process of its own: libtpu does not come into this one."""
    folder = tmp_path_factory.mktemp("compile check")
    config = tiny.next_scale_config(folder, sides=(1, 4), tokenizer=tiny.TOKENIZER)
    write_config(folder / "config.py", config)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "LIBTPU_"))
    }
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
class TestCompiled:
    def test_what_fits_exits_with_0_and_says_so_of_both_programs(self, compiled):
        found = compiled["fits"]
        assert found["code"] == 0
        assert found["said"].count(", fits (compiled in") == 2
        assert [program["name"] for program in found["report"]["programs"]] == ["train step", "sampler"]
        assert [program["images"] for program in found["report"]["programs"]] == [8, 4]  # a multiple of 4 devices

    def test_parallel_data_reduces_every_gradient_once(self, compiled):
        report = compiled["fits"]["report"]
        gradients = report["state"]["trained parameters"]  # float32, as they are, and whole on every device
        moved = report["programs"][0]["collectives"]
        assert moved.keys() == {"all-reduce"}
        metrics = 4096  # a few scalars
        assert gradients <= moved["all-reduce"]["payload"] < gradients + metrics

    def test_gradients_of_weights_in_bfloat16_products_are_summed_over_devices_in_bfloat16(self, compiled):
        """As docs/experiments.md decides; all others, AdaLN's weights among them, in float32."""
        config = tiny.TRANSFORMER
        width, hidden, codes = config.width, config.mlp_ratio * config.width, tiny.TOKENIZER.codebook_size
        block = 3 * width**2 + width**2 + 2 * width * hidden  # qkv, proj, fc1, fc2
        narrow = config.depth * block + width * (codes + tiny.TOKENIZER.latent_channels)  # head, word
        report = compiled["bfloat16"]["report"]
        moved, metrics = report["programs"][0]["collectives"], 4096
        expected = report["state"]["trained parameters"] - 2 * narrow
        assert moved.keys() == {"all-reduce"}
        assert expected <= moved["all-reduce"]["payload"] < expected + metrics

    def test_memory_and_time_add_up(self, compiled):
        step = compiled["fits"]["report"]["programs"][0]
        memory = step["memory"]
        assert memory["arguments"] + memory["idle"] >= sum(compiled["fits"]["report"]["state"].values())
        parts = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]
        assert memory["total"] == parts + memory["idle"] < CHIPS["v5e"].usable
        useful = sum(step["model_flops"].values())
        assert useful < 4 * step["flops"]  # the quantizer and AdaLN are extra
        assert 0 < step["mfu"] <= 1
        assert step["unknown_loops"] == 0

    def test_what_does_not_fit_exits_with_1_and_names_a_remedy_that_is_enough(self, compiled):
        found = compiled["too large"]
        assert found["code"] == 1
        assert "DOES NOT FIT" in found["said"]
        assert found["report"]["programs"][0]["memory"]["total"] > CHIPS["v5e"].usable
        *before, last = found["report"]["remedies"]
        assert last["enough"] and not any(remedy["enough"] for remedy in before)
        assert f"{last['change']}: about" in found["said"]

    def test_layers_in_a_loop_gather_their_weights_and_scatter_their_gradients_once_each_way(self, compiled):
        size = LAYERS * WIDTH * WIDTH * 2
        kinds = compiled["layers"]["kinds"]
        assert kinds["all-gather"] == [2 * LAYERS, 2 * size]  # forward, and backward
        reduced = kinds.get("reduce-scatter", [0, 0])[1] + kinds.get("all-reduce", [0, 0])[1]
        assert size <= reduced <= 2 * size + 4096  # in bfloat16 or float32
        assert compiled["layers"]["products"] == 3 * 2 * LAYERS * WIDTH * WIDTH * ROWS / 4

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_cannot_be_is_one_sentence(self, compiled, name):
        found, (_, sentence) = compiled[name], REFUSED[name]
        assert (found["code"], found["said"]) == (2, "")
        assert sentence in found["complained"]
        assert found["complained"].count("\n") == 1


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    return tiny.once(tiny.shared_folder(tmp_path_factory) / "starts", tiny.write_starts)


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_the_state_is_that_of_training_though_nothing_is_read(starts, stage, tmp_path, monkeypatch):
    sizes = {"sides": tiny.LADDER.sides, "tokenizer": tiny.TOKENIZER, "transformer": tiny.TRANSFORMER}
    real, absent = (tiny.stage_config(stage, folder, mesh=MeshConfig(1), **sizes) for folder in (starts, tmp_path))
    parts = initial_parts(make_objective(real, tiny.CLASSES))
    optimizer = make_optimizer(real.optimizer, real.steps, real.batch_size, parts.trained)
    truth = TrainState.create(real, parts, optimizer), parts.frozen
    setup = programs.prepare(absent, Topology("here", CHIPS["v5e"], tuple(jax.devices()[:1])))
    assumed = setup.state, setup.frozen
    assert jax.tree.structure(assumed) == jax.tree.structure(truth)
    for left, right in zip(jax.tree.leaves(assumed), jax.tree.leaves(truth), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
    out_state, _ = programs.lower_train_step(setup).out_info
    assert [x.shape for x in jax.tree.leaves(out_state)] == [x.shape for x in jax.tree.leaves(truth[0])]


def test_sizes_are_those_of_the_model_in_init_from_where_it_is_here(starts, tmp_path, monkeypatch):
    config, absent = tiny.masked_config(starts), tiny.masked_config(tmp_path)
    real, _ = read_config(starts / "next_scale")
    assert programs.start_model(config) == real
    assert programs.start_model(absent).ladder.sides == absent.sides != real.ladder.sides

    def stop(model, place):
        raise InterruptedError(model)

    monkeypatch.setattr(train, "_made_up_params", stop)  # what `bench train` measures
    with pytest.raises(InterruptedError) as stopped:
        train._fresh(config)
    assert stopped.value.args == (real,)


if __name__ == "__main__":
    print(json.dumps(compile_for_tpus(Path(sys.argv[1]))))
