"""The Triton kernels: what they compute (interpreted), that they compile for GPUs not here, and who gets them.

Triton decides when it is imported whether to interpret. So a process of its own does that, and this one compiles.
Long, as the same cases and checks serve the interpreter and GPUs.
"""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import A100, compiling_for
from jax.sharding import PartitionSpec as P
from triton_tools import compile_kernel, interpreter, spilled_bytes

from hmar_jax.scales import ScaleLadder
from pallas_kernels import devices
from pallas_kernels.scale_attention import api, packed_scale_attention, scale_attention
from pallas_kernels.scale_attention.reference import reference_attention
from pallas_kernels.scale_attention.triton.tiles import (
    LEAST_SHARED_BYTES,
    NEEDS,
    Blocks,
    Spec,
    TritonBlocks,
    tuned_blocks,
)

pytest.importorskip("triton", reason="the extra test has Triton for Linux on x86-64 only")
from pallas_kernels.scale_attention.triton import kernels
from pallas_kernels.scale_attention.triton.attention import triton_attention, triton_attention_packed

PATTERNS = ["block_diagonal", "block_causal"]
# Norm of the difference over norm of the truth, of outputs and of gradients.
TOLERANCE = {"bfloat16": (5e-3, 1e-2), "float16": (1e-3, 2e-3), "float32": (1e-5, 1e-5)}


def test_blocks_that_need_too_much_shared_memory_raise():
    large, ranges = Blocks(128, 128, 8, 3), ScaleLadder((1, 2)).key_ranges("block_causal")
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory"):
        triton_attention_packed(
            jnp.zeros((1, 5, 3, 1, 128), "bfloat16"), ranges, None, blocks=TritonBlocks(large, large, large)
        )


@pytest.mark.parametrize(
    ("shapes", "dtype", "length", "message"),
    [
        ([(1, 5, 2, 64), (1, 5, 2, 64), (1, 5, 2, 32)], "bfloat16", 5, "thrice the same"),
        ([(5, 2, 64)] * 3, "bfloat16", 5, "thrice the same"),
        ([(1, 5, 2, 64)] * 3, "int32", 5, "bfloat16, float16 or float32"),
        ([(1, 5, 2, 192)] * 3, "bfloat16", 5, "heads of 16 to 128"),
        ([(1, 5, 2, 64)] * 3, "bfloat16", 14, "of 14 tokens"),
        ([(1, 5, 2, 64)], "bfloat16", 5, r"expected \(B, L, 3, H, D\)"),
    ],
)
def test_operands_that_are_not_supported_raise(shapes, dtype, length, message):
    ranges = {5: ScaleLadder((1, 2)), 14: ScaleLadder((1, 2, 3))}[length].key_ranges("block_causal")
    attention = triton_attention if len(shapes) == 3 else triton_attention_packed
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(shape, dtype) for shape in shapes), ranges, None)


# --- What is computed: on a GPU, and interpreted here. That is slow, so cases are small, and none is bfloat16.


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as run:
        yield run


def make_case(sides, pattern, size, dtype, norm, heads=2):
    """Key ranges, operands, q_scale and cotangent."""
    ladder, rng = ScaleLadder(sides), np.random.default_rng(0)
    shape = 2, ladder.length, heads, size
    *qkv, dout = (rng.normal(size=shape).astype(jnp.dtype(dtype)) for _ in range(4))
    scale = np.float32([4, -0.5, 11][:heads]) if norm else None
    return ladder.key_ranges(pattern), qkv, scale, dout


def value_and_gradients(ranges, qkv, q_scale, dout, packed, blocks):
    """Output, gradients by q, k, v, and by q_scale."""
    blocks = blocks and TritonBlocks(*(Blocks(*numbers) for numbers in blocks))

    def attend(qkv, q_scale):
        if packed:
            return triton_attention_packed(jnp.stack(qkv, axis=2), ranges, q_scale, blocks=blocks)
        return triton_attention(*qkv, ranges, q_scale, blocks=blocks)

    out, pull = jax.vjp(attend, [jnp.asarray(x) for x in qkv], None if q_scale is None else jnp.asarray(q_scale))
    return out, *pull(jnp.asarray(dout))


