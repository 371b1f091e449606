"""The Hopper kernels: that they lower for CUDA without one, and on a Hopper what they compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import H200, compiling_for

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention.hopper.attention import hopper_attention, hopper_attention_packed
from pallas_kernels.scale_attention.hopper.blocks import NEEDS, Blocks, HopperBlocks, tuned_blocks
from pallas_kernels.scale_attention.hopper.common import LOG2E
from pallas_kernels.scale_attention.hopper.forward import SAFE_SCALE
from pallas_kernels.scale_attention.reference import reference_attention, scale_queries_and_keys

PATTERNS = ["block_diagonal", "block_causal"]
PRESETS = ["256", "512", "1024"]
# Norm of the difference over norm of the truth: of the output, of gradients, and, over the norm of what queries add to
# it, of the gradient by q_scale, a sum in which nearly everything cancels.
TOLERANCE = {"bfloat16": (5e-3, 1e-2, 2e-2), "float16": (1e-3, 2e-3, 4e-3)}


def test_what_needs_no_maximum_stays_within_float32_and_bfloat16():
    most = SAFE_SCALE * LOG2E * (1 + float(jnp.finfo("bfloat16").eps))  # the norm of a rounded key may exceed 1
    assert np.exp2(-most) >= float(jnp.finfo("bfloat16").tiny)
    assert 2**20 * 1e4 * np.exp2(most) <= float(jnp.finfo("float32").max)


def attend(operands, ranges, q_scale, blocks=None):
    attention = hopper_attention if len(operands) == 3 else hopper_attention_packed
    return attention(*operands, ranges, q_scale, blocks=blocks)


def value_and_gradients(operands, ranges, q_scale, dout, blocks=None):
    out, pull = jax.vjp(lambda operands, scale: attend(operands, ranges, scale, blocks), operands, q_scale)
    return out, pull(dout)


def with_relay(blocks, relay):
    return HopperBlocks(*(dataclasses.replace(getattr(blocks, name), relay=relay) for name in NEEDS))


def in_pairs(blocks, relay=True):
    return dataclasses.replace(blocks, forward=Blocks(4, 64, 64, 7, relay=relay, paired=True))


def lower(function, *arguments):
    with compiling_for(H200):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shapes_of(length, packed, norm, heads=2, size=64, dtype="bfloat16"):
    out = jax.ShapeDtypeStruct((2, length, heads, size), dtype)
    operands = (jax.ShapeDtypeStruct((2, length, 3, heads, size), dtype),) if packed else (out,) * 3
    return operands, jax.ShapeDtypeStruct((heads,), "float32") if norm else None, out


class TestLowersForCudaWithoutOne:
    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_forward_and_backward_are_three_kernels(self, preset, pattern, norm):
        ladder = ScaleLadder.preset(preset)
        operands, scale, out = shapes_of(ladder.length, False, norm)
        text = lower(
            lambda operands, scale, dout: value_and_gradients(operands, ladder.key_ranges(pattern), scale, dout),
            *(operands, scale, out),
        )
        assert text.count("stablehlo.custom_call @mosaic_gpu") == 3

    @pytest.mark.parametrize("relay", [False, True], ids=["free", "relay"])
    def test_with_a_baton_and_without(self, relay):
        ranges = ScaleLadder((1, 2, 9)).key_ranges("block_diagonal")
        blocks, (operands, scale, out) = with_relay(tuned_blocks(ranges, True), relay), shapes_of(86, True, True)
        assert lower(lambda *a: value_and_gradients(a[0], ranges, *a[1:], blocks), operands, scale, out)

    @pytest.mark.parametrize(
        ("packed", "norm", "dtype"),
        [(False, True, "bfloat16"), (True, True, "bfloat16"), (True, False, "bfloat16"), (True, True, "float16")],
    )
    def test_in_pairs_whether_or_not_logits_are_bounded(self, packed, norm, dtype):
        ranges = ScaleLadder((1, 2, 9)).key_ranges("block_causal")
        blocks, (operands, scale, _) = (
            in_pairs(tuned_blocks(ranges, norm)),
            shapes_of(86, packed, norm, dtype=dtype),
        )
        assert lower(lambda *a: attend(a[0], ranges, a[1], blocks), operands, scale)

    @pytest.mark.parametrize(("size", "dtype"), [(32, "bfloat16"), (64, "float16")])
    def test_other_heads_and_dtypes(self, size, dtype):
        ranges = ScaleLadder((1, 2, 3)).key_ranges("block_causal")
        operands, scale, out = shapes_of(14, False, True, size=size, dtype=dtype)
        assert lower(lambda *a: value_and_gradients(a[0], ranges, *a[1:]), operands, scale, out)

    def test_in_a_scanned_and_rematerialised_layer_with_packed_operands(self):
        ladder = ScaleLadder((1, 2, 9))
        ranges, (operands, scale, _) = ladder.key_ranges("block_diagonal"), shapes_of(ladder.length, True, True)

        def loss(qkv, scales):
            def layer(qkv, scale):
                out = jax.checkpoint(lambda *a: hopper_attention_packed(a[0], ranges, a[1]))(qkv, scale)
                return qkv + out[:, :, None], None

            return jnp.sum(jax.lax.scan(layer, qkv, scales)[0].astype(jnp.float32))

        scales = jax.ShapeDtypeStruct((3, *scale.shape), scale.dtype)
        assert lower(jax.grad(loss, argnums=(0, 1)), *operands, scales)


@pytest.mark.parametrize(
    ("shapes", "dtype", "length", "message"),
    [
        ([(1, 5, 2, 64), (1, 5, 2, 64), (1, 5, 2, 32)], "bfloat16", 5, "thrice the same"),
        ([(5, 2, 64)] * 3, "bfloat16", 5, "thrice the same"),
        ([(1, 5, 2, 64)] * 3, "float32", 5, "bfloat16 or float16"),
        ([(1, 5, 2, 48)] * 3, "bfloat16", 5, "heads of"),
        ([(1, 5, 2, 64)] * 3, "bfloat16", 14, "of 14 tokens"),
        ([(1, 5, 2, 64)], "bfloat16", 5, r"expected \(B, L, 3, H, D\)"),
    ],
)
def test_operands_that_are_not_supported_raise(shapes, dtype, length, message):
    ranges = {5: ScaleLadder((1, 2)), 14: ScaleLadder((1, 2, 3))}[length].key_ranges("block_causal")
    with pytest.raises(ValueError, match=message):
        attend([jnp.zeros(shape, dtype) for shape in shapes], ranges, None)


def on_a_hopper():
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


@pytest.mark.skipif(not on_a_hopper(), reason="needs a Hopper GPU")
class TestOnAHopper:
    @pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize(
        ("sides", "size", "dtype"),
        [
            ((1,), 64, "bfloat16"),
            ((1, 2, 3, 16), 64, "bfloat16"),
            ((1, 2, 5, 9), 32, "float16"),
            ("256", 64, "bfloat16"),
        ],
        ids=str,
    )
    def test_values_and_gradients_are_those_of_the_reference_and_bit_equal_when_repeated(
        self, sides, size, dtype, pattern, norm, packed
    ):
        check_values_and_gradients(sides, size, dtype, pattern, norm, packed)

    @pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
    @pytest.mark.parametrize("relay", [False, True], ids=["free", "relay"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("sides", [(1,), (1, 2, 3, 16), (1, 2, 37)], ids=str)
    def test_pairs_of_products_give_the_values_and_gradients_of_the_reference(self, sides, pattern, relay, packed):
        check_values_and_gradients(
            *(sides, 64, "bfloat16", pattern, True, packed), lambda blocks: in_pairs(blocks, relay)
        )

    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("sides", [(1, 2, 3, 16), "256"], ids=str)
    def test_a_baton_changes_no_bit(self, sides, pattern, norm):
        ladder = ScaleLadder.preset(sides) if isinstance(sides, str) else ScaleLadder(sides)
        ranges, rng = ladder.key_ranges(pattern), np.random.default_rng(0)
        qkv, dout = (jnp.asarray(rng.normal(size=(2, ladder.length, *n, 3, 64)), "bfloat16") for n in ((3,), ()))
        scale, tuned = jnp.asarray([4.0, -0.5, 11.0]) if norm else None, tuned_blocks(ranges, norm)

        def run(relay):
            blocks = with_relay(tuned, relay)
            return jax.jit(lambda *a: value_and_gradients(a[0], ranges, *a[1:], blocks))((qkv,), scale, dout)

        jax.tree.map(np.testing.assert_array_equal, run(False), run(True))

    @pytest.mark.parametrize("paired", [False, True], ids=["one_by_one", "pairs"])
    def test_heads_with_and_without_a_maximum_are_right(self, paired):
        """Unit keys that bfloat16 has exactly: else their rounding would be most of the error of large scales."""
        ladder, rng = ScaleLadder((1, 2, 5, 16)), np.random.default_rng(0)
        q, k, v, dout = (jnp.asarray(rng.normal(size=(1, ladder.length, 4, 64)), "bfloat16") for _ in range(4))
        k, scale = jnp.sign(k), jnp.asarray([SAFE_SCALE, -SAFE_SCALE, 1.1 * SAFE_SCALE, 100.0])
        ranges = ladder.key_ranges("block_diagonal")
        blocks = tuned_blocks(ranges, norm=True)
        blocks = in_pairs(blocks) if paired else blocks
        out = jax.jit(lambda q, k, v, scale: attend((q, k, v), ranges, scale, blocks))(q, k, v, scale)
        truth = true_values(q, k, v, dout, scale, ranges)[0]
        for head in range(4):
            assert error_of(out[:, :, head], truth[:, :, head]) < TOLERANCE["bfloat16"][0]


def check_values_and_gradients(sides, size, dtype, pattern, norm, packed, adapt=lambda blocks: blocks):
    """Those of the reference, and bit-equal when repeated, with the blocks that `adapt` makes of the tuned ones."""
    ladder = ScaleLadder.preset(sides) if isinstance(sides, str) else ScaleLadder(sides)
    ranges, rng = ladder.key_ranges(pattern), np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(2, ladder.length, 3, size)), dtype) for _ in range(4))
    scale = jnp.asarray([4.0, -0.5, 11.0]) if norm else None
    operands = (jnp.stack([q, k, v], axis=2),) if packed else (q, k, v)
    blocks = adapt(tuned_blocks(ranges, norm))
    function = jax.jit(lambda *a: value_and_gradients(a[0], ranges, *a[1:], blocks))
    result, again = function(operands, scale, dout), function(operands, scale, dout)
    jax.tree.map(np.testing.assert_array_equal, result, again)

    out, (gradients, dscale) = result
    truth, true_gradients, parts = true_values(q, k, v, dout, scale, ranges)
    if packed:
        gradients = [gradients[0][:, :, i] for i in range(3)]
    assert error_of(out, truth) < TOLERANCE[dtype][0]
    for gradient, true in zip(gradients, true_gradients[:3], strict=True):
        if np.any(true):
            assert error_of(gradient, true) < TOLERANCE[dtype][1]
    if norm:
        np.testing.assert_allclose(np.sum(parts, axis=(0, 1)), true_gradients[3], rtol=1e-4, atol=1e-4)
        # The gradient of a lone token is 0. Its weight is not quite 1 where it is rounded without a maximum.
        least = 2e-3 if (ladder.length, dtype) == (1, "bfloat16") else 1e-4
        most = TOLERANCE[dtype][2] * np.linalg.norm(parts, axis=(0, 1)) + least
        np.testing.assert_array_less(np.abs(dscale - true_gradients[3]), most)


def true_values(q, k, v, dout, scale, ranges):
    """Output, gradients by q, k, v and q_scale, and with QK-norm (B,L,H): what queries add to the last."""

    @jax.jit  # whole: a GPU compiles each step of it on its own else
    def run(q, k, v, dout, scale):
        out, pull = jax.vjp(lambda q, k, v, scale: reference_attention(q, k, v, ranges, scale), q, k, v, scale)
        if scale is None:
            return out, pull(dout), None
        unit_q, unit_k = scale_queries_and_keys(q, k, jnp.ones_like(scale))

        def attention(scales):
            return reference_attention(unit_q * (scales * q.shape[-1] ** 0.5)[..., None], unit_k, v, ranges, None)

        return out, pull(dout), jax.vjp(attention, jnp.broadcast_to(scale, q.shape[:3]))[1](dout)[0]

    return run(*(x.astype(jnp.float32) for x in (q, k, v, dout)), scale)


def error_of(result, truth):
    difference = np.asarray(result, np.float64) - np.asarray(truth, np.float64)
    return np.linalg.norm(difference) / np.linalg.norm(truth)
