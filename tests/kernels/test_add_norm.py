"""The kernel that adds a branch and normalises: interpreted on a CPU, lowered for CUDA without one, run on a Hopper."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from tiny_models import tiny

from hmar_jax.scales import ScaleLadder
from hmar_jax.transformer import fused
from hmar_jax.transformer.blocks import Stack
from pallas_kernels import add_norm as module
from pallas_kernels.add_norm import LONGEST_RUN, WIDEST, add_norm, fits
from pallas_kernels.token_gradients import Branch

# Norm of the difference over norm of the truth, for results rounded once.
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3}


def device(kind="NVIDIA H200", mesh=None):
    """Compiles for GPUs that are not here, joined to a mesh or one alone."""
    mesh = mesh or {}
    abstract = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    axes = {"axis_types": (AxisType.Auto,) * len(mesh), "abstract_device": abstract}
    return jax.sharding.use_abstract_mesh(AbstractMesh(tuple(mesh.values()), tuple(mesh), **axes))


def interpreted(function, *arguments):
    """Runs what is made for a Hopper on a CPU."""
    with device(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",)).compile()(*arguments)


def on_a_hopper():
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def run(case):
    return jax.jit(add_norm)(*case) if on_a_hopper() else interpreted(add_norm, *case)


def case_of(shape, dtype="bfloat16", offset=0.0):
    """What `add_norm` takes."""
    rng = np.random.default_rng(sum(shape))
    x, y = (jnp.asarray(rng.normal(size=shape) + offset, dtype) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=shape[2]), jnp.float32)
    gate, scale, shift = (jnp.asarray(rng.normal(size=(shape[0], 1, shape[2])), jnp.float32) for _ in range(3))
    return x, Branch(y, bias, gate), scale, shift


def plain(x, branch, scale, shift):
    """In float64, the norm of the rounded sum."""

    def wide(array):
        return np.asarray(array, np.float64)

    total = wide(jnp.asarray(wide(x) + wide(branch.gate) * (wide(branch.y) + wide(branch.bias)), x.dtype))
    centred = total - total.mean(axis=-1, keepdims=True)
    n = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return total, n * (1 + wide(scale)) + wide(shift)


def check(case):
    x = case[0]
    for found, expected in zip(run(case), plain(*case), strict=True):
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        difference = np.asarray(found, np.float64) - expected
        assert np.linalg.norm(difference) < TOLERANCE[x.dtype.name] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [128, 256, 512, 1024, 1280, 1536, 1920, 2304, WIDEST])
def test_rows_of_any_width_that_fits_are_added_and_normalised(width, dtype):
    check(case_of((2, 3, width), dtype))


@pytest.mark.parametrize("warpgroups", [1, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (1, LONGEST_RUN + 1, 128), (2, 8, 128), (3, 5, 128)], ids=str)
def test_so_are_rows_that_a_warpgroup_takes_in_runs(monkeypatch, shape, warpgroups):
    monkeypatch.setattr(module, "ENOUGH", warpgroups)
    jax.clear_caches()  # of what was made for another number
    check(case_of(shape))


def test_a_norm_stays_exact_on_tokens_far_from_zero():
    check(case_of((1, 4, 1024), "float16", offset=100.0))


def test_a_row_of_nan_leaves_the_others_alone():
    whole = case_of((1, 9, 128))
    broken = (whole[0].at[0, 7].set(jnp.nan), *whole[1:])
    for one, other in zip(run(whole), run(broken), strict=True):
        assert np.isnan(other[0, 7]).all()
        np.testing.assert_array_equal(np.delete(one, 7, axis=1), np.delete(other, 7, axis=1))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 100), "bfloat16"),
        ((2, 3, WIDEST + 128), "bfloat16"),
        ((2, 3, 128), "float32"),
        ((0, 3, 128), "bfloat16"),
    ],
    ids=str,
)
def test_tokens_that_are_not_supported_raise(shape, dtype):
    x, vector = jnp.zeros(shape, dtype), jnp.zeros((1, 1, shape[-1]))
    assert not fits(x)
    with pytest.raises(ValueError, match="multiple of 128"):
        add_norm(x, Branch(x, vector[0, 0], vector), vector, vector)


# --- Who gets it, lowered for devices that are not here.


def lowered(function, case, kind="NVIDIA H200", mesh=None):
    with device(kind, mesh):
        text = jax.jit(function).trace(*case).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]


def norm_linear(x, branch, scale, shift):
    return fused.norm_linear(x, branch, scale, shift, jnp.zeros((x.shape[-1], 8), x.dtype))


def gradient(*case):
    return jax.grad(lambda *case: sum(jnp.sum(out.astype(jnp.float32)) for out in norm_linear(*case)))(*case)


@pytest.mark.parametrize("shape", [(16, 1, 1024), (1, 4097, 1536), (3, 700, WIDEST)], ids=str)
def test_a_sum_and_its_norm_are_one_kernel_on_a_hopper(shape):
    (call,) = lowered(norm_linear, case_of(shape))
    assert "tensor<{}x{}x{}xbf16>".format(*shape) in call


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((2, 3, 100), "bfloat16", "NVIDIA H200"),
        ((2, 3, 128), "float32", "NVIDIA H200"),
        ((2, 3, 128), "bfloat16", "NVIDIA A100-SXM4-80GB"),
    ],
    ids=["of another width", "in float32", "on an older GPU"],
)
def test_they_are_left_to_xla(shape, dtype, kind):
    assert not lowered(norm_linear, case_of(shape, dtype), kind)


@pytest.mark.parametrize(
    ("mesh", "batch"),
    [({"data": 1}, 8), ({"data": 2, "fsdp": 2}, 2), ({"data": 2, "tensor": 2}, 4), ({"tensor": 2}, 8)],
    ids=str,
)
def test_under_a_mesh_each_device_has_its_own_samples(mesh, batch):
    (call,) = lowered(norm_linear, case_of((8, 3, 128)), mesh=mesh)
    assert f"tensor<{batch}x3x128xbf16>" in call


def test_within_a_shard_map_too():
    def own(*case):
        batch = P("data")
        specs = batch, Branch(batch, P(), batch), batch, batch
        return jax.shard_map(add_norm, in_specs=specs, out_specs=batch, check_vma=False)(*case)

    (call,) = lowered(own, case_of((8, 3, 128)), mesh={"data": 4})
    assert "tensor<2x3x128xbf16>" in call


# --- Blocks, of one token each: attention has no kernel there.

DEPTH, ONE = 3, ScaleLadder((1,))


def stack_case(scan):
    """A function of tokens, the modulations of three blocks, and a key or None; tokens and modulations."""
    config = tiny(depth=DEPTH, width=128).transformer
    stack = Stack(config, DEPTH, 0, dtype=jnp.bfloat16, remat="dots", scan=scan, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    modulations = tuple(jnp.asarray(rng.normal(size=(DEPTH, 2, 1, 128)), jnp.float32) for _ in range(6))
    x = jnp.asarray(rng.normal(size=(2, 1, 128)), jnp.bfloat16)
    graphdef, state = nnx.split(stack)
    return lambda x, modulations, key: nnx.merge(graphdef, state)(x, modulations, ONE, key), x, modulations


@pytest.mark.parametrize(
    ("scan", "key", "kernels"),
    [(False, None, 2 * DEPTH - 1), (False, 0, DEPTH), (True, None, 1)],
    ids=["unrolled", "in training, where gradients keep no branch between blocks", "in a loop"],
)
def test_a_block_adds_the_branch_that_the_one_before_has_left(scan, key, kernels):
    stack, *case = stack_case(scan)
    with device():
        traced = jax.make_jaxpr(stack)(*case, None if key is None else jax.random.key(key))
    assert kernels_in(traced.jaxpr) == kernels


def kernels_in(jaxpr):
    """Kernels that a program runs, those of a loop once."""
    parts = [part.jaxpr for eqn in jaxpr.eqns for part in eqn.params.values() if isinstance(part, ClosedJaxpr)]
    return sum(eqn.primitive.name == "mpmd_map" for eqn in jaxpr.eqns) + sum(map(kernels_in, parts))


def test_blocks_that_leave_a_branch_give_what_others_give():
    stack, x, modulations = stack_case(scan=False)
    left = interpreted(lambda *case: stack(*case, None), x, modulations)
    added = jax.jit(stack)(x, modulations, None)
    difference, truth = (np.asarray(array, np.float64) for array in (left - added, added))
    assert np.linalg.norm(difference) < 2 * TOLERANCE["bfloat16"] * np.linalg.norm(truth)


@pytest.mark.skipif(not on_a_hopper(), reason="needs a Hopper GPU")
class TestOnAHopper:
    """What is compiled there for a Hopper; the batteries above run there too, on the card."""

    @pytest.mark.parametrize("shape", [(16, 1, 1024), (16, 256, 1920), (2, 4096, 1536), (64, 680, 1024)], ids=str)
    def test_results_are_bit_equal_when_repeated(self, shape):
        case = case_of(shape)
        check(case)
        for one, other in zip(run(case), run(case), strict=True):
            np.testing.assert_array_equal(one, other)