def check(result, ranges, qkv, q_scale, dout):
    dtype = str(dout.dtype)
    out, gradients, dscale = result
    truth, pull = jax.vjp(
        jax.jit(lambda q, k, v, scale: reference_attention(q, k, v, ranges, scale)),
        *(jnp.asarray(x, jnp.float32) for x in qkv),
        q_scale,
    )
    *true_gradients, true_dscale = pull(jnp.asarray(dout, jnp.float32))
    assert out.dtype == dtype
    assert error_of(out, truth) < TOLERANCE[dtype][0]
    for gradient, true in zip(gradients, true_gradients, strict=True):
        if np.any(true):
            assert error_of(gradient, true) < TOLERANCE[dtype][1]
    if q_scale is not None:  # a sum in which nearly everything cancels
        np.testing.assert_allclose(dscale, true_dscale, rtol=5e-2, atol=5e-2)


def error_of(result, truth):
    difference = np.asarray(result, np.float64) - np.asarray(truth, np.float64)
    return np.linalg.norm(difference) / np.linalg.norm(truth)


SMALL = ((16, 16, 4, 2), (32, 16, 4, 2), (16, 32, 4, 2))


class TestInterpreted:
    @pytest.mark.parametrize(
        ("sides", "pattern", "size", "dtype", "norm", "packed"),
        [
            ((1,), "block_diagonal", 16, "float32", True, False),
            ((1, 2, 3), "block_causal", 24, "float32", False, True),  # D is no power of 2
            ((1, 2, 5), "block_diagonal", 32, "float32", True, True),  # whole and edge tiles, shared and own ones
            ((2, 5), "block_causal", 16, "float16", True, False),
        ],
        ids=str,
    )
    def test_values_and_gradients_are_those_of_the_reference(
        self, interpreted, sides, pattern, size, dtype, norm, packed
    ):
        case = make_case(sides, pattern, size, dtype, norm)
        check(interpreted(value_and_gradients, *case, packed, SMALL), *case)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_vectors_of_zeros_have_finite_gradients_under_qk_norm(self, interpreted, dtype):
        ranges, (q, k, v), scale, dout = make_case((1, 2), "block_causal", 16, dtype, True)
        k[:, 1] = 0
        _, (_, dk, dv), dscale = interpreted(value_and_gradients, ranges, [q, k, v], scale, dout, False, SMALL)
        assert np.isfinite(dv).all() and np.isfinite(dscale).all()
        assert np.isfinite(np.delete(dk, 1, axis=1)).all()
        q[:, 1] = 0
        _, (_, dk, _), _ = interpreted(value_and_gradients, ranges, [q, v, v], scale, dout, False, SMALL)
        assert np.isfinite(dk).all()

    def test_a_factor_of_zero_makes_weights_equal(self, interpreted):
        ranges, qkv, _, dout = make_case((1, 2), "block_diagonal", 16, "float32", True)
        out, (dq, dk, _), _ = interpreted(value_and_gradients, ranges, qkv, np.zeros(2, np.float32), dout, True, SMALL)
        np.testing.assert_allclose(
            out[:, 1:], np.broadcast_to(qkv[2][:, 1:].mean(1, keepdims=True), (2, 4, 2, 16)), 1e-5
        )
        assert np.abs(dq).max() < 1e-20 and np.abs(dk).max() < 1e-20

    def test_in_a_scanned_and_rematerialised_layer_with_packed_operands(self, interpreted):
        ranges, qkv, scale, _ = make_case((1, 2), "block_causal", 16, "float32", True)
        found = interpreted(gradients_of_layers, "triton_attention_packed", ranges, np.stack(qkv, axis=2), scale)
        expected = gradients_of_layers("packed_reference", ranges, np.stack(qkv, axis=2), scale)
        for gradient, true in zip(found, expected, strict=True):
            assert error_of(gradient, true) < 1e-5


def packed_reference(qkv, ranges, q_scale):
    return reference_attention(*(qkv[:, :, i] for i in range(3)), ranges, q_scale)


