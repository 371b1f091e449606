"""Every implementation behind `scale_attention` against a softmax per token, written from the sides alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention import api, packed_scale_attention, scale_attention

IMPLEMENTATIONS = ["reference", "xla"]
PATTERNS = ["block_diagonal", "block_causal"]
# Norm of the difference over norm of the truth. The reference rounds its output alone; others their operands too.
TOLERANCE = {
    "reference": {"float32": 5e-7, "bfloat16": 3e-3, "float16": 4e-4},
    "xla": {"float32": 5e-7, "bfloat16": 6e-3, "float16": 8e-4},
}


def brute_force(q, k, v, sides, pattern, q_scale):
    """One query at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scales = [scale for scale, side in enumerate(sides) for _ in range(side * side)]
    if q_scale is not None:
        q, k = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (q, k))
    out = np.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            factor = q.shape[-1] ** -0.5 if q_scale is None else float(q_scale[h])
            for i, own in enumerate(scales):
                seen = [j for j, s in enumerate(scales) if s == own or (pattern == "block_causal" and s < own)]
                logits = factor * k[b, seen, h] @ q[b, i, h]
                weights = np.exp(logits - logits.max())
                out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def make_qkv(ladder, heads=2, size=8, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(2 * rng.normal(size=(2, ladder.length, heads, size)), dtype) for _ in range(3)]


def error_of(result, truth):
    return np.linalg.norm(np.asarray(result, np.float64) - truth) / np.linalg.norm(truth)


