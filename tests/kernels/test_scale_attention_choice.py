"""What `scale_attention` runs as on devices and meshes that need not be here, and on which part of its arrays."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from absent_devices import H200, V5E, compiling_for
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hmar_jax.scales import ScaleLadder
from pallas_kernels import devices
from pallas_kernels.scale_attention import api, packed_scale_attention, scale_attention

HOPPER, AMPERE, TPU = ("gpu", "NVIDIA H200"), ("gpu", "NVIDIA A100-SXM4-40GB"), ("tpu", "TPU v5e")


@pytest.mark.parametrize(
    ("device", "sides", "dtype", "size", "chosen"),
    [
        (HOPPER, (1, 2, 30), "bfloat16", 64, "hopper"),
        (HOPPER, (1, 2, 30), "float16", 32, "hopper"),
        (HOPPER, (1, 2, 30), "float32", 64, "xla"),
        (HOPPER, (1, 2, 30), "bfloat16", 48, "xla"),
        (HOPPER, (1, 2, 3), "bfloat16", 64, "hopper"),
        (AMPERE, (1, 2, 30), "bfloat16", 64, "xla"),
        (TPU, (1, 2, 30), "bfloat16", 64, "tpu"),
        (TPU, (1, 2, 30), "float32", 128, "tpu"),
        (TPU, (1, 2, 30), "bfloat16", 48, "xla"),
        (TPU, (1, 2, 3), "bfloat16", 64, "xla"),
    ],
)
def test_each_device_and_array_gets_its_implementation(monkeypatch, device, sides, dtype, size, chosen):
    monkeypatch.setattr(devices, "device", lambda: device)
    ladder = ScaleLadder(sides)
    q = jax.ShapeDtypeStruct((2, ladder.length, 2, size), dtype)
    assert api.choose(q, ladder.length) == chosen
    alone = jax.ShapeDtypeStruct((2, sides[-1] ** 2, 2, size), dtype)
    assert api.choose(alone, ladder.length) == "xla"  # queries without all their keys


@pytest.mark.parametrize("implementation", ["hopper", "tpu"])
def test_a_kernel_forced_on_another_device_raises(implementation):
    qkv = [jnp.zeros((2, 5, 2, 8))] * 3
    with pytest.raises(ValueError, match=f"cannot run as '{implementation}' on cpu with q of float32"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal", implementation=implementation)


DEVICES = {"hopper": (H200, "cuda", "@mosaic_gpu", 3), "tpu": (V5E, "tpu", "@tpu_custom_call", 2)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("mesh_shape", "local"),
    [
        ({"data": 1}, "8x680x3x4x64"),
        ({"data": 2, "fsdp": 2}, "2x680x3x4x64"),
        ({"data": 2, "tensor": 2}, "4x680x3x2x64"),
    ],
    ids=str,
)
def test_under_a_mesh_each_device_runs_the_kernels_on_its_own_images_and_heads(device, mesh_shape, local):
    """Forward and backward of a packed projection, lowered for devices that are not here."""
    ladder = ScaleLadder.preset("256")
    qkv = jax.ShapeDtypeStruct((8, ladder.length, 3, 4, 64), "bfloat16")

    def loss(qkv, scale):
        out = packed_scale_attention(qkv, ladder, pattern="block_diagonal", q_scale=scale)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    absent, platform, call, kernels = DEVICES[device]
    with compiling_for(absent, mesh_shape):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(qkv, jax.ShapeDtypeStruct((4,), "float32"))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [line for line in text.splitlines() if f"custom_call {call}" in line]
    assert len(calls) == kernels
    shape = local if device == "hopper" else "x".join([*local.split("x")[:2], str(3 * int(local.split("x")[3]) * 64)])
    assert all(f"tensor<{shape}xbf16>" in line for line in calls)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
def test_gradients_are_traced_within_a_shard_map_of_the_callers(device, packed):
    ladder = ScaleLadder((1, 2, 23))  # as many tokens as the TPU's kernel is taken for
    operand = jax.ShapeDtypeStruct((4, ladder.length, *([3] if packed else []), 4, 64), "bfloat16")
    operands, scale = (operand,) * (1 if packed else 3), jax.ShapeDtypeStruct((4,), "float32")

    def attend(operands, q_scale):
        door = packed_scale_attention if packed else scale_attention
        return door(*operands, ladder, pattern="block_causal", q_scale=q_scale)

    def loss(operands, q_scale):
        split = jax.shard_map(attend, in_specs=(P("data"), P()), out_specs=P("data"))
        return jnp.sum(split(operands, q_scale).astype(jnp.float32))

    with compiling_for(DEVICES[device][0], {"data": 2}):
        assert jax.tree.map(jnp.shape, jax.eval_shape(jax.grad(loss, argnums=(0, 1)), operands, scale)) == (
            tuple(x.shape for x in operands),
            (4,),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("mesh_shape", "batch", "heads", "kernel"),
    [
        ({"data": 2}, 4, 3, True),
        ({"data": 2}, 3, 4, False),
        ({"tensor": 2}, 3, 4, True),
        ({"tensor": 2}, 4, 3, False),
        ({"data": 2, "fsdp": 2}, 6, 4, False),
        ({"rows": 2}, 3, 3, True),  # over which nothing is split
    ],
    ids=str,
)
def test_what_a_mesh_cannot_divide_is_left_to_xla(device, mesh_shape, batch, heads, kernel):
    ladder = ScaleLadder.preset("256")
    q = jax.ShapeDtypeStruct((batch, ladder.length, heads, 64), "bfloat16")
    with compiling_for(DEVICES[device][0], mesh_shape):
        assert api.choose(q, ladder.length) == (device if kernel else "xla")
        refused = pytest.raises(ValueError, match=r"among 680 tokens, B split by \d and H by \d; use 'xla'")
        with contextlib.nullcontext() if kernel else refused:
            api.choose(q, ladder.length, device)


@pytest.mark.parametrize("device", DEVICES)
def test_under_a_mesh_with_explicit_axes_a_kernel_says_how_to_make_it(device):
    ladder = ScaleLadder.preset("256")
    q = jax.ShapeDtypeStruct((2, ladder.length, 2, 64), "bfloat16")
    message = r"\{'data': 2\}, has axes of type Explicit, .*axis_types=\(AxisType.Auto,\) \* 1"
    with compiling_for(DEVICES[device][0], {"data": 2}, AxisType.Explicit), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q: scale_attention(q, q, q, ladder, pattern="block_causal"), q)