def gradients_of_layers(attention, ranges, qkv, scale):
    """By the first layer's operands and by the scales of three layers."""

    def loss(qkv, scales):
        def layer(qkv, scale):
            out = jax.checkpoint(lambda *a: globals()[attention](a[0], ranges, a[1]))(qkv, scale)
            return qkv + out[:, :, None], None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, qkv, scales)[0]))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(qkv), jnp.stack([scale, 2 * scale, 3 * scale]))


def on_a_served_gpu():
    return jax.default_backend() == "gpu" and devices.has_triton()


@pytest.mark.skipif(not on_a_served_gpu(), reason="needs an NVIDIA GPU since Ampere and jax_triton")
class TestOnAGpu:
    @pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize(
        ("sides", "size", "dtype"),
        [
            ((1,), 64, "bfloat16"),
            ((1, 2, 3, 16), 64, "bfloat16"),
            ((1, 2, 5, 9), 32, "float16"),
            ((1, 2, 5, 9), 96, "bfloat16"),
            ((1, 2, 5, 9), 48, "float32"),
            ((1, 2, 5, 9), 128, "float32"),
            (ScaleLadder.preset("256").sides, 64, "bfloat16"),
        ],
        ids=str,
    )
    def test_values_and_gradients_are_those_of_the_reference_and_bit_equal_when_repeated(
        self, sides, size, dtype, pattern, norm, packed
    ):
        case = make_case(sides, pattern, size, dtype, norm, heads=3)
        result, again = (value_and_gradients(*case, packed, None) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, result, again)
        check(result, *case)


# --- Compiling for GPUs that are not here.

OTHERS = {"limits": "int32", "table": "int32", **dict.fromkeys(["factors", "key_gains", "lse", "vectors"], "float32")}


def compiled_kernel(name, capability, dtype, size, blocks, *, norm=True, packed=True):
    """One of the kernels, as `compile_kernel` gives it."""
    kernel, spec = (
        getattr(kernels, f"{name}_kernel"),
        Spec(680, 16, size, packed, norm, blocks.rows, blocks.columns),
    )
    return compile_kernel(kernel, capability, dtype, spec, OTHERS, num_warps=blocks.warps, num_stages=blocks.stages)


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize(
    ("capability", "dtype", "size"),
    [
        (80, "bfloat16", 64),
        (80, "float32", 128),
        (89, "float16", 96),
        (89, "float32", 64),
        (90, "bfloat16", 128),
    ],
)
def test_the_kernels_compile_for_tensor_cores_fit_and_spill_little(tmp_path, capability, dtype, size, name):
    blocks, itemsize = getattr(tuned_blocks(size, dtype), name), jnp.dtype(dtype).itemsize
    compiled = compiled_kernel(name, capability, dtype, size, blocks)
    assert re.search("mma.sync|wgmma", compiled.asm["ptx"])
    counted = sum(blocks.shared_terms(NEEDS[name], size, itemsize).values())
    assert compiled.metadata.shared <= counted <= LEAST_SHARED_BYTES
    assert spilled_bytes(compiled, tmp_path) <= 640  # about what a tile of logits takes


@pytest.mark.parametrize("name", NEEDS)
def test_they_compile_without_qk_norm_and_packing(name):
    assert compiled_kernel(name, 80, "bfloat16", 32, Blocks(32, 32, 4, 2), norm=False, packed=False).asm["cubin"]


def test_triton_has_no_tensor_cores_for_turing_which_is_why_xla_serves_it():
    assert "mma" not in compiled_kernel("forward", 75, "float16", 16, Blocks(16, 16, 4, 1)).asm["ptx"]


# --- Who gets Triton.


@pytest.fixture
def installed(monkeypatch):
    """As if the card here were served."""
    monkeypatch.setattr(devices, "has_triton", lambda: True)


HOPPER, AMPERE = ("gpu", "NVIDIA H200"), ("gpu", "NVIDIA A100-SXM4-40GB")


