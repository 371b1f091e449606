"""On 8 simulated devices training tracks one device on any mesh; what does not fit the devices is a sentence."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from tiny_training import (
    CLASSES,
    LOSS,
    next_scale_config,
    once,
    shared_folder,
    sound_argmax,
    stage_config,
    tokenizer_config,
)

from hmar_jax import params as trees
from hmar_jax.bulk.token_caches import export_tokens
from hmar_jax.compile_check import costs, programs
from hmar_jax.compile_check.hlo import Program
from hmar_jax.compile_check.topology import CHIPS, Topology
from hmar_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TransformerConfig
from hmar_jax.data.tokens import TokenSource
from hmar_jax.errors import InputError
from hmar_jax.model import from_pretrained
from hmar_jax.networks import structure
from hmar_jax.parallel import sharding
from hmar_jax.sampling import program
from hmar_jax.scales import ScaleLadder
from hmar_jax.training import loop
from hmar_jax.training.metrics import read_metrics
from hmar_jax.training.objectives import initial_parts, make_objective
from hmar_jax.training.optimizer import make_optimizer
from hmar_jax.training.state import TrainState

# Without the discriminator and the scale between, whose 8-device programs take long to compile.
SHORT = {
    "next_scale": {"steps": 3},
    "tokenizer": {"steps": 3, "sides": (1, 8), "tokenizer_loss": dataclasses.replace(LOSS, adversarial=0.0)},
}
LABELS = [0, 1, 2, 1, 0]
GLYPHS, EXPORT = DataConfig("glyphs", classes="".join(CLASSES)), {"count": 11, "crops": 2, "batch_size": 1}


def sent_by(mesh):
    """Bytes of a train step's parameters, of the tokens in a block, and kind → payload of its collectives."""
    config = stage_config(
        "next_scale",
        Path("nowhere"),
        batch_size=128,
        sides=(1, 2, 4),
        tokenizer=TokenizerConfig(channels=4, norm_groups=2, codebook_size=64, latent_channels=4),
        transformer=TransformerConfig(3, 128, 4, num_classes=10, branch_depth=1),
        mesh=mesh,
        scan_layers=mesh.fsdp > 1,  # else loops hide how often
    )
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    setup = programs.prepare(config, Topology("here", CHIPS["v5e"], tuple(devices)))
    text = programs.lower_train_step(setup).compile().as_text()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.state.params))
    tokens = 4 * 128 * 21 * 128
    return size, tokens, {kind: sums.payload for kind, sums in costs.collectives(Program(text)).items()}


def sent_by_sampling(model):
    """Bytes that eight devices exchange when they share a guided batch."""
    schedule = model.schedule("next-scale", cfg=2.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    request = program.Request.of(model.config, model.dtype, schedule, model.params, np.arange(8) % 3).on(mesh)
    with jax.set_mesh(mesh):
        text = program.sample.lower(request).compile().as_text()
    return sum(sums.payload for sums in costs.collectives(Program(text)).values())


# The meshes of a run: a second one takes over after checkpoint 2. All axes but 2 heads divide by 4.
RUNS = {
    "moved": ("next_scale", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8)]),
    "data8": ("next_scale", [MeshConfig()]),
    "tensor4": ("next_scale", [MeshConfig(tensor=4)]),
    "tokenizer": ("tokenizer", [MeshConfig(data=-1, fsdp=2)]),
}
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import jax
import numpy as np
from tiny_training import next_scale_config, quick_compilation, sound_argmax, stage_config
from test_devices import EXPORT, GLYPHS, LABELS, RUNS, SHORT, sent_by, sent_by_sampling
from test_train_step import done_in_parts
from hmar_jax.config import MeshConfig
from hmar_jax.bulk import token_caches
from hmar_jax.errors import InputError
from hmar_jax.training import loop
from hmar_jax.model import Model
from hmar_jax.model import from_pretrained
from hmar_jax.sampling import program
from hmar_jax.training.checkpoint import Checkpoints

