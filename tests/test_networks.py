"""In which dtype parameters are held."""

import jax.numpy as jnp
import pytest
from tiny_models import TINY, tiny

from hmar_jax import params as trees
from hmar_jax.networks import hold

KERNEL_OF_PRODUCT = {
    "transformer.trunk.blocks.attention.qkv.kernel": True,
    "transformer.masked.stack.blocks.fc2.kernel": True,
    "transformer.next_scale.head.linear.kernel": True,
    "transformer.word.kernel": True,
    "tokenizer.decoder.conv_in.kernel": True,
    "transformer.trunk.blocks.adaln.kernel": False,
    "transformer.next_scale.head.adaln.kernel": False,
    "transformer.trunk.blocks.fc1.bias": False,
    "transformer.class_embed.embedding": False,
    "transformer.pos": False,
    "tokenizer.quantizer.codebook": False,
    "tokenizer.quantizer.phis.0.kernel": False,
    "tokenizer.decoder.norm_out.scale": False,
}


@pytest.mark.parametrize("name", KERNEL_OF_PRODUCT)
def test_for_bfloat16_the_kernels_of_its_products_alone_are_held_in_it(model, name):
    held = trees.flatten(hold(TINY, model.params, "bfloat16"))
    given = trees.flatten(model.params)
    assert held[name].dtype == (jnp.bfloat16 if KERNEL_OF_PRODUCT[name] else jnp.float32)
    assert (held[name] == given[name].astype(held[name].dtype)).all()


def test_a_projection_that_all_blocks_share_stays_float32():
    config = tiny(shared_adaln=True)
    flat = {"transformer.adaln.kernel": jnp.ones((2, 2)), "transformer.trunk.blocks.fc1.kernel": jnp.ones((2, 2))}
    held = trees.flatten(hold(config, trees.unflatten(flat), "bfloat16"))
    assert [leaf.dtype for leaf in held.values()] == [jnp.float32, jnp.bfloat16]


def test_for_float32_parameters_are_held_as_they_are(model):
    stored = hold(TINY, model.params, "bfloat16")
    kept = hold(TINY, stored, "float32")
    for name, leaf in trees.flatten(stored).items():
        assert trees.flatten(kept)[name] is leaf