@pytest.mark.parametrize(
    ("device", "sides", "dtype", "size", "chosen"),
    [
        (AMPERE, (1, 2, 30), "bfloat16", 64, "triton"),
        (AMPERE, (1, 2, 30), "float16", 96, "triton"),
        (AMPERE, (1, 2, 30), "float32", 64, "triton"),
        (AMPERE, (1, 2, 30), "float32", 128, "triton"),
        (AMPERE, (1, 2, 30), "bfloat16", 192, "xla"),
        (AMPERE, (1, 2, 3), "bfloat16", 64, "xla"),
        (HOPPER, (1, 2, 30), "bfloat16", 64, "hopper"),
        (HOPPER, (1, 2, 30), "bfloat16", 128, "triton"),
        (HOPPER, (1, 2, 30), "float32", 64, "triton"),
        (("cpu", "cpu"), (1, 2, 30), "float32", 64, "xla"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_the_hopper_kernels_do_not_serve_gets_triton_where_it_can(monkeypatch, device, sides, dtype, size, chosen):
    monkeypatch.setattr(devices, "device", lambda: device)
    ladder = ScaleLadder(sides)
    assert api.choose(jax.ShapeDtypeStruct((2, ladder.length, 2, size), dtype), ladder.length) == chosen
    alone = jax.ShapeDtypeStruct((2, sides[-1] ** 2, 2, size), dtype)
    assert api.choose(alone, ladder.length) == "xla"  # queries without all their keys


@pytest.mark.parametrize(
    ("capability", "served"), [("7.5", False), ("8.0", True), ("8.9", True), ("12.0", True), ("gfx90a", False)]
)
def test_gpus_since_ampere_are_served(monkeypatch, capability, served):
    monkeypatch.setattr(devices, "is_installed", lambda _: True)
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert devices.has_triton() is served


def test_forced_on_a_gpu_without_jax_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(devices, "device", lambda: AMPERE)
    monkeypatch.setattr(devices, "is_installed", lambda _: False)
    qkv = [jnp.zeros((1, 5, 2, 64), "bfloat16")] * 3
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt -e '.\[triton\]'"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal", implementation="triton")


def test_forced_without_a_gpu_it_raises():
    qkv = [jnp.zeros((1, 5, 2, 64), "bfloat16")] * 3
    with pytest.raises(ValueError, match="cannot run as 'triton' on cpu"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal", implementation="triton")


@pytest.mark.usefixtures("installed")
def test_under_a_mesh_each_device_runs_the_kernels_on_its_own_images_and_heads(monkeypatch):
    seen = []

    def record(*arrays, kernel, out_shape, **_):
        seen.append((kernel.__name__, arrays[0].shape))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr(devices, "triton_call", record)
    ladder = ScaleLadder.preset("256")
    qkv = jax.ShapeDtypeStruct((8, ladder.length, 3, 4, 64), "bfloat16")

    def loss(qkv, scale):
        out = packed_scale_attention(qkv, ladder, pattern="block_diagonal", q_scale=scale)
        return jnp.sum(out.astype(jnp.float32))

    with compiling_for(A100, {"data": 2, "tensor": 2}):
        jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(qkv, jax.ShapeDtypeStruct((4,), "float32"))
    assert seen == [(f"{name}_kernel", (4, 680, 3, 2, 64)) for name in ("forward", "grad_queries", "grad_keys")]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
def test_gradients_are_traced_within_a_shard_map_of_the_callers(monkeypatch, packed):
    def fake(*arrays, kernel, out_shape, **_):
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=fake))
    ladder = ScaleLadder.preset("256")
    operand = jax.ShapeDtypeStruct((4, ladder.length, *([3] if packed else []), 4, 64), "bfloat16")

    def loss(q_scale, *operands):
        def attend(q_scale, *operands):
            door = packed_scale_attention if packed else scale_attention
            return door(*operands, ladder, pattern="block_diagonal", q_scale=q_scale)

        split = jax.shard_map(attend, in_specs=(P(), *[P("data")] * len(operands)), out_specs=P("data"))
        return jnp.sum(split(q_scale, *operands).astype(jnp.float32))

    operands = [operand] * (1 if packed else 3)
    with compiling_for(A100, {"data": 2}):
        gradients = jax.eval_shape(
            jax.grad(loss, argnums=(0, *range(1, 1 + len(operands)))), jax.ShapeDtypeStruct((4,), "float32"), *operands
        )
    assert [x.shape for x in gradients] == [(4,), *(x.shape for x in operands)]