starts, out = Path(sys.argv[2]), Path(sys.argv[3])
assert jax.device_count() == 8
sent = {"fsdp": sent_by(MeshConfig(data=1, fsdp=8)), "tensor": sent_by(MeshConfig(data=1, tensor=4))}
parts = [done_in_parts(1), done_in_parts(4)]
report, seen = {}, {}
save, put = Checkpoints.save, loop.sharding.put_batch
def spy(self, step, state, *rest):
    leaves = jax.tree.leaves((state.params, state.opt))
    report[f"{self.folder.parent.name} {step}"] = [
        sum(leaf.addressable_shards[0].data.size for leaf in leaves), sum(leaf.size for leaf in leaves)
    ]
    save(self, step, state, *rest)
    seen["state"] = jax.device_get(state)
Checkpoints.save = spy

whole, initial_state = [], loop.initial_state
def watched(*args, **kwargs):
    made = initial_state(*args, **kwargs)
    if not whole:
        live = [a for a in jax.live_arrays() if len(a.sharding.device_set) == 1 or a.is_fully_replicated]
        whole.append([list(a.shape) for a in live if a.size > 256])
    return made
loop.initial_state = watched

class StopError(Exception):
    pass

def until(last):
    steps = iter(range(1, 100))
    def counted(batch, mesh):
        if next(steps) > last:
            raise StopError
        return put(batch, mesh)
    loop.sharding.put_batch = counted
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **about: compiled.append(about.get("fun_name")) if "jaxpr_to_mlir" in event else None
)
quick = quick_compilation(starts.parent / "compiled")
quick.__enter__()
for name, (stage, meshes) in RUNS.items():
    *before, mesh = meshes
    if before:
        until(2)
        try:
            loop.train(stage_config(stage, starts, mesh=before[0], **SHORT[stage]), out / name)
        except StopError:
            saved = seen["state"]
        restore = Checkpoints.restore
        def restored(self, like):
            state, position = restore(self, like)
            same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), jax.device_get(state), saved)
            report["restored"] = [jax.tree.all(same), position["examples"], int(state.step)]
            return state, position
        Checkpoints.restore = restored
        until(100)
    loop.train(stage_config(stage, starts, mesh=mesh, **SHORT[stage]), out / name)
model = from_pretrained(starts / "next_scale", "float32")
mesh = loop.sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
    params = jax.device_put(model.params, loop.sharding.tree_shardings(model.params, mesh))
    with sound_argmax():
        tokens = Model(model.config, params).sample(LABELS, seed=3).tokens.tolist()
sent["sampling"] = sent_by_sampling(model)
shares, encode = [], token_caches._encode
def encoded(*arguments):
    images = arguments[-1]
    shares.append([images.shape[0], *(part.data.shape[0] for part in images.addressable_shards)])
    return encode(*arguments)
token_caches._encode = encoded
token_caches.export_tokens(starts / "tokenizer", GLYPHS, out / "tokens", **EXPORT)
sentences = []
for changes in ({"batch_size": 12}, {"batch_size": 24, "accumulate": 2}, {"mesh": MeshConfig(data=3, fsdp=2)}):
    try:
        loop.train(next_scale_config(starts, **changes), out / "refused")
    except InputError as error:
        sentences.append(str(error))
