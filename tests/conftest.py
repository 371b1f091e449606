"""Tiny models and reference outputs, made once a session and shared by the batteries.

Helpers to import lie in tiny_models.py: several folders have a `conftest`, and an import may find any of them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: half of their time would go into optimising code that runs once. (Level 0 is
# faster still, but XLA 0.11.2 miscompiles there: a fused argmax of logits + Gumbel noise misses the maximum.)
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # none, unless a test has its own: neither use nor fill the developer's

import functools
import gc
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from goldens.weights import make_state_dict
from official_files import LADDER, file_of, random_state
from tiny_models import TINY, lively_model, tiny

from hmar_jax import from_pretrained
from hmar_jax.formats.convert import convert
from hmar_jax.model import Model
from hmar_jax.networks import networks
from hmar_jax.scales import ScaleLadder

# Examples compile, so that time says nothing; the same examples on every run.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.register_profile("full", deadline=None, max_examples=3000, database=None)
hypothesis.settings.load_profile("tests")

GOLDENS = os.path.join(os.path.dirname(__file__), "goldens")

# The files that take longest, the longest first: none is to be left to one worker at the end.
LONG = (
    "training/test_devices.py",
    "training/test_hosts.py",
    "kernels/test_tpu.py",
    "sampling/test_var.py",
    "sampling/test_sampler.py",
    "sampling/test_editing.py",
    "transformer/test_hmar.py",
    "commands/test_whole_path.py",
    "kernels/test_token_passes.py",
    "commands/test_demo.py",
    "training/test_resume.py",
    "sampling/test_orders.py",
    "model/test_model.py",
    "test_notebook.py",
    "training/test_tokenizer_objective.py",
    "commands/test_bench_train.py",
    "sampling/test_soak.py",
    "bulk/test_traces.py",
    "bulk/test_samples.py",
)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="many more examples of the property tests, with new seeds")


def pytest_configure(config):
    if config.getoption("--full"):
        hypothesis.settings.load_profile("full")


def pytest_collection_modifyitems(items):
    """Sorts by `LONG`, which pytest-xdist follows with --no-loadscope-reorder."""
    tests = Path(__file__).parent
    place = {tests / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def _earlier_tests_are_not_looked_through_for_garbage():
    """Compiled programs and their traces stay; a collection among those of a hundred modules takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model():
    """HMAR with a mask branch, of the published kind (leaky masked inputs)."""
    return lively_model(TINY)


@pytest.fixture(scope="session")
def leak_free_model(model):
    """The same parameters, leak-free."""
    return Model(tiny(leak_free=True), model.params)


@pytest.fixture(scope="session")
def stage1_model(model):
    """The same parameters without the mask branch."""
    transformer = {name: leaf for name, leaf in model.params["transformer"].items() if "mask" not in name}
    return Model(tiny(masked=False), model.params | {"transformer": transformer})


@pytest.fixture(scope="session")
def var_model(stage1_model):
    """The same parameters as a VAR's."""
    return Model(tiny(masked=False, pattern="block_causal"), stage1_model.params)


@pytest.fixture(scope="session")
def quantizer(model):
    return networks(model.config, model.params).tokenizer.quantizer


@pytest.fixture(scope="session")
def golden():
    with np.load(os.path.join(GOLDENS, "hmar_tiny.npz")) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_var():
    with np.load(os.path.join(GOLDENS, "var_tiny.npz")) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def official_states(golden, golden_var):
    """kind → the state dict, in the official layout, of the model that its reference outputs come from."""
    manifests = {
        "vae": golden["vae_manifest"],
        "var": golden_var["var_manifest"],
        "hmar-stage1": golden["nsp_manifest"],
        "hmar-stage2": golden["mp_manifest"],
        "hmar": golden["hmar_manifest"],
    }
    return {kind: make_state_dict(manifest) for kind, manifest in manifests.items()}


@pytest.fixture(scope="session")
def golden_directory(official_states, tmp_path_factory):
    """kind → the model directory converted from its official file."""
    folder = tmp_path_factory.mktemp("goldens")

    @functools.cache
    def build(kind):
        source = folder / f"{kind}.safetensors"
        safetensors.numpy.save_file(official_states[kind], source)
        tokenizer = None if kind == "vae" else build("vae")
        return convert(kind, source, ScaleLadder((1, 2, 3, 4)), folder / kind, tokenizer=tokenizer)

    return build


@pytest.fixture(scope="session")
def golden_model(golden_directory):
    """kind → the Model of that directory."""
    return functools.cache(lambda kind: from_pretrained(golden_directory(kind)))


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    """The model directory converted from a small tokenizer of random bits."""
    folder = tmp_path_factory.mktemp("small")
    file = file_of(folder / "vae.safetensors", random_state("vae"))
    return convert("vae", file, LADDER, folder / "vae")
