"""Transformer blocks over few tokens, a whole stack of them in one kernel, on Hopper (H100, H200), by Mosaic GPU.

Over few tokens a kernel costs what it costs to begin: it asks for its weights once it is launched, which is once the
one before has ended. Here one thread block stays on each multiprocessor through all phases of all blocks. Weights wait
for nothing, so that a warpgroup of its own runs ahead and keeps shared memory full of those to come. Tokens go from
phase to phase through global memory, which is to say through the L2 cache:

    NORM1      x → operand            rows go round the thread blocks
    QKV        operand → qkv          as column tiles do, and if there are too few, row tiles
    ATTENTION  qkv → attended         as tiles of a head's rows do
    PROJ       attended → partial     as column tiles do, and parts of the sum
    NORM2      x + partial → x, operand
    FC1        operand → hidden       with GELU
    FC2        hidden → partial
    NORM1      x + partial → x, operand, of the next block

Whoever has done its share of a phase adds one to a number in global memory, and whoever reads what the phase wrote
waits for the sum. That takes all thread blocks on the device at once. They are: there are no more than multiprocessors,
and each fills one; those that have to wait for another kernel's end are waited for.

No sum depends on who comes first: results are bit-equal from run to run.

Microseconds a block on an H200, in a chain of 16 with weights of their own: all in one stack; each in a stack of its
own, for which nobody loads weights ahead; by XLA, with cuBLAS and our kernel for attention. What is in brackets is not
served.

| rows R         | 16 | 64 | 128 | 144 | 256   | 400  |
| C 1024, stack  | 22 | 24 | 26  | 37  | 36    | (74) |
| C 1024, alone  | 27 |    |     |     |       |      |
| C 1024, by XLA | 38 | 42 | 42  | 45  | 48    | 52   |
| C 1920, stack  | 39 | 41 | 49  |     | (115) |      |
| C 1920, alone  | 43 |    |     |     |       |      |
| C 1920, by XLA | 50 | 61 |     |     | 73    |      |

Axis letters: B batch, N tokens of a sample, R rows (tokens of all samples), C width, H heads, F features.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.extend import backend

from pallas_kernels.devices import automatic_axes, device, is_hopper
from pallas_kernels.small_block_kernel import Modulation, ThreadBlock, Weights
from pallas_kernels.small_block_plan import CHUNK, TILE, Buffers, Plan, Ref

__all__ = ["Modulation", "Weights", "blocks", "serves"]


def serves(x: jax.Array | jax.ShapeDtypeStruct, heads: int, features: int) -> bool:
    """Whether `blocks` takes tokens of this shape and dtype where they are, on one Hopper, and is the faster for it.

    Args:
      x: (B,N,C). heads: H, of attention. features: F, of the feed-forward.
    """
    if len(x.shape) != 3 or x.size == 0 or not is_hopper(*device()) or automatic_axes():
        return False
    batch, tokens, width = x.shape
    fits = x.dtype == jnp.bfloat16 and width == heads * TILE and width % CHUNK == 0 and features % CHUNK == 0
    return fits and tokens <= TILE and Plan(batch, tokens, width, features, 1, _multiprocessors()).is_worth_it


@jax.jit  # lowered once for all calls of a shape
def blocks(x: jax.Array, weights: Weights, modulation: Modulation) -> jax.Array:
    """Each block in turn: x += g1·attn(LN(x)(1+s1)+b1); x += g2·ffn(LN(x)(1+s2)+b2).

    LN has eps 1e-6 and no parameters. A token sees all tokens of its sample, with QK-norm (eps 1e-12). Products are
    bfloat16 and sum in float32, x is bfloat16 after each half of a block.

    Args:
      x: (B,N,C) bfloat16, B·N up to 64 or, where there are multiprocessors to spare, a multiple of that: see `serves`.
      weights, modulation: of all blocks. One alone is a stack of depth 1.

    Returns:
      As x.

    Raises:
      ValueError: `serves` does not accept x.
    """
    batch, tokens, width = x.shape
    depth, _, features = weights.fc1.shape
    heads = weights.q_scale.shape[1]
    if not serves(x, heads, features):
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}, with {heads} heads and {features} features; expected bfloat16 (B, N, C) "
            f"on one Hopper GPU, heads of {TILE}, C and features multiples of {CHUNK}, N up to {TILE}, few rows."
        )
    plan = Plan(batch, tokens, width, features, depth, _multiprocessors())
    inputs, treedef = jax.tree.flatten((x.reshape(plan.rows, width), weights, modulation))

    def kernel(*refs: Ref, **scratch: Ref) -> None:
        given = jax.tree.unflatten(treedef, refs[: len(inputs)])
        ThreadBlock(plan, given, Buffers(*refs[len(inputs) :]), scratch).run()

    call = plgpu.kernel(
        kernel,
        out_type=plan.buffers(),
        scratch_types=plan.scratch(),
        grid=(plan.thread_blocks,),
        grid_names=("cta",),
        num_threads=plan.readers + 2,
        thread_name="wg",
        kernel_name="small_blocks",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return call(*inputs)[0].reshape(x.shape)


def _multiprocessors() -> int:
    """Of the device that is compiled for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract else backend.get_default_device().core_count
