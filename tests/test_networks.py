"""How parameters are held: in which dtype, and how laid out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY, fingerprint, tiny

from hmar_jax import Model, networks
from hmar_jax import params as trees
from hmar_jax.model import from_pretrained
from hmar_jax.networks import Layout, hold

READ_BY_PRODUCT = {
    "transformer.trunk.blocks.attention.qkv.kernel": True,
    "transformer.masked.stack.blocks.fc2.kernel": True,
    "transformer.next_scale.head.linear.kernel": True,
    "transformer.word.kernel": True,
    "tokenizer.decoder.conv_in.kernel": True,
    "tokenizer.decoder.conv_in.bias": True,
    "tokenizer.decoder.conv_out.bias": False,
    "transformer.trunk.blocks.adaln.kernel": False,
    "transformer.next_scale.head.adaln.kernel": False,
    "transformer.trunk.blocks.fc1.bias": False,
    "transformer.class_embed.embedding": False,
    "transformer.pos": False,
    "tokenizer.quantizer.codebook": False,
    "tokenizer.quantizer.phis.0.kernel": False,
    "tokenizer.decoder.norm_out.scale": False,
}


@pytest.fixture(scope="module")
def whole(model):
    """Parameters in no device's layout, also where the tests run on a GPU."""
    return Layout.unpack(model.params)


@pytest.mark.parametrize("name", READ_BY_PRODUCT)
def test_for_bfloat16_what_its_products_read_alone_is_held_in_it(whole, name):
    held = trees.flatten(Layout.unpack(hold(TINY, whole, "bfloat16")))
    given = trees.flatten(whole)
    assert held[name].dtype == (jnp.bfloat16 if READ_BY_PRODUCT[name] else jnp.float32)
    assert (held[name] == given[name].astype(held[name].dtype)).all()


def test_a_projection_that_all_blocks_share_stays_float32():
    config = tiny(shared_adaln=True)
    flat = {"transformer.adaln.kernel": jnp.ones((2, 2)), "transformer.trunk.blocks.fc1.kernel": jnp.ones((2, 2))}
    held = trees.flatten(Layout.unpack(hold(config, trees.unflatten(flat), "bfloat16")))
    assert [leaf.dtype for leaf in held.values()] == [jnp.float32, jnp.bfloat16]


def test_for_float32_parameters_are_held_as_they_are(model):
    stored = hold(TINY, model.params, "bfloat16")
    kept = hold(TINY, stored, "float32")
    for name, leaf in trees.flatten(stored).items():
        assert trees.flatten(kept)[name] is leaf


def test_the_layout_for_gpus_has_blocks_apart_and_output_channels_first_and_can_be_undone(whole):
    packed = Layout.GPU.pack(whole)
    given, found = trees.flatten(whole), trees.flatten(packed)
    assert found.keys() == given.keys()
    for name, leaf in given.items():
        if name.startswith("transformer") and ".blocks." in name and ".adaln" not in name:
            expected = list(leaf)
        elif name.startswith("tokenizer") and name.endswith(".kernel"):  # all its layers are convolutions
            expected = [np.moveaxis(leaf, -1, 0)]
        else:
            assert found[name] is leaf
            continue
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found[name]), expected)
    assert (Layout.of(whole), Layout.of(packed)) == (Layout.WHOLE, Layout.GPU)
    assert Layout.GPU.pack(packed) is packed
    assert Layout.WHOLE.pack(whole) is whole
    for whole in (Layout.unpack(packed), Layout.WHOLE.pack(packed)):
        jax.tree.map(np.testing.assert_array_equal, whole, whole)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(networks, "device", lambda: ("gpu", "NVIDIA H200"))


def test_on_gpus_a_model_is_held_in_their_layout_and_is_the_same(model, on_gpu, tmp_path):
    apart = Model(TINY, model.params)
    again = Model(TINY, apart.params)
    assert Layout.of(apart.params) is Layout.of(again.params) is Layout.GPU
    narrow = [hold(TINY, params, "bfloat16") for params in (apart.params, model.params)]
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), *narrow)
    labels, tokens = [1], np.zeros((1, TINY.ladder.length), np.int32)
    found, expected = (m.next_scale_logits(labels, tokens) for m in (apart, model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert apart.sample([1], greedy=True).tokens.tolist() == model.sample([1], greedy=True).tokens.tolist()
    assert fingerprint(apart) == fingerprint(model)
    saved = from_pretrained(apart.save(tmp_path / "model", source="made for a test"))
    jax.tree.map(np.testing.assert_array_equal, Layout.unpack(saved.params), Layout.unpack(model.params))


def test_parameters_on_the_host_stay_whole(model, on_gpu):
    held = hold(TINY, jax.tree.map(np.asarray, model.params), "float32")
    assert Layout.of(held) is Layout.WHOLE