steps = [str(name) for name in compiled if "train_step" in str(name)]
written = (out / "refused").exists()
facts = {"sizes": report, "whole": whole[0], "compiled": len(steps), "tokens": tokens, "sent": sent, "parts": parts}
print(json.dumps(facts | {"shares": shares, "sentences": sentences, "written": written}))
"""


@pytest.fixture(scope="module")
def eight(starts, tmp_path_factory):
    """The work directories of runs on 8 devices, and what was reported about them."""

    def run(out):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(starts), str(out)],
            env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"},
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


@pytest.mark.parametrize("name", RUNS)
def test_runs_on_eight_devices_track_one_device(eight, one, name):
    stage = RUNS[name][0]
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


@pytest.mark.parametrize(("name", "share"), [("data8 3", 1), ("moved 2", 0.35), ("moved 3", 0.2), ("tensor4 3", 0.4)])
def test_parameters_and_moments_are_split_and_stay_so(eight, name, share):
    here, whole = eight[1]["sizes"][name]
    assert here <= share * whole
    assert share < 1 or here == whole


def test_no_device_ever_holds_more_than_its_part_of_a_new_state(eight):
    assert eight[1]["whole"] == []


def test_a_state_moves_to_another_mesh_bit_for_bit(eight):
    assert eight[1]["sizes"]["restored"] == [True, 16, 2]


def test_samples_do_not_depend_on_the_mesh(eight, starts):
    with sound_argmax():
        one = from_pretrained(starts / "next_scale").sample(LABELS, seed=3)
    assert one.tokens.tolist() == eight[1]["tokens"]


def test_all_devices_share_what_a_token_cache_is_made_from(eight, starts, tmp_path):
    assert eight[1]["shares"] == [[16] + [2] * 8] * 2  # of 8 pictures in a batch, 3 in the last
    export_tokens(starts / "tokenizer", GLYPHS, tmp_path / "tokens", **EXPORT)
    ours, theirs = (TokenSource(folder / "tokens") for folder in (eight[0], tmp_path))
    assert len(ours) == len(theirs) == 11
    for a, b in zip(ours, theirs, strict=True):
        assert a["label"] == b["label"]
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_devices_that_share_a_guided_batch_exchange_no_more_than_random_keys(eight):
    assert eight[1]["sent"]["sampling"] < 4096


def test_fsdp_gathers_weights_twice_and_sends_no_activations(eight):
    size, _, sent = eight[1]["sent"]["fsdp"]
    metrics = 4096  # a few scalars
    assert sent["all-gather"] <= 2 * size  # forward, and backward
    assert sent["all-reduce"] < size + metrics  # how a CPU scatters the gradients
    assert sum(sent.values()) < 3.1 * size


def test_tensor_sums_tokens_twice_a_block_and_pass_and_exchanges_little_else(eight):
    size, tokens, sent = eight[1]["sent"]["tensor"]
    assert 13 * tokens <= sent["all-reduce"] < 13.5 * tokens  # 3 blocks, and the head's gradient
    assert sum(sent.values()) - sent["all-reduce"] < 1.2 * size  # conditions, embeddings, weights by head


def test_a_batch_worked_off_in_parts_stays_where_it_is_and_keeps_every_device_busy(eight):
    (whole, _), (in_parts, sent) = eight[1]["parts"]
    assert in_parts == whole
    assert list(sent) == ["all-reduce"]  # of gradients


def test_each_run_compiles_its_step_once(eight):
    assert eight[1]["compiled"] == sum(len(meshes) for _, meshes in RUNS.values())


def test_what_the_devices_do_not_divide_is_a_sentence_and_writes_nothing(eight):
    batch, accumulated, mesh = eight[1]["sentences"]
    assert "batch_size=12" in batch
    assert "12 examples to 8 devices" in batch
    assert "multiple of 8." in batch
    assert "gives 12 examples to 8 devices" in accumulated
    assert "multiple of 16." in accumulated
    assert "mesh.data=3 times mesh.fsdp=2 times mesh.tensor=1 does not make the 8 devices" in mesh
    assert not eight[1]["written"]


@pytest.mark.parametrize(
    "axes", [(2, 1), (1, 2), (-1, 2), (0, 1), (-1, 0), (0, -1), (-1, -1), (-1, -2), (-2, -2), (1, 1, 2), (-1, 1, -1)]
)
def test_a_mesh_that_is_not_the_devices_is_a_sentence(axes):
    with pytest.raises(InputError, match=r"mesh.data=-?\d times .*fsdp=-?\d times .* does not make the 1 devices here"):
        sharding.make_mesh(MeshConfig(*axes))


@pytest.mark.parametrize("axes", [(-1, 1), (1, -1), (1, 1), (1, 1, -1)])
def test_minus_one_takes_the_devices_that_are_left(axes):
    assert dict(sharding.make_mesh(MeshConfig(*axes)).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_one_device_takes_any_batch():
    sharding.check_batch(tokenizer_config(batch_size=7), sharding.make_mesh(MeshConfig()))
    sharding.check_batch(next_scale_config(Path("x"), batch_size=6, accumulate=3), sharding.make_mesh(MeshConfig()))


# --- rules by path


def tree_of(config):
    """Shapes of all that a run of the config trains or reads, as its state and frozen parameters hold them."""
    parts = initial_parts(make_objective(config, CLASSES))
    optimizer = make_optimizer(config.optimizer, 1, 1, parts.trained)
    return jax.eval_shape(lambda parts: (TrainState.create(config, parts, optimizer), parts.frozen), parts)


@pytest.mark.parametrize("stage", ["tokenizer", "next_scale", "masked"])
def test_a_rule_is_for_every_part_of_a_state_and_moments_follow_their_parameters(starts, stage):
    config = stage_config(stage, starts, optimizer=OptimizerConfig(ema=0.9))
    mesh = AbstractMesh((1, 2, 2), sharding.AXES)
    state, frozen = tree_of(config)
    split = sharding.tree_shardings(state, mesh)
    sharding.tree_shardings(frozen, mesh)
    specs = {name: leaf.spec for name, leaf in trees.flatten(split.params).items()}
    averaged = {name: leaf.spec for name, leaf in trees.flatten(split.ema).items()}
    assert averaged == {name: spec for name, spec in specs.items() if not name.startswith("discriminator.")}
    moments = jax.tree_util.tree_leaves_with_path(split.opt)
    found = {sharding._name(path): leaf.spec for path, leaf in moments}
    for name, spec in specs.items():
        assert {found[moment] for moment in found if moment.endswith(f".{name}")} == {spec}, name


@pytest.mark.parametrize("preset", ["d16", "d30", "d36-s", "var-d16"])
def test_presets_are_split_by_heads_hidden_units_and_codes(preset):
    transformer = TransformerConfig.preset(preset)
    config = ModelConfig(ScaleLadder.preset(256), TokenizerConfig(), transformer)
    shapes = nnx.to_pure_dict(structure(config)[1])
    specs = trees.flatten(sharding.tree_shardings(shapes, AbstractMesh((1, 2, 2), sharding.AXES)))
    split = {name: specs[f"transformer.{name}"].spec for name in ("next_scale.head.linear.kernel", "pos")}
    assert split == {"next_scale.head.linear.kernel": P("fsdp", "tensor"), "pos": P(None, "fsdp")}
    blocks = {
        "attention.qkv.kernel": P(None, "fsdp", "tensor"),
        "attention.proj.kernel": P(None, "tensor", "fsdp"),
        "fc1.kernel": P(None, "fsdp", "tensor"),
        "fc1.bias": P(None, "tensor"),
        "fc2.kernel": P(None, "tensor", "fsdp"),
    }
    for name, spec in blocks.items():
        assert specs[f"transformer.trunk.blocks.{name}"].spec == spec, name
    large = [
        name
        for name, shape in trees.flatten(shapes).items()
        if math.prod(shape.shape) > 10**6 and specs[name].spec == P()
    ]
    assert not large


def test_a_name_that_no_rule_knows_is_an_error():
    with pytest.raises(LookupError, match=r"No rule in .*sharding says how transformer.surprise \(4, 4\) is split"):
        sharding.tree_shardings({"transformer": {"surprise": np.zeros((4, 4))}}, AbstractMesh((1, 1, 1), sharding.AXES))


# --- TPU slices, which are not here


class Chip:
    """What the making of a mesh asks of a device."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v4", 0, 0

    def __init__(self, number, slices, grid):
        self.id, self.slice_index = number, number // math.prod(grid)
        self.coords = (*np.unravel_index(number % math.prod(grid), grid), 0)
        if slices == 1:
            del self.slice_index


@pytest.mark.parametrize(("slices", "axes"), [(1, (2, 2, 2)), (2, (-1, 4, 1)), (2, (2, 4, 2)), (4, (4, 2, 4))])
def test_data_spans_slices_and_the_other_axes_stay_in_one(slices, axes):
    chips = [Chip(i, slices, (4, 2)) for i in range(8 * slices)]
    arranged = sharding._arranged([8 * slices // 4 if a == -1 else a for a in axes], chips)
    assert arranged.size == len({chip.id for chip in arranged.flat}) == 8 * slices
    of = np.vectorize(lambda chip: getattr(chip, "slice_index", 0))(arranged)
    assert (of == of[:, :1, :1]).all()
    assert len(np.unique(of)) == slices


def test_a_mesh_that_would_split_a_step_over_slices_is_a_sentence():
    with pytest.raises(InputError, match=r"mesh.data=1 does not divide among 2 TPU slices; make it a multiple"):
        sharding._arranged([1, 16, 1], [Chip(i, 2, (4, 2)) for i in range(16)])
