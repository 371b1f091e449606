"""The Triton kernels between a block's products, and of their gradients: interpreted, compiled, and who gets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import H200, compiling_for
from flax import nnx
from jax.extend.core import ClosedJaxpr
from tiny_models import tiny
from triton_tools import compile_kernel, interpreter, spilled_bytes

from hmar_jax.scales import ScaleLadder
from hmar_jax.transformer import fused
from hmar_jax.transformer.blocks import Stack
from pallas_kernels import devices, token_passes
from pallas_kernels.token_passes import AddSpec, GeluSpec, NormSpec, Residual

pytest.importorskip("triton", reason="the extra test has Triton for Linux on x86-64 only")
from pallas_kernels import token_passes_triton as kernels

# Norm of the difference over norm of what autodiff makes of the plain formulas.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}
OF_ONE_ROUNDING = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}


def add_case(batch, length, width, dtype, offset=0.0):
    """What `add_norm` takes."""
    rng = np.random.default_rng(batch + length + width)
    x, y = ((rng.normal(size=(batch, length, width)) + offset).astype(jnp.dtype(dtype)) for _ in range(2))
    gate, scale, shift = (rng.normal(size=(batch, 1, width)).astype(np.float32) for _ in range(3))
    return x, Residual(y, rng.normal(size=width).astype(np.float32), gate), scale, shift


def add_norm(*case):
    return token_passes.add_norm(*jax.tree.map(jnp.asarray, case))


def plain_add_norm(x, branch, scale, shift):
    """In float64, the norm of the rounded sum."""

    def wide(array):
        return np.asarray(array, np.float64)

    total = wide(jnp.asarray(wide(x) + wide(branch.gate) * (wide(branch.y) + wide(branch.bias)), x.dtype))
    centred = total - total.mean(axis=-1, keepdims=True)
    n = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return total, n * (1 + wide(scale)) + wide(shift)


def norm_case(batch, length, width, dtype, with_branch):
    """What `norm_gradients` takes, and a shift."""
    rng = np.random.default_rng(0)
    x, y, doperand, dtotal = (rng.normal(size=(batch, length, width)).astype(jnp.dtype(dtype)) for _ in range(4))
    scale, shift, gate = (rng.normal(size=(batch, 1, width)).astype(np.float32) for _ in range(3))
    branch = Residual(y, rng.normal(size=width).astype(np.float32), gate) if with_branch else None
    return (x, branch, scale, doperand, dtotal), shift


def norm_gradients(*case):
    return token_passes.norm_gradients(*jax.tree.map(jnp.asarray, case))


def gelu_gradients(z, dy):
    return token_passes.gelu_gradients(jnp.asarray(z), jnp.asarray(dy))


def plain_norm_gradients(case, shift):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case)
    x, branch, scale, doperand, dtotal = wide
    return jax.vjp(fused._norm, x, branch, scale, shift)[1]((dtotal, doperand))


def check(found, expected, dtype, tolerance=TOLERANCE):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) <= tolerance[dtype] * np.linalg.norm(other)


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
@pytest.mark.parametrize("length", [1, 2, 1536, 1538])
def test_a_sum_and_its_norm_are_those_of_the_plain_formula(interpreted, length, dtype):
    for batch, width in [(1, 1), (2, 24)]:
        case = add_case(batch, length, width, dtype)
        check(interpreted(add_norm, *case), plain_add_norm(*case), dtype, OF_ONE_ROUNDING)


def test_a_norm_stays_exact_on_tokens_far_from_zero(interpreted):
    case = add_case(1, 4, 1024, "float16", offset=100.0)
    check(interpreted(add_norm, *case), plain_add_norm(*case), "float16", OF_ONE_ROUNDING)


@pytest.mark.parametrize(
    ("batch", "length", "run"), [(16, 1, 1), (16, 64, 1), (16, 256, 4), (16, 169, 1), (8, 4096, 16), (1, 1535, 1)]
)
def test_a_program_takes_as_many_tokens_as_leave_enough_programs_and_divide_those_of_a_sample(batch, length, run):
    assert AddSpec.of(batch, length, 1024).run == run


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
    def test_a_sum_and_its_norm_are_those_of_the_plain_formula_and_bit_equal_when_repeated(self, width, dtype):
        for batch, length in [(16, 1), (2, 85), (16, 256)]:
            case = add_case(batch, length, width, dtype)
            found, again = add_norm(*case), add_norm(*case)
            jax.tree.map(np.testing.assert_array_equal, found, again)
            check(found, plain_add_norm(*case), dtype, OF_ONE_ROUNDING)

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
    "spec",
    [AddSpec(1920, 4), NormSpec(680, 1920, True), NormSpec(2240, 1536, False), GeluSpec(35840, 6144)],
    ids=str,
)
def test_the_kernels_compile_and_spill_little(tmp_path, spec, capability):
    kernel = {AddSpec: kernels.add_norm_kernel, NormSpec: kernels.norm_kernel, GeluSpec: kernels.gelu_kernel}[
        type(spec)
    ]
    others = dict.fromkeys(["scale", "shift", "gate", "bias", "sums"], "float32")
    compiled = compile_kernel(kernel, capability, "bfloat16", spec, others, num_warps=spec.warps)
    most = 0 if isinstance(spec, AddSpec) else 640
    assert spilled_bytes(compiled, tmp_path) <= most  # with twice the warps they spill nothing, and are slower


@pytest.fixture
def seen(monkeypatch):
    """(kernel, first argument's shape) of those that are called while something is traced for GPUs."""
    calls = []

    def record(*arrays, kernel, out_shape, **_):
        calls.append((kernel.__name__, arrays[0].shape))
        return jax.pure_callback(lambda *_: None, out_shape, *arrays)

    monkeypatch.setattr(devices, "triton_call", record)
    monkeypatch.setattr(devices, "is_installed", lambda _: True)
    monkeypatch.setattr(token_passes, "FEWEST_TO_ADD", 1)
    return calls


def on_mesh(**mesh):
    return compiling_for(H200, mesh)


def loss(x, rows, bias, kernel):
    """Of a block's products."""
    x, hidden = fused.norm_linear(x, Residual(x, bias, rows), rows, rows, kernel)
    return jnp.sum(x + fused.gelu_linear(hidden, bias, kernel), dtype=jnp.float32)


SHAPES = [((8, 30, 64), "bfloat16"), ((8, 1, 64), "float32"), ((64,), "float32"), ((64, 64), "bfloat16")]
LOSS_CASE = [jax.ShapeDtypeStruct(*shape) for shape in SHAPES]
GRADIENT = jax.grad(loss, argnums=(0, 1, 2, 3))


@pytest.mark.parametrize(
    ("mesh", "samples", "features"),
    [({}, 8, 64), ({"data": 2, "fsdp": 2, "tensor": 2}, 2, 32), ({"tensor": 4}, 8, 16), ({"tensor": 3}, 8, 64)],
    ids=str,
)
def test_on_gpus_each_runs_the_kernels_on_its_own_samples_and_hidden_features(seen, mesh, samples, features):
    with on_mesh(**mesh):
        jax.make_jaxpr(loss)(*LOSS_CASE)
        assert seen == [("add_norm_kernel", (samples, 30, 64))]
        seen.clear()
        jax.make_jaxpr(GRADIENT)(*LOSS_CASE)
    assert seen == [("gelu_kernel", (samples, 30, features)), ("norm_kernel", (samples, 30, 64))]


def test_samples_that_a_mesh_cannot_divide_are_left_to_xla(seen):
    with on_mesh(data=3):
        jax.make_jaxpr(GRADIENT)(*LOSS_CASE)
    assert not seen


@pytest.mark.parametrize("ways", [1, 2])
def test_few_tokens_of_a_device_are_left_to_xla(seen, monkeypatch, ways):
    monkeypatch.setattr(token_passes, "FEWEST_TO_ADD", 8 * 30 // ways + 1)
    with on_mesh(**({"data": ways} if ways > 1 else {})):
        jax.make_jaxpr(loss)(*LOSS_CASE)
    assert not seen


@pytest.mark.parametrize("function", [loss, GRADIENT], ids=["forward", "backward"])
def test_without_jax_triton_xla_does_it(seen, monkeypatch, function):
    monkeypatch.setattr(devices, "is_installed", lambda _: False)
    with on_mesh():
        jax.make_jaxpr(function)(*LOSS_CASE)
    assert not seen


# --- Blocks, of one token each: attention has no kernel there.

DEPTH, ONE = 3, ScaleLadder((1,))


def stack_case(scan):
    """A function of tokens and a key or None, three blocks; and tokens."""
    config = tiny(depth=DEPTH, width=128).transformer
    stack = Stack(config, DEPTH, 0, dtype=jnp.bfloat16, remat="dots", scan=scan, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    modulations = tuple(jnp.asarray(rng.normal(size=(DEPTH, 2, 1, 128)), jnp.float32) for _ in range(6))
    return lambda x, key=None: stack(x, modulations, ONE, key), jnp.asarray(rng.normal(size=(2, 1, 128)), jnp.bfloat16)


@pytest.mark.parametrize(
    ("scan", "key", "kernels"),
    [(False, None, 2 * DEPTH - 1), (False, 0, DEPTH), (True, None, 1)],
    ids=["unrolled", "in training, where gradients keep no branch between blocks", "in a loop"],
)
def test_a_block_adds_the_branch_that_the_one_before_has_left(seen, scan, key, kernels):
    stack, x = stack_case(scan)
    with on_mesh():
        traced = jax.make_jaxpr(stack)(x, None if key is None else jax.random.key(key))
    assert seen
    assert kernels_in(traced.jaxpr) == kernels


def kernels_in(jaxpr):
    """Kernels that a program runs, those of a loop once."""
    parts = [part.jaxpr for eqn in jaxpr.eqns for part in eqn.params.values() if isinstance(part, ClosedJaxpr)]
    return sum(eqn.primitive.name == "pure_callback" for eqn in jaxpr.eqns) + sum(map(kernels_in, parts))


def test_blocks_that_leave_a_branch_give_what_others_give(monkeypatch):
    stack, x = stack_case(scan=False)
    added = stack(x)
    monkeypatch.setattr(token_passes, "adds", lambda x: True)
    monkeypatch.setattr(token_passes, "add_norm", fused._norm)
    check(stack(x), added, "bfloat16")
