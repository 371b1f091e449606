"""The kernel for thresholds of top-k and top-p: interpreted on a CPU, lowered for CUDA without one, run on a Hopper."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import H200, compiling_for, gpu
from jax.sharding import PartitionSpec as P

from hmar_jax.sampling.filters import filter_logits
from pallas_kernels.logit_threshold import LARGEST_ROW, fits, logit_threshold

CONTROLS = [(0, 1.0), (100, 1.0), (0, 0.96), (100, 0.905), (1, 0.5), (511, 0.3), (512, 1.0), (9999, 1e-6)]
NEAR = 2e-6  # a tail so near to 1 - top_p may stay or go: sums of float32 differ


@functools.cache
def interpreted(shape):
    """The kernel for logits of a shape, on a CPU."""
    with compiling_for(H200), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        given = (
            jax.ShapeDtypeStruct(shape, "float32"),
            jax.ShapeDtypeStruct((), "int32"),
            jax.ShapeDtypeStruct((), "float32"),
        )
        return jax.jit(logit_threshold).trace(*given).lower(lowering_platforms=("cpu",)).compile()


def on_a_hopper():
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def compiled(shape):
    return jax.jit(logit_threshold) if on_a_hopper() else interpreted(shape)


def kept_by(logits, top_k, spare):
    """What is kept of (N,V) if the tail may have `spare` of the mass; None: no tail goes; by sorting in float64."""
    size = logits.shape[-1]
    ascending = np.sort(logits, axis=-1)
    kth = ascending[:, size - (min(top_k, size) or size)][:, None]
    if spare is None:
        return logits >= kth
    mass = np.where(ascending < kth, 0, np.exp(ascending.astype(np.float64) - ascending[:, -1:]))
    tail = np.cumsum(mass, axis=-1) / mass.sum(axis=-1, keepdims=True)
    is_left = (tail > spare) | (np.arange(size) == size - 1)
    return logits >= np.min(np.where(is_left, ascending, np.inf), axis=-1, keepdims=True)


def check(logits, top_k, top_p):
    """Compares what is kept; a tail that rounding decides about may stay or go, in one row at most."""
    logits = np.asarray(logits, np.float32)
    threshold = np.asarray(compiled(logits.shape)(logits, np.int32(top_k), np.float32(top_p)))
    assert threshold.shape == (*logits.shape[:-1], 1)
    spare = 1 - np.float64(np.float32(top_p))
    at_most, at_least = (kept_by(logits, top_k, None if top_p == 1 else spare + by) for by in (-NEAR, NEAR))
    assert np.sum(np.any(at_most != at_least, axis=-1)) <= 1
    is_logit = logits > -np.inf  # what was dropped before stays so
    kept = (logits >= threshold) & is_logit
    np.testing.assert_array_equal(kept & at_most, kept)
    np.testing.assert_array_equal(kept | (at_least & is_logit), kept)


def rows_of(kind, number=8, size=512, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(number, size)).astype(np.float32)
    match kind:
        case "spread":
            return 3 * noise
        case "many ties":
            return np.round(2 * noise) / 2
        case "all equal":
            return np.broadcast_to(noise[:, :1], noise.shape)
        case "of one sign":
            return -np.exp(noise)
        case "one apart":
            return (1065353216 + np.argsort(noise).astype(np.int32)).view(np.float32)
        case "tiny and huge":
            return np.where(noise > 1, 1e30 * noise, np.where(noise > 0, 1e-37 * noise, 0 * noise)).astype(np.float32)
        case "some dropped":
            return np.where(noise > 0.5, -np.inf, noise)
        case "one left":
            return np.where(np.arange(size) == 77, noise, -np.inf)
        case "likely ones":
            return np.where(noise > 2, noise + 12, noise)


KINDS = ["spread", "many ties", "all equal", "of one sign", "one apart", "tiny and huge", "some dropped", "one left"]
KINDS += ["likely ones"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "top_p"), CONTROLS)
def test_what_is_kept_is_what_sorting_keeps(kind, top_k, top_p):
    check(rows_of(kind), top_k, top_p)


@pytest.mark.parametrize("size", [128, 256, 640, 4096])
def test_rows_of_any_length_that_fits_are_searched(size):
    check(rows_of("spread", size=size), size // 5, 0.9)


@hypothesis.given(
    logits=st.lists(
        st.one_of(st.just(-np.inf), st.integers(-4, 4).map(float), st.floats(-30, 30, width=32)),
        min_size=1,
        max_size=128,
    ),
    top_k=st.integers(0, 130),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.41, 0.07, 1e-6]),
)
def test_what_is_kept_of_any_row_is_what_sorting_keeps(logits, top_k, top_p):
    hypothesis.assume(max(logits) > -np.inf)
    check([logits + [-np.inf] * (128 - len(logits))], top_k, top_p)


def test_both_zeros_tie():
    row = np.full((1, 128), -1, np.float32)
    row[0, :5] = [1, -0.0, 0.0, 2, -0.0]
    threshold = compiled(row.shape)(row, np.int32(3), np.float32(1))
    assert np.flatnonzero(row >= threshold).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_no_row_depends_on_the_others_and_all_axes_but_the_last_are_rows(seed):
    rows = rows_of("spread", seed=seed)
    controls = np.int32(100), np.float32(0.9)
    together = np.asarray(compiled((2, 4, 512))(rows.reshape(2, 4, 512), *controls))
    np.testing.assert_array_equal(together.reshape(8, 1), compiled((8, 512))(rows, *controls))
    np.testing.assert_array_equal(together[1, 2:3], compiled((1, 512))(rows[6:7], *controls))


@pytest.mark.parametrize("top_k", [0, 100])
def test_rows_with_nan_end_and_leave_the_others_alone(top_k):
    rows = rows_of("spread")
    broken = rows.copy()
    broken[0], broken[2, 7], broken[4, ::2] = np.nan, np.nan, -np.nan
    controls = np.int32(top_k), np.float32(0.9)
    thresholds = [np.asarray(compiled(rows.shape)(given, *controls)) for given in (rows, broken)]
    np.testing.assert_array_equal(*(each[[1, 3, 5, 6, 7]] for each in thresholds))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 100), "float32"),
        ((8, 2 * LARGEST_ROW), "float32"),
        ((8, 512), "bfloat16"),
        ((512,), "float32"),
        ((0, 512), "float32"),
    ],
    ids=str,
)
def test_logits_that_are_not_supported_raise(shape, dtype):
    logits = jnp.zeros(shape, dtype)
    assert not fits(logits)
    with pytest.raises(ValueError, match="multiple of 128"):
        logit_threshold(logits, jnp.int32(1), jnp.float32(1))


# --- The sampler's filters, lowered for devices that are not here.


def lowered(function, shape, kind="NVIDIA H200", mesh=None, platform="cuda"):
    controls = jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((), "float32")
    with compiling_for(gpu(kind), mesh):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct(shape, "float32"), *controls)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]


@pytest.mark.parametrize("size", [128, 640, 4096, LARGEST_ROW])
def test_filters_are_one_kernel_on_a_hopper(size):
    (call,) = lowered(filter_logits, (8, 16, size))
    assert f"tensor<128x{size}xf32>" in call


@pytest.mark.parametrize(
    ("size", "kind", "platform"),
    [(100, "NVIDIA H200", "cuda"), (512, "NVIDIA A100-SXM4-80GB", "cuda"), (512, "NVIDIA H200", "cpu")],
    ids=["of another size", "on an older GPU", "for the CPU beside a Hopper"],
)
def test_filters_are_left_to_xla(size, kind, platform):
    assert not lowered(filter_logits, (8, 16, size), kind, platform=platform)


@pytest.mark.parametrize(
    ("mesh", "rows"), [({"data": 1}, 128), ({"data": 2, "fsdp": 2}, 32), ({"data": 2, "tensor": 2}, 64)], ids=str
)
def test_under_a_mesh_each_device_filters_its_own_images(mesh, rows):
    (call,) = lowered(filter_logits, (8, 16, 512), mesh=mesh)
    assert f"tensor<{rows}x512xf32>" in call


def test_images_that_a_mesh_cannot_divide_are_left_to_xla():
    assert not lowered(filter_logits, (6, 16, 512), mesh={"data": 4})
    with compiling_for(H200, {"data": 4}), pytest.raises(ValueError, match="B of 4"):
        logit_threshold(jnp.zeros((6, 512)), jnp.int32(1), jnp.float32(1))


def test_within_a_shard_map_too():
    def own(logits, top_k, top_p):
        specs = P("data"), P(), P()
        return jax.shard_map(filter_logits, in_specs=specs, out_specs=P("data"), check_vma=False)(logits, top_k, top_p)

    (call,) = lowered(own, (8, 16, 512), mesh={"data": 4})
    assert "tensor<32x512xf32>" in call


@pytest.mark.skipif(not on_a_hopper(), reason="needs a Hopper GPU")
class TestOnAHopper:
    """What is compiled there for a Hopper; the batteries above run there too, on the card."""

    @pytest.mark.parametrize("shape", [(1, 1, 4096), (3, 7, 4096), (16, 64, 4096), (5, 2, LARGEST_ROW)], ids=str)
    def test_filters_keep_what_sorting_keeps_and_are_bit_equal_when_repeated(self, shape):
        rows = rows_of("spread", number=shape[0] * shape[1], size=shape[2])
        function = jax.jit(filter_logits)
        filtered, again = (function(rows.reshape(shape), jnp.int32(900), jnp.float32(0.96)) for _ in range(2))
        np.testing.assert_array_equal(filtered, again)
        at_most, at_least = (kept_by(rows, 900, 0.04 + by) for by in (-NEAR, NEAR))
        kept = np.asarray(filtered).reshape(rows.shape) > -np.inf
        assert np.all(kept <= at_most) and np.all(kept >= at_least)
        np.testing.assert_array_equal(np.asarray(filtered).reshape(rows.shape)[kept], rows[kept])
