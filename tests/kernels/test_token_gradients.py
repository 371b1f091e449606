"""The Triton kernels for gradients between a block's products: interpreted, compiled, and who gets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from triton_tools import compile_kernel, interpreter, spilled_bytes

from hmar_jax.transformer import fused
from pallas_kernels import devices, token_gradients
from pallas_kernels.token_gradients import GeluSpec, NormSpec, Residual

pytest.importorskip("triton", reason="the extra test has Triton for Linux on x86-64 only")
from pallas_kernels import token_gradients_triton as kernels

# Norm of the difference over norm of what autodiff makes of the plain formulas.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}


def norm_case(batch, length, width, dtype, with_branch):
    """What `norm_gradients` takes, and a shift."""
    rng = np.random.default_rng(0)
    x, y, doperand, dtotal = (rng.normal(size=(batch, length, width)).astype(jnp.dtype(dtype)) for _ in range(4))
    scale, shift, gate = (rng.normal(size=(batch, 1, width)).astype(np.float32) for _ in range(3))
    branch = Residual(y, rng.normal(size=width).astype(np.float32), gate) if with_branch else None
    return (x, branch, scale, doperand, dtotal), shift


def norm_gradients(*case):
    return token_gradients.norm_gradients(*jax.tree.map(jnp.asarray, case))


def gelu_gradients(z, dy):
    return token_gradients.gelu_gradients(jnp.asarray(z), jnp.asarray(dy))


def plain_norm_gradients(case, shift):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case)
    x, branch, scale, doperand, dtotal = wide
    return jax.vjp(fused._norm, x, branch, scale, shift)[1]((dtotal, doperand))


def check(found, expected, dtype):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) <= TOLERANCE[dtype] * np.linalg.norm(other)


def gelu_case(shape, dtype):
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=shape).astype(jnp.dtype(dtype)) for _ in range(2))


def plain_gelu_gradients(z, dy):
    value, pull = jax.vjp(lambda z: jax.nn.gelu(z, approximate=True), jnp.asarray(z, jnp.float32))
    (dz,) = pull(jnp.asarray(dy, jnp.float32))
    return value, dz, dz.sum(axis=(0, 1))


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as run:
        yield run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("with_branch", [False, True], ids=["alone", "branch"])
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (3, 16, 32), (2, 37, 24)])
def test_norm_gradients_are_those_of_the_plain_formulas(interpreted, batch, length, width, dtype, with_branch):
    case, shift = norm_case(batch, length, width, dtype, with_branch)
    check(interpreted(norm_gradients, *case), plain_norm_gradients(case, shift), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 128), (3, 50, 300)])
def test_gelu_gradients_are_those_of_the_plain_formula(interpreted, shape, dtype):
    case = gelu_case(shape, dtype)
    check(interpreted(gelu_gradients, *case), plain_gelu_gradients(*case), dtype)


def test_gelu_gradients_are_finite_far_from_zero(interpreted):
    z = np.float32([-1e4, -40, -8, 0, 8, 40, 1e4]).reshape(1, 1, -1)
    value, dz, total = interpreted(gelu_gradients, z, np.ones_like(z))
    np.testing.assert_allclose(value[0, 0], [0, 0, 0, 0, 8, 40, 1e4], atol=1e-4)
    np.testing.assert_allclose(dz[0, 0], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-4)
    np.testing.assert_array_equal(total, dz[0, 0])


def on_a_served_gpu():
    return jax.default_backend() == "gpu" and devices.has_triton()


@pytest.mark.skipif(not on_a_served_gpu(), reason="needs an NVIDIA GPU since Ampere and jax_triton")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [384, 1024, 1920])
class TestOnAGpu:
    def test_norm_gradients_are_those_of_the_plain_formulas_and_bit_equal_when_repeated(self, width, dtype):
        for with_branch in (False, True):
            case, shift = norm_case(2, 85, width, dtype, with_branch)
            found, again = norm_gradients(*case), norm_gradients(*case)
            jax.tree.map(np.testing.assert_array_equal, found, again)
            check(found, plain_norm_gradients(case, shift), dtype)

    def test_gelu_gradients_are_those_of_the_plain_formula_and_bit_equal_when_repeated(self, width, dtype):
        case = gelu_case((2, 85, width), dtype)
        found, again = gelu_gradients(*case), gelu_gradients(*case)
        jax.tree.map(np.testing.assert_array_equal, found, again)
        check(found, plain_gelu_gradients(*case), dtype)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    "spec", [NormSpec(680, 1920, True), NormSpec(2240, 1536, False), GeluSpec(35840, 6144)], ids=str
)
def test_the_kernels_compile_and_spill_little(tmp_path, spec, capability):
    kernel = kernels.gelu_kernel if isinstance(spec, GeluSpec) else kernels.norm_kernel
    others = dict.fromkeys(["scale", "gate", "bias", "sums"], "float32")
    compiled = compile_kernel(kernel, capability, "bfloat16", spec, others, num_warps=spec.warps)
    assert spilled_bytes(compiled, tmp_path) <= 640  # with twice the warps they spill nothing, and are slower


H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def traced_kernels(monkeypatch, mesh, served=True):
    """(kernel, first argument's shape) of those in the gradient of a block's products, 8 samples on a mesh of GPUs."""
    seen = []

    def record(*arrays, kernel, out_shape, **_):
        seen.append((kernel.__name__, arrays[0].shape))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr(devices, "triton_call", record)
    monkeypatch.setattr(devices, "has_triton", lambda: served)

    def loss(x, rows, bias, kernel):
        branch = Residual(x, bias, rows)
        x, hidden = fused.norm_linear(x, branch, rows, rows, kernel)
        return jnp.sum(x + fused.gelu_linear(hidden, bias, kernel), dtype=jnp.float32)

    shapes = [((8, 30, 64), "bfloat16"), ((8, 1, 64), "float32"), ((64,), "float32"), ((64, 64), "bfloat16")]
    axes = {"axis_types": (AxisType.Auto,) * len(mesh), "abstract_device": H200}
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(mesh.values()), tuple(mesh), **axes)):
        jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return seen


def test_on_a_gpu_gradients_are_by_the_kernels_where_jax_triton_is_installed(monkeypatch):
    assert traced_kernels(monkeypatch, {}) == [("gelu_kernel", (8, 30, 64)), ("norm_kernel", (8, 30, 64))]
    assert traced_kernels(monkeypatch, {}, served=False) == []


def test_under_a_mesh_each_device_runs_the_kernels_on_its_own_samples(monkeypatch):
    found = traced_kernels(monkeypatch, {"data": 2, "fsdp": 2, "tensor": 2})
    assert found == [("gelu_kernel", (2, 30, 64)), ("norm_kernel", (2, 30, 64))]
