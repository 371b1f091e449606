"""The kernel of whole blocks over few tokens: who does what, lowered for CUDA without a GPU, and run on a Hopper."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.small_block import Modulation, Weights, blocks, serves
from pallas_kernels.small_block_plan import CHUNK, MOST_READERS, TILE, Phase, Plan, Product

SHARED_BYTES = 227 * 1024  # what a thread block may use on Hopper
# Norm of the difference over norm of the truth after one block, whose roundings a stack of them adds up.
TOLERANCE = 4e-3


def device(kind="NVIDIA H200", mesh=None, cores=132):
    """Compiles for GPUs that are not here, joined to a mesh or one alone."""
    mesh = mesh or {}
    abstract = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    axes = {"axis_types": (AxisType.Auto,) * len(mesh), "abstract_device": abstract}
    return jax.sharding.use_abstract_mesh(AbstractMesh(tuple(mesh.values()), tuple(mesh), **axes))


def on_a_hopper():
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def shapes_of(shape, depth=2, dtype="bfloat16", mlp_ratio=4):
    """What `blocks` takes, as shapes: x, weights, modulation."""
    batch, _, width = shape
    hidden, heads = mlp_ratio * width, width // TILE

    def like(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct((depth, *shape), dtype)

    weights = Weights(
        qkv=like(width, 3 * width, dtype="bfloat16"),
        proj=like(width, width, dtype="bfloat16"),
        fc1=like(width, hidden, dtype="bfloat16"),
        fc2=like(hidden, width, dtype="bfloat16"),
        qkv_bias=like(3 * width),
        proj_bias=like(width),
        fc1_bias=like(hidden),
        fc2_bias=like(width),
        q_scale=like(heads),
    )
    return jax.ShapeDtypeStruct(shape, dtype), weights, Modulation(*[like(batch, 1, width)] * 6)


# --- Who does what.

PLANS = [
    Plan(batch, tokens, width, 4 * width, 2, cores)
    for batch, tokens in [(1, 1), (2, 1), (16, 4), (2, 25), (3, 36), (16, 9), (2, 64), (16, 16)]
    for width in (128, 1024, 1536, 1920)
    for cores in (114, 132)
]
PLANS = [plan for plan in PLANS if plan.is_worth_it]


@pytest.mark.parametrize("plan", PLANS, ids=str)
class TestThePlan:
    def shapes(self, plan):
        """K and columns of each product."""
        width, features = plan.width, plan.features
        return {
            Phase.QKV: (width, 3 * width),
            Phase.PROJ: (width, width),
            Phase.FC1: (width, features),
            Phase.FC2: (features, width),
        }

    def test_every_row_tile_meets_every_chunk_of_every_column_tile_once(self, plan):
        for phase, (depth, columns) in self.shapes(plan).items():
            splits = plan.splits if phase in (Phase.PROJ, Phase.FC2) else 1
            weights = types.SimpleNamespace(shape=(plan.depth, depth, columns))
            product = Product(phase, Phase(phase - 1), None, weights, 0, plan.tasks(phase), splits)
            groups, tiles, parts, first, last = (np.asarray(x) for x in product.task(np.arange(product.tasks)))
            met = collections.Counter(
                (group, tile, chunk)
                for group, tile, begin, end in zip(groups, tiles, first, last, strict=True)
                for chunk in range(begin, end)
            )
            assert met.keys() == set(np.ndindex(plan.groups, columns // TILE, depth // CHUNK))
            assert set(met.values()) == {1}
            assert (last > first).all()
            assert set(parts.tolist()) == set(range(splits))

    def test_rows_are_covered_by_tiles_of_readers_and_attended_to_in_whole_samples(self, plan):
        tiles = plan.groups * plan.readers
        assert (tiles - plan.groups) * TILE < plan.rows <= tiles * TILE
        assert plan.samples * plan.tokens <= TILE
        assert -(-plan.batch // plan.samples) * plan.heads == plan.tasks(Phase.ATTENTION)

    def test_as_many_are_waited_for_as_have_a_share(self, plan):
        for phase in Phase:
            if phase in (Phase.NORM1, Phase.NORM2):
                shares = np.arange(plan.thread_blocks) < plan.tasks(phase)
            elif phase == Phase.ATTENTION:
                shares = np.arange(plan.thread_blocks * plan.readers) < plan.tasks(phase)
            else:
                shares = np.repeat(np.arange(plan.thread_blocks) < plan.tasks(phase), plan.readers)
            assert shares.sum() == plan.finishers(phase) > 0

    def test_shared_memory_suffices(self, plan):
        scratch = plan.scratch()
        used = sum(np.prod(scratch[name].shape) * scratch[name].dtype.itemsize for name in ("weights_memory", "shared"))
        assert used + 8 * 1024 <= SHARED_BYTES  # barriers, scratch of reductions, alignment
        assert scratch["weights_memory"].shape[0] >= 2


# --- Who gets it, lowered for devices that are not here.


def lowered(shape, **of):
    given = shapes_of(shape, **of)
    with device():
        text = jax.jit(blocks).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]


@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("shape", [(16, 1, 1024), (3, 5, 128), (16, 16, 1024), (2, 64, 1920)], ids=str)
def test_a_stack_is_one_kernel(shape, depth):
    (call,) = lowered(shape, depth=depth)
    assert f"tensor<{depth}x{shape[2]}x{3 * shape[2]}xbf16>" in call


@pytest.mark.parametrize("width", [128, 1024, 1536, 1920])
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_few_rows_are_served_and_twice_as_many_are_not(width, tokens):
    def served(batch):
        return serves(jax.ShapeDtypeStruct((batch, tokens, width), jnp.bfloat16), width // TILE, 4 * width)

    with device():
        most = MOST_READERS * TILE * (132 * TILE // (4 * width))
        assert served(1)
        assert served(most // tokens)
        assert not served(most // tokens + 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "heads", "features"),
    [
        ((2, 3, 1024), "float32", 16, 4096),
        ((2, 65, 1024), "bfloat16", 16, 4096),
        ((2, 0, 1024), "bfloat16", 16, 4096),
        ((2, 3, 1024), "bfloat16", 8, 4096),
        ((2, 3, 192), "bfloat16", 3, 768),
        ((2, 3, 1024), "bfloat16", 16, 1000),
        ((1024, 4, 1024), "bfloat16", 16, 4096),
        ((6, 1024), "bfloat16", 16, 4096),
    ],
    ids=["float32", "a long sample", "no token", "large heads", "a narrow width", "odd features", "many rows", "a row"],
)
def test_tokens_that_do_not_fit_are_not_served(shape, dtype, heads, features):
    with device():
        assert not serves(jax.ShapeDtypeStruct(shape, dtype), heads, features)


@pytest.mark.parametrize(
    "where", [{"kind": "NVIDIA A100-SXM4-80GB"}, {"mesh": {"data": 2}}, {"mesh": {"tensor": 2}}], ids=str
)
def test_other_devices_and_several_are_left_to_xla(where):
    with device(**where):
        assert not serves(jax.ShapeDtypeStruct((2, 4, 1024), jnp.bfloat16), 16, 4096)


def test_what_is_not_served_raises():
    with device(), pytest.raises(ValueError, match="bfloat16 \\(B, N, C\\)"):
        jax.eval_shape(blocks, *shapes_of((2, 65, 1024)))


# --- On the card.


def case_of(shape, depth=2, seed=0):
    """What `blocks` takes, of sizes that trained models have."""
    rng = np.random.default_rng(seed)
    given = shapes_of(shape, depth)

    def fill(name, like):
        scale = like.shape[1] ** -0.5 if like.dtype == jnp.bfloat16 else 0.3
        noise = scale * rng.standard_normal(like.shape, np.float32)
        return jnp.asarray(4 * np.exp(noise) if name == "q_scale" else noise, like.dtype)

    weights, modulation = (type(part)(*map(fill, part._fields, part)) for part in given[1:])
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), weights, modulation


@jax.jit
def plain(x, weights, modulation):
    """In float32, never rounded."""
    batch, tokens, _ = x.shape

    def norm(x, scale, shift):
        x = x - x.mean(axis=-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale) + shift

    def unit(x):
        return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))

    def block(x, given):
        w, m = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        qkv = (norm(x, m.s1, m.b1) @ w.qkv + w.qkv_bias).reshape(batch, tokens, 3, -1, TILE)
        q, k, v = jnp.unstack(qkv, axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", unit(q) * w.q_scale[:, None], unit(k))
        attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v).reshape(x.shape)
        x = x + m.g1 * (attended @ w.proj + w.proj_bias)
        hidden = jax.nn.gelu(norm(x, m.s2, m.b2) @ w.fc1 + w.fc1_bias, approximate=True)
        return x + m.g2 * (hidden @ w.fc2 + w.fc2_bias), None

    with jax.default_matmul_precision("highest"):
        return lax.scan(block, x.astype(jnp.float32), (weights, modulation))[0]


@pytest.mark.skipif(not on_a_hopper(), reason="needs a Hopper GPU")
class TestOnAHopper:
    def check(self, case):
        found, again, expected = (np.asarray(f(*case), np.float64) for f in (blocks, blocks, plain))
        np.testing.assert_array_equal(found, again)
        error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert error.max() < TOLERANCE * np.sqrt(len(case[1].qkv))
        return found

    @pytest.mark.parametrize(
        "shape",
        [
            (1, 1, 1024),
            (16, 1, 1024),
            (3, 5, 128),
            (16, 4, 1024),
            (2, 25, 1536),
            (16, 9, 1024),
            (16, 16, 1024),
            (4, 64, 1024),
            (16, 1, 1920),
            (2, 36, 1920),
            (8, 16, 1920),
        ],
        ids=str,
    )
    def test_blocks_give_what_plain_ones_give_and_the_same_each_time(self, shape):
        self.check(case_of(shape))

    def test_what_memory_held_before_does_not_matter(self):
        jnp.full(2**28, jnp.nan).block_until_ready().delete()
        self.check(case_of((3, 5, 1024)))

    def test_a_deep_stack_does_not_drift(self):
        self.check(case_of((16, 4, 1024), depth=16))

    def test_blocks_one_by_one_give_what_a_stack_gives(self):
        x, *stack = case_of((16, 4, 1024), depth=3)
        together = blocks(x, *stack)
        for i in range(3):
            x = blocks(x, *jax.tree.map(lambda part, i=i: part[i : i + 1], stack))
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(together, np.float32))

    def test_programs_run_it_often(self):
        case = case_of((16, 4, 1024))
        x, *given = case

        def often(x):
            return lax.fori_loop(0, 20, lambda _, x: blocks(x, *given), x)

        found = jax.jit(often)(x)
        for _ in range(20):
            x = blocks(x, *given)
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(x, np.float32))
