"""The steps between a block's products: values and gradients against JAX's own ones of the plain formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.transformer import fused

# Relative error of a norm; bfloat16 rounds operands, results and gradients once each.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
B, L, C, F, V = 3, 10, 24, 40, 17


def norm(x, scale, shift):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
    return x * (1 + scale) + shift


def add(x, y, bias, gate):
    return x + gate * (y + bias)


def gelu_linear(x, bias, kernel):
    return jax.nn.gelu(x + bias, approximate=True) @ kernel


def norm_linear(x, scale, shift, kernel):
    return x, norm(x, scale, shift) @ kernel


def add_norm_linear(x, y, bias, gate, *rest):
    return norm_linear(add(x, y, bias, gate), *rest)


def scores(x, kernel, bias, targets):
    logits = x @ kernel + bias
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
    return fused.Scores(jax.nn.logsumexp(logits, axis=-1) - of_target, correct)


# name → the step, its plain formula, and their arguments: lower case is float32 whatever the compute dtype.
NORM = {"scale": (B, 1, C), "shift": (B, 1, C)}
BRANCH = {"X": (B, L, C), "Y": (B, L, C), "bias": (C,), "gate": (B, 1, C)}
CASES = {
    "modulated_norm": (fused.modulated_norm, norm, {"X": (B, L, C), **NORM}),
    "add_gated": (lambda x, *branch: fused.add_gated(x, fused.Residual(*branch)), add, BRANCH),
    "add_bias": (fused.add_bias, jnp.add, {"X": (B, L, F), "bias": (F,)}),
    "norm_linear": (
        lambda x, *rest: fused.norm_linear(x, None, *rest),
        norm_linear,
        {"X": (B, L, C), **NORM, "KERNEL": (C, F)},
    ),
    "add_norm_linear": (
        lambda x, y, bias, gate, *rest: fused.norm_linear(x, fused.Residual(y, bias, gate), *rest),
        add_norm_linear,
        {**BRANCH, **NORM, "KERNEL": (C, F)},
    ),
    "gelu_linear": (fused.gelu_linear, gelu_linear, {"X": (B, L, F), "bias": (F,), "KERNEL": (F, C)}),
    "scores": (fused.scores, scores, {"X": (B, L, C), "KERNEL": (C, V), "bias": (V,), "targets": (B, L)}),
}


@functools.cache
def arguments(name, dtype, offset=0.0):
    """Random ones, the rounded ones also as float32: what the plain formula is given."""
    rng = np.random.default_rng(0)
    made = []
    for arg, shape in CASES[name][2].items():
        if arg == "targets":
            made.append(jnp.asarray(rng.integers(0, V, shape), jnp.int32))
        else:
            scale = 0.3 if arg == "KERNEL" else 1.0
            array = jnp.asarray(scale * rng.normal(size=shape) + (offset if arg == "X" else 0), jnp.float32)
            made.append(array.astype(dtype) if arg.isupper() else array)
    return made, [x.astype(jnp.float32) if x.dtype == jnp.dtype(dtype) else x for x in made]


def error(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def cotangents(outputs):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), outputs)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients_are_those_of_the_plain_formula(name, dtype):
    given, plain = arguments(name, dtype)
    step, formula, names = CASES[name]
    expected, pull_plain = jax.vjp(jax.jit(formula), *plain)
    got, pull = jax.vjp(jax.jit(step), *given)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert error(one, other) < TOLERANCE[dtype]
    cotangent = cotangents(expected)
    gradients = pull(jax.tree.map(lambda given, made: given.astype(made.dtype), cotangent, got))
    for arg, array, one, other in zip(names, given, gradients, pull_plain(cotangent), strict=True):
        if arg != "targets":
            assert one.dtype == array.dtype
            assert error(one, other) < TOLERANCE[dtype], arg


def norm_gradients_in_float64(x, scale, dy):
    """Gradients of `norm` by x, scale and shift, by hand."""
    x, scale, dy = (np.asarray(array, np.float64) for array in (x, scale, dy))
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    n, dn = centred / deviation, dy * (1 + scale)
    dx = (dn - dn.mean(axis=-1, keepdims=True) - n * (n * dn).mean(axis=-1, keepdims=True)) / deviation
    return dx, (n * dy).sum(axis=1, keepdims=True), dy.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
@pytest.mark.parametrize("through", ["modulated_norm", "norm_linear"])
def test_gradients_of_a_norm_are_exact_on_tokens_far_from_zero(through, offset):
    """Rounding x itself to float32 leaves an error of 6e-8 times its distance from zero; nothing may add to that."""
    (x, scale, shift), _ = arguments("modulated_norm", "float32", offset)
    cotangent = cotangents(x)

    def step(x, scale, shift):
        if through == "modulated_norm":
            return fused.modulated_norm(x, scale, shift)
        return fused.norm_linear(x, None, scale, shift, jnp.eye(C))[1]

    got = jax.vjp(jax.jit(step), x, scale, shift)[1](cotangent)
    for one, other in zip(got, norm_gradients_in_float64(x, scale, cotangent), strict=True):
        assert error(one, other) < max(TOLERANCE["float32"], 3e-7 * offset)


def test_a_norm_of_equal_channels_has_finite_gradients():
    x = jnp.broadcast_to(jnp.asarray([0.1, 100.1, 3333.3]).reshape(1, 3, 1), (1, 3, C))
    zero = jnp.zeros((1, 1, C))
    _, pull = jax.vjp(fused.modulated_norm, x, zero, zero)
    assert all(np.isfinite(gradient).all() for gradient in pull(cotangents(x)))


def test_gelu_is_flat_far_below_zero_and_the_identity_far_above():
    x = jnp.asarray([-1e4, -40.0, -8.0, 0.0, 8.0, 40.0, 1e4]).reshape(1, 1, -1)
    value, pull = jax.vjp(lambda x: fused.gelu_linear(x, jnp.zeros(x.shape[-1]), jnp.eye(x.shape[-1])), x)
    np.testing.assert_allclose(value[0, 0], [0, 0, 0, 0, 8, 40, 1e4], atol=1e-4)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0][0, 0], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-4)


def kept(name, dtype="bfloat16"):
    """Shapes and dtypes that the gradient of a step keeps, its arguments left out."""
    given, _ = arguments(name, dtype)
    _, pull = jax.vjp(CASES[name][0], *given)
    inputs = {(x.shape, x.dtype.name) for x in given}
    return {(x.shape, x.dtype.name) for x in jax.tree.leaves(pull) if isinstance(x, jax.Array)} - inputs


@pytest.mark.parametrize("name", ["norm_linear", "add_norm_linear", "add_gated", "add_bias"])
def test_gradients_keep_nothing_but_arguments(name):
    assert not kept(name)


def test_the_gradient_of_gelu_keeps_its_argument_alone():
    assert kept("gelu_linear") <= {((B, L, F), "bfloat16")}


def test_no_float32_array_of_logits_outlives_the_forward_pass():
    assert kept("scores") == {((B, L, V), "bfloat16")}
