"""Tiny models and reference outputs, made once a session and shared by the batteries.

Helpers to import lie in tiny_models.py: several folders have a `conftest`, and an import may find any of them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: half of their time would go into optimising code that runs once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.weights import make_state_dict
from tiny_models import TINY, lively_model, tiny

from hmar_jax import convert
from hmar_jax import params as trees
from hmar_jax.config import ModelConfig, TokenizerConfig, TransformerConfig
from hmar_jax.model import Model, networks
from hmar_jax.scales import ScaleLadder

# Examples compile, so that time says nothing; the same examples on every run.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.load_profile("tests")

GOLDENS = os.path.join(os.path.dirname(__file__), "goldens")


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
def golden_model(golden):
    """(manifest, **transformer fields) → the Model that the reference outputs of that manifest come from."""
    tokenizer = convert.tokenizer_from_official(make_state_dict(golden["vae_manifest"]))

    def build(manifest, **fields):
        transformer = TransformerConfig(depth=4, width=256, heads=4, num_classes=10, branch_depth=2, **fields)
        sizes = TokenizerConfig(channels=32, latent_channels=8, codebook_size=64)
        config = ModelConfig(ScaleLadder((1, 2, 3, 4)), sizes, transformer)
        flat = convert.transformer_from_official(make_state_dict(manifest), transformer)
        if transformer.masked:  # a stage-2 layout has one set of blocks, which is the mask branch's as well
            shared = {name.replace("next_scale.", "masked."): leaf for name, leaf in flat.items()}
            flat = {name: leaf for name, leaf in shared.items() if name.startswith("masked.")} | flat
        params = {"tokenizer": trees.unflatten(tokenizer), "transformer": trees.unflatten(flat)}
        return Model(config, {kind: _as_jax(tree) for kind, tree in params.items()})

    return build


def _as_jax(tree):
    return trees.unflatten({name: jnp.asarray(leaf) for name, leaf in trees.flatten(tree).items()})