def random_sides(seed):
    rng = np.random.default_rng(seed)
    return tuple(sorted(rng.choice(np.arange(1, 8), size=rng.integers(1, 5), replace=False).tolist()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
class TestEveryImplementation:
    @pytest.mark.parametrize("q_scale", [None, (4.0, 0.5)], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("sides", [(1, 2, 3), *map(random_sides, range(4))], ids=str)
    def test_equals_a_softmax_per_token(self, pattern, implementation, sides, q_scale):
        ladder = ScaleLadder(sides)
        qkv = make_qkv(ladder)
        scale = None if q_scale is None else jnp.asarray(q_scale)
        attended = scale_attention(*qkv, ladder, pattern=pattern, q_scale=scale, implementation=implementation)
        assert error_of(attended, brute_force(*qkv, sides, pattern, q_scale)) < TOLERANCE[implementation]["float32"]

    @pytest.mark.parametrize("q_scale", [None, (4.0, 0.5)], ids=["plain", "qk_norm"])
    def test_the_last_queries_alone_get_what_they_get_among_all(self, pattern, implementation, q_scale):
        ladder = ScaleLadder((1, 2, 3))
        q, k, v = make_qkv(ladder)
        options = {"pattern": pattern, "implementation": implementation}
        if q_scale is not None:
            options["q_scale"] = jnp.asarray(q_scale)
        whole = scale_attention(q, k, v, ladder, **options)
        for last in (9, 10, 1):  # the finest scale; with a part of the one before; a part of it
            np.testing.assert_allclose(
                scale_attention(q[:, -last:], k, v, ladder, **options), whole[:, -last:], rtol=0, atol=5e-6
            )

    @pytest.mark.parametrize("dtype", TOLERANCE["reference"])
    def test_any_float_dtype_in_gives_the_same_out(self, pattern, implementation, dtype):
        ladder = ScaleLadder((1, 2, 4))
        qkv = make_qkv(ladder, heads=3, size=12, dtype=dtype)
        attended = scale_attention(*qkv, ladder, pattern=pattern, implementation=implementation)
        assert attended.dtype == dtype
        assert error_of(attended, brute_force(*qkv, ladder.sides, pattern, None)) < TOLERANCE[implementation][dtype]

    def test_gradients_are_those_of_the_definition(self, pattern, implementation):
        ladder, rng, step = ScaleLadder((1, 2)), np.random.default_rng(1), 1e-4
        q, k, v = (rng.normal(size=(1, 5, 2, 4)) for _ in range(3))
        scale, weights = rng.uniform(1, 3, 2), rng.normal(size=(1, 5, 2, 4))

        def loss(q, k, v, scale):
            out = scale_attention(q, k, v, ladder, pattern=pattern, q_scale=scale, implementation=implementation)
            return jnp.sum(out * weights)

        point = [q, k, v, scale]
        gradients = jax.grad(loss, argnums=range(4))(*(jnp.asarray(x, jnp.float32) for x in point))
        for i, gradient in enumerate(gradients):
            direction = rng.normal(size=point[i].shape)
            sides = []
            for sign in (1, -1):
                moved = [x + sign * step * direction if j == i else x for j, x in enumerate(point)]
                sides.append(np.sum(weights * brute_force(*moved[:3], ladder.sides, pattern, moved[3])))
            assert np.sum(gradient * direction) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-5)

    def test_queries_of_zeros_have_finite_gradients_under_qk_norm(self, pattern, implementation):
        ladder = ScaleLadder((1, 2))
        q, k, v = make_qkv(ladder)

        def loss(q, k):
            out = scale_attention(q, k, v, ladder, pattern=pattern, q_scale=jnp.ones(2), implementation=implementation)
            return jnp.sum(out**2)

        for gradient in jax.grad(loss, argnums=(0, 1))(jnp.zeros_like(q), k.at[:, 1].set(0)):
            assert np.isfinite(gradient).all()

    def test_twice_the_same_is_bit_equal(self, pattern, implementation):
        ladder = ScaleLadder((1, 2, 3))
        qkv = make_qkv(ladder)
        first, second = (
            scale_attention(*qkv, ladder, pattern=pattern, implementation=implementation) for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("q_scale", [None, (4.0, 0.5)], ids=["plain", "qk_norm"])
def test_block_diagonal_on_a_ladder_is_each_scale_alone(implementation, q_scale):
    ladder = ScaleLadder((1, 2, 3, 5))
    qkv = make_qkv(ladder)
    options = {"q_scale": None if q_scale is None else jnp.asarray(q_scale), "implementation": implementation}
    joined = scale_attention(*qkv, ladder, pattern="block_diagonal", **options)
    for scale, where in enumerate(ladder.slices):
        own = [x[:, where] for x in qkv]
        for pattern in PATTERNS:  # one scale by itself has no coarser ones
            alone = scale_attention(*own, ladder.only(scale), pattern=pattern, **options)
            np.testing.assert_allclose(joined[:, where], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 2, 8)] * 3, r"\(1, 4, 2, 8\).*expected thrice \(B, 5, H, D\)"),
        ([(1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 4)], r"\(1, 5, 2, 4\).*expected thrice"),
        ([(1, 5, 2, 8), (2, 5, 2, 8), (1, 5, 2, 8)], r"\(2, 5, 2, 8\).*expected thrice"),
        ([(5, 2, 8)] * 3, r"\(5, 2, 8\).*expected thrice"),
        ([(1, 6, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], r"\(1, 6, 2, 8\).*expected thrice"),
        ([(1, 0, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], r"\(1, 0, 2, 8\).*expected thrice"),
        ([(1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)], r"\(1, 4, 2, 8\).*q perhaps with the last tokens alone"),
    ],
)
def test_shapes_that_are_not_the_ladders_raise(shapes, message):
    with pytest.raises(ValueError, match=message):
        scale_attention(*(jnp.zeros(s) for s in shapes), ScaleLadder((1, 2)), pattern="block_diagonal")


def test_an_unknown_implementation_raises():
    qkv = make_qkv(ScaleLadder((1, 2)))
    with pytest.raises(ValueError, match="scale_attention has no implementation 'cudnn'"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal", implementation="cudnn")


def test_an_unknown_pattern_raises():
    qkv = make_qkv(ScaleLadder((1, 2)))
    with pytest.raises(ValueError, match="pattern 'dense' is unknown"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="dense")


def test_without_a_forced_implementation_this_device_gets_a_right_one():
    qkv = make_qkv(ScaleLadder((1, 2)))
    attended = scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal")
    assert error_of(attended, brute_force(*qkv, (1, 2), "block_causal", None)) < TOLERANCE["xla"]["float32"]


# --- the choice, for devices that need not be here

HOPPER, AMPERE, TPU = ("gpu", "NVIDIA H200"), ("gpu", "NVIDIA A100-SXM4-40GB"), ("tpu", "TPU v5e")


@pytest.mark.parametrize(
    ("device", "sides", "dtype", "size", "chosen"),
    [
        (HOPPER, (1, 2, 30), "bfloat16", 64, "hopper"),
        (HOPPER, (1, 2, 30), "float16", 32, "hopper"),
        (HOPPER, (1, 2, 30), "float32", 64, "xla"),
        (HOPPER, (1, 2, 30), "bfloat16", 48, "xla"),
        (HOPPER, (1, 2, 3), "bfloat16", 64, "xla"),
        (AMPERE, (1, 2, 30), "bfloat16", 64, "xla"),
        (TPU, (1, 2, 30), "bfloat16", 64, "tpu"),
        (TPU, (1, 2, 30), "float32", 128, "tpu"),
        (TPU, (1, 2, 30), "bfloat16", 48, "xla"),
        (TPU, (1, 2, 3), "bfloat16", 64, "xla"),
    ],
)
def test_each_device_and_array_gets_its_implementation(monkeypatch, device, sides, dtype, size, chosen):
    monkeypatch.setattr(api, "_device", lambda: device)
    ladder = ScaleLadder(sides)
    q = jax.ShapeDtypeStruct((2, ladder.length, 2, size), dtype)
    assert api._choose(q, ladder.length, None) == chosen
    alone = jax.ShapeDtypeStruct((2, sides[-1] ** 2, 2, size), dtype)
    assert api._choose(alone, ladder.length, None) == "xla"  # queries without all their keys


@pytest.mark.parametrize("implementation", ["hopper", "tpu"])
def test_a_kernel_forced_on_another_device_raises(implementation):
    qkv = make_qkv(ScaleLadder((1, 2)))
    with pytest.raises(ValueError, match=f"cannot run as '{implementation}' on cpu with q of float32"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal", implementation=implementation)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("q_scale", [None, (4.0, 0.5)], ids=["plain", "qk_norm"])
def test_a_packed_projection_gives_what_its_parts_give(pattern, q_scale):
    ladder = ScaleLadder((1, 2, 3))
    qkv = make_qkv(ladder)
    options = {"pattern": pattern, "q_scale": None if q_scale is None else jnp.asarray(q_scale)}
    packed = packed_scale_attention(jnp.stack(qkv, axis=2), ladder, **options)
    np.testing.assert_array_equal(packed, scale_attention(*qkv, ladder, **options))


def test_a_packed_array_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"qkv is \(1, 5, 2, 2, 8\); expected \(B, 5, 3, H, D\)"):
        packed_scale_attention(jnp.zeros((1, 5, 2, 2, 8)), ScaleLadder((1, 2)), pattern="block_causal")


DEVICES = {
    "hopper": (AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"), "cuda", "@mosaic_gpu", 3),
    "tpu": (AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu"), "tpu", "@tpu_custom_call", 2),
}


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
    abstract, platform, call, kernels = DEVICES[device]
    axes = {"axis_types": (AxisType.Auto,) * len(mesh_shape), "abstract_device": abstract}
    ladder = ScaleLadder.preset("256")
    qkv = jax.ShapeDtypeStruct((8, ladder.length, 3, 4, 64), "bfloat16")

    def loss(qkv, scale):
        out = packed_scale_attention(qkv, ladder, pattern="block_diagonal", q_scale=scale)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape), **axes)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(qkv, jax.ShapeDtypeStruct((4,), "float32"))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [line for line in text.splitlines() if f"custom_call {call}" in line]
    assert len(calls) == kernels
    shape = local if device == "hopper" else "x".join([*local.split("x")[:2], str(3 * int(local.split("x")[3]) * 64)])
    assert all(f"tensor<{shape}xbf16>" in line for line in calls)
