"""What stands between the matrix products of a block, with gradients that keep little and pass over memory seldom.

As soon as matrix products run at full speed, training waits for memory. A normalised or activated copy of the tokens
costs more to keep and to read again than to compute again, so that a product here keeps the arrays which its operand is
made from. Biases are added by cuBLAS before a product is written, and GELU after them (`add_bias`, `gelu`), or by the
step after it, where its backward pass sums their gradients on its way (`add_gated`).

Arithmetic is float32 between products; what is handed on has the dtype of the tokens. Where the code says
`optimization_barrier`, XLA is to write one array once, or to compute it a second time, against its own judgement.

Axis letters: B batch, L tokens, C width, F features, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import optimization_barrier

from pallas_kernels import token_passes
from pallas_kernels.token_passes import EPS, GELU_CUBE, GELU_SCALE, Residual

_EXACT = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}


def row_major(x: jax.Array) -> jax.Array:
    """x, laid out as its shape says: XLA would transpose all tokens to suit a small product that they feed."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


# ------------------------------------------------------------------------------- products of what is recomputed


@jax.custom_vjp
def norm_linear(
    x: jax.Array, branch: Residual | None, scale: jax.Array, shift: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A residual sum, its norm and a matrix product: s = add_gated(x, branch), or x; n = modulated_norm(s); p = n @ W.

    Backward, given ds (what reaches s by other ways) and dp:

        dn = dp Wᵀ, dW = Σ nᵀ dp; dx, dbranch, dscale, dshift by the chain rule of `modulated_norm` and `add_gated`

        stored       x, branch, scale, shift, W
        recomputed   s, n

    Args:
      x: (B,L,C). branch: what is added to it first, if anything. scale, shift: (B,1,C) float32. kernel: W, (C,F).

    Returns:
      s (B,L,C), p (B,L,F).
    """
    if branch is not None and token_passes.adds(x):
        total, operand = token_passes.add_norm(x, branch, scale, shift)
    else:
        total, operand = _norm(x, branch, scale, shift)
    return total, operand @ kernel


def _norm(x: jax.Array, branch: Residual | None, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = x if branch is None else add_gated(x, branch)
    return total, modulated_norm(total, scale, shift)


def _norm_linear_backward(kept: Any, grads: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    (*inputs, kernel), (dtotal, dproduct) = kept, grads
    # Without the barrier XLA takes s and n from the forward pass, and stores them, or recomputes them too early.
    inputs, dproduct = optimization_barrier((inputs, dproduct))
    (_, operand), pull = jax.vjp(_norm, *inputs)
    dkernel = jnp.einsum("blc,blf->cf", operand, dproduct)
    doperand = jnp.einsum("blf,cf->blc", dproduct, kernel)
    x, branch, scale, _ = inputs
    if token_passes.serves(x):
        return *token_passes.norm_gradients(x, branch, scale, doperand, dtotal), dkernel
    return *pull((dtotal, doperand)), dkernel


def _norm_linear_forward(*inputs: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    (*given, kernel) = inputs
    total, operand = _norm(*given)
    return (total, operand @ kernel), inputs


norm_linear.defvjp(_norm_linear_forward, _norm_linear_backward)


@jax.custom_vjp
def gelu_linear(x: jax.Array, bias: jax.Array, kernel: jax.Array) -> jax.Array:
    """GELU and a matrix product: p = gelu(z) @ W with z = x + bias.

    GELU is by its tanh approximation; x (B,L,F), bias (F,), W (F,C) → (B,L,C). Backward, given dp:

        dx = dz = gelu'(z)·(dp Wᵀ), dbias = Σ dz, dW = Σ gelu(z)ᵀ dp

        stored       z, W
        recomputed   gelu(z)
    """
    return _gelu_linear_forward(x, bias, kernel)[0]


def _gelu_linear_forward(x: jax.Array, bias: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    z = add_bias(x, bias)
    return jax.nn.gelu(z, approximate=True) @ kernel, (z, kernel)  # by cuBLAS, as in `add_bias`


def _gelu_linear_backward(kept: tuple[jax.Array, jax.Array], dproduct: jax.Array) -> tuple[jax.Array, ...]:
    (z, kernel), dproduct = optimization_barrier((kept, dproduct))
    doperand = jnp.einsum("blc,fc->blf", dproduct, kernel)
    gradients = token_passes.gelu_gradients if token_passes.serves(z) else gelu_gradients
    operand, dz, dbias = gradients(z, doperand)
    return dz, dbias, jnp.einsum("blf,blc->fc", operand, dproduct)


gelu_linear.defvjp(_gelu_linear_forward, _gelu_linear_backward)


# -------------------------------------------------------------------------------------------- between products


@jax.custom_vjp
def modulated_norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """LN(x)(1+scale)+shift without affine parameters, eps 1e-6: (B,L,C), twice (B,1,C) float32 → (B,L,C).

    Backward, given dy, with n = (x-mean)/σ, dn = dy(1+scale), and E the mean over the channels of a token:

        dx = (dn - E[dn] - n·E[n·dn])/σ, dscale = Σ n·dy, dshift = Σ dy     (Σ over the tokens of a sample)

        stored       x, scale, and mean and 1/σ of each token
        recomputed   n
    """
    return _modulated_norm_forward(x, scale, shift)[0]


def _modulated_norm_forward(x: jax.Array, scale: jax.Array, shift: jax.Array) -> tuple[jax.Array, Any]:
    mean = jnp.mean(_wide(x), axis=-1, keepdims=True)
    centred = _wide(x) - mean
    # About the mean: E[x²] - E[x]² would cancel where the mean is large.
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + EPS)
    return (centred * inverse * (1 + scale) + shift).astype(x.dtype), (x, scale, mean, inverse)


def _modulated_norm_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
    """In two passes over the tokens: one for the two means E, one for dx and the sums Σ."""
    x, scale, mean, inverse = kept
    n, dn = (_wide(x) - mean) * inverse, dy * (1 + scale)
    means = [jnp.mean(of_token, axis=-1, keepdims=True) for of_token in (dn, n * dn)]
    dy, (dn_mean, n_dn_mean) = optimization_barrier((dy, means))
    dx = inverse * (dy * (1 + scale) - dn_mean - n * n_dn_mean)
    dscale, dshift = (jnp.sum(of_token, axis=1, keepdims=True, dtype=jnp.float32) for of_token in (dy * n, dy))
    return dx.astype(x.dtype), dscale, dshift


modulated_norm.defvjp(_modulated_norm_forward, _modulated_norm_backward)


@jax.custom_vjp
def add_gated(x: jax.Array, branch: Residual) -> jax.Array:
    """Residual branch: x + gate·(y + bias), (B,L,C).

    Backward, given d, with D = Σ d over the tokens of a sample:

        dx = d, dy = gate·d, dbias = Σ gate·D over samples, dgate = Σ d·(y + bias) = Σ d·y + bias·D

        stored       y, bias, gate
        recomputed   nothing
    """
    return (x + branch.gate * (branch.y + branch.bias)).astype(x.dtype)


def _add_gated_backward(branch: Residual, dx: jax.Array) -> tuple[jax.Array, Residual]:
    y, bias, gate = branch
    total, product = (jnp.sum(of_token, axis=1, keepdims=True, dtype=jnp.float32) for of_token in (dx, _wide(dx) * y))
    return dx, Residual((gate * dx).astype(y.dtype), jnp.sum(gate * total, axis=(0, 1)), product + bias * total)


add_gated.defvjp(lambda x, branch: (add_gated(x, branch), branch), _add_gated_backward)


def gelu_gradients(z: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `token_passes.gelu_gradients`, by XLA: gelu(z), dz and Σ dz for dy, the gradient by gelu(z).

    With u = a(z + bz³), a = GELU_SCALE, b = GELU_CUBE, and the gate g = 1/(1 + exp(-u)):

        gelu(z) = z·g, gelu'(z) = g + z·g(1-g)·a(1 + 3bz²)
    """
    wide = _wide(z)
    # g as the square of an inverse root, which is one instruction on a GPU; a tanh or a division takes many, and where
    # memory is fast this step waits for instructions.
    gate = jnp.square(jax.lax.rsqrt(1 + jnp.exp(-GELU_SCALE * (wide + GELU_CUBE * wide * wide * wide))))
    slope = gate + wide * gate * (1 - gate) * GELU_SCALE * (1 + 3 * GELU_CUBE * wide * wide)
    return (wide * gate).astype(z.dtype), *_with_sum((dy * slope).astype(z.dtype))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """As +, for (B,L,F) and (F,)."""
    # In the tokens' dtype XLA has cuBLAS do it, and GELU after it, before the product that x is gets written.
    return x + bias.astype(x.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, dy: _with_sum(dy))


def _with_sum(dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B,L,F) → itself, and its sum (F,) float32 over the tokens, which are summed before they go anywhere else."""
    dy = optimization_barrier(dy)
    dy, of_sample = optimization_barrier((dy, jnp.sum(dy, axis=1, dtype=jnp.float32)))
    return dy, jnp.sum(of_sample, axis=0)


# ------------------------------------------------------------------------------------------------------- the head


class Scores(NamedTuple):
    """How logits meet their targets, both (B,L) float32: cross-entropy, and 1 where no logit exceeds the target's."""

    entropy: jax.Array
    correct: jax.Array


# What is made of the head's operands x (B,N,C), kernel (C,V) and bias (V,): `logits`, or `scores_of` some targets.
type Output[T] = Callable[[jax.Array, jax.Array, jax.Array], T]


def logits(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Affine: x @ kernel + bias, summed in float32, for (B,L,C), (C,V), (V,) → (B,L,V) float32."""
    return jnp.matmul(x, kernel, **_EXACT) + bias


def scores_of(targets: jax.Array) -> Output[Scores]:
    """The output that tells how logits meet targets (B,N) int32, in less memory than the logits take."""
    return lambda x, kernel, bias: scores(x, kernel, bias, targets)


@jax.custom_vjp
def scores(x: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array) -> Scores:
    """Scores of the logits z = x @ W + bias for targets (B,L) int.

    Backward, given dentropy = w (B,L), from d entropy/dz = e = softmax(z) - onehot(target):

        dx = w·(e Wᵀ), dW = Σ (w·x)ᵀ e, dbias = Σ w·e

        stored       x, W, e (B,L,V) in the dtype of x
        recomputed   nothing
    """
    return _scores_and_errors(x, kernel, bias, targets)[0]


def _scores_and_errors(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array
) -> tuple[Scores, jax.Array]:
    z = logits(x, kernel, bias)
    is_target = targets[..., None] == jnp.arange(z.shape[-1])
    highest = jnp.max(z, axis=-1, keepdims=True)
    of_target = jnp.max(jnp.where(is_target, z, -jnp.inf), axis=-1, keepdims=True)
    highest, of_target = optimization_barrier((highest, of_target))
    total = optimization_barrier(jnp.sum(jnp.exp(z - highest), axis=-1, keepdims=True))
    log_total = jnp.log(total) + highest
    found = Scores((log_total - of_target)[..., 0], (of_target == highest)[..., 0].astype(jnp.float32))
    return found, (jnp.exp(z - log_total) - is_target).astype(x.dtype)


def _scores_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array) -> tuple[Scores, Any]:
    found, errors = _scores_and_errors(x, kernel, bias, targets)
    return found, (x, kernel, errors)


def _scores_backward(kept: tuple[jax.Array, ...], grads: Scores) -> tuple[jax.Array | None, ...]:
    """`share` is w. It scales x and e Wᵀ rather than e, which is larger."""
    (x, kernel, errors), share = kept, grads.entropy[..., None]
    dx = share * jnp.einsum("blv,cv->blc", errors, kernel, **_EXACT)
    dkernel = jnp.einsum("blc,blv->cv", (share * x).astype(x.dtype), errors, **_EXACT)
    return (
        dx.astype(x.dtype),
        dkernel.astype(kernel.dtype),
        jnp.sum(share * errors, axis=(0, 1), dtype=jnp.float32),
        None,
    )


scores.defvjp(_scores_forward, _scores_backward)
