"""Every implementation behind `scale_attention` against a softmax per token, written from the sides alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ladders import ladders

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention import packed_scale_attention, scale_attention
from pallas_kernels.scale_attention.hopper import tiles as hopper_tiles
from pallas_kernels.scale_attention.ranges import runs, transpose_ranges
from pallas_kernels.scale_attention.tpu import tiles as tpu_tiles
from pallas_kernels.scale_attention.triton import tiles as triton_tiles

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


# --- ladders of any kind

moderate_ladders = ladders.filter(lambda ladder: ladder.length <= 4096)  # the definition is dense, of each scale
# As TOLERANCE, of the output and of gradients.
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (5e-3, 1e-2), "float16": (1e-3, 2e-3)}


def definition_by_run(q, k, v, cotangent, q_scale, key_ranges):
    """Output and gradients in float64, one run of queries after another; the norm of what q_scale's sums, by head."""
    q, k, v, cotangent = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, cotangent))  # (B,H,L,D)
    factor = q.shape[-1] ** -0.5 if q_scale is None else np.asarray(q_scale, np.float64)[:, None, None]
    norms = [np.ones(()) if q_scale is None else np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)]
    unit_q, unit_k = q / norms[0], k / norms[1]
    out, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    for first, last, start, end in runs(key_ranges):
        rows, columns = np.s_[:, :, first:last], np.s_[:, :, start:end]
        logits = factor * unit_q[rows] @ unit_k[columns].swapaxes(2, 3)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[rows] = weights @ v[columns]
        dv[columns] += weights.swapaxes(2, 3) @ cotangent[rows]
        dlogits = cotangent[rows] @ v[columns].swapaxes(2, 3)
        dlogits = weights * (dlogits - np.sum(weights * dlogits, axis=-1, keepdims=True))
        dq[rows] = dlogits @ unit_k[columns]
        dk[columns] += dlogits.swapaxes(2, 3) @ (factor * unit_q[rows])
    results = [out, factor * dq, dk, dv]
    if q_scale is not None:  # through x / |x|
        for i, (unit, norm) in enumerate([(unit_q, norms[0]), (unit_k, norms[1])], start=1):
            results[i] = (results[i] - unit * np.sum(unit * results[i], axis=-1, keepdims=True)) / norm
        results.append(np.sum(unit_q * dq, axis=(0, 2, 3)))
    return [x.swapaxes(1, 2) if x.ndim == 4 else x for x in results], np.sqrt(np.sum(dq**2, axis=(0, 2, 3)))


class TestAnyLadder:
    @given(moderate_ladders, st.sampled_from(PATTERNS), st.booleans(), st.sampled_from(sorted(BOUNDS)), st.integers(0))
    @example(ScaleLadder((1,)), "block_causal", True, "bfloat16", 0)
    @example(ScaleLadder(range(1, 15)), "block_causal", True, "bfloat16", 0)
    @example(ScaleLadder((1, 2, 3, 5, 8, 13, 21, 34, 40)), "block_diagonal", False, "bfloat16", 0)
    @example(ScaleLadder((1, 3, 40)), "block_causal", True, "float32", 0)
    @settings(max_examples=6)
    def test_output_and_gradients_of_xla_are_those_of_the_definition(self, ladder, pattern, norm, dtype, seed):
        rng = np.random.default_rng(seed)
        shape = (1, ladder.length, 2, 16)
        *qkv, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
        q_scale = jnp.asarray(rng.uniform(1, 4, 2), jnp.float32) if norm else None

        @jax.jit
        def run(cotangent, *operands):
            def attend(q, k, v, q_scale=None):
                return scale_attention(q, k, v, ladder, pattern=pattern, q_scale=q_scale, implementation="xla")

            out, pull = jax.vjp(attend, *operands)
            return out, *pull(cotangent)

        found = run(cotangent, *qkv, *([] if q_scale is None else [q_scale]))
        truth, summed = definition_by_run(*qkv, cotangent, q_scale, ladder.key_ranges(pattern))
        for i, (mine, right) in enumerate(zip(found, truth, strict=True)):
            difference, bound = np.asarray(mine, np.float64) - right, BOUNDS[dtype][i > 0]
            if i < 4:
                assert np.linalg.norm(difference) <= bound * np.linalg.norm(right)
            else:  # q_scale: terms cancel, so that rounding shows next to what is summed, not next to the sum
                assert (np.abs(difference) <= bound * summed).all()

    @given(
        ladders,
        st.sampled_from(PATTERNS),
        st.booleans(),
        st.sampled_from([64, 128, 384]),
        st.sampled_from([64, 128, 240]),
        st.sampled_from(["hopper", "tpu", "triton"]),
    )
    @settings(max_examples=300)
    def test_every_kernel_visits_each_visible_pair_once_and_no_tile_without(
        self, ladder, pattern, exchanged, rows, columns, kernel
    ):
        ranges = ladder.key_ranges(pattern)
        if exchanged:  # rows are keys, as in kernels for their gradients
            ranges = transpose_ranges(ranges)
        met = np.zeros(len(ranges), bool)
        for first, stop, tiles in VISITS[kernel](ranges, rows, columns):
            start, end = ranges[first:stop].T[:, :, None]
            seen = np.maximum(np.minimum(end, tiles + columns) - np.maximum(start, tiles), 0)
            assert (np.diff(tiles) >= columns).all()  # no column twice
            assert seen.any(axis=0).all()
            np.testing.assert_array_equal(seen.sum(axis=1), (end - start)[:, 0])
            met[first:stop] = True
        assert met.all()


def hopper_visits(ranges, rows, columns):
    bands = hopper_tiles.plan_tiles(ranges, rows, columns, bands=3).table.reshape(-1, hopper_tiles.FIELDS)
    for band in bands[bands[:, hopper_tiles.LAST] > bands[:, hopper_tiles.FIRST]]:
        tiles = band[hopper_tiles.ORIGIN] + columns * np.arange(band[hopper_tiles.FIRST], band[hopper_tiles.LAST])
        yield band[hopper_tiles.ROW], band[hopper_tiles.ROW] + rows, tiles


def tpu_visits(ranges, rows, columns):
    query, key, _ = tpu_tiles.tile_list(ranges, rows, columns, "queries")
    for tile in np.unique(query):
        yield tile * rows, (tile + 1) * rows, columns * key[query == tile]


def triton_visits(ranges, rows, columns):
    for first, stop, start, end, *_ in triton_tiles.plan_tiles(ranges, rows, columns):
        yield first, stop, np.arange(start, end, columns)


# Key ranges, rows and columns of a tile → first row, row behind the last, and the columns where visited tiles start.
VISITS = {"hopper": hopper_visits, "tpu": tpu_visits, "triton": triton_visits}


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


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (["bfloat16", "bfloat16", "float32"], "bfloat16, bfloat16, float32; expected one dtype"),
        (["int32"] * 3, "int32; expected bfloat16, float16 or float32"),
    ],
)
def test_dtypes_that_differ_or_have_no_implementation_raise(dtypes, message):
    qkv = [x.astype(dtype) for x, dtype in zip(make_qkv(ScaleLadder((1, 2))), dtypes, strict=True)]
    with pytest.raises(ValueError, match=f"q, k, v are {message}"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal")
    if len(set(dtypes)) == 1:
        with pytest.raises(ValueError, match=message):
            packed_scale_attention(jnp.stack(qkv, axis=2), ScaleLadder((1, 2)), pattern="block_causal")


@pytest.mark.parametrize(
    ("scale", "given"),
    [(jnp.ones(()), r"\(\)"), (jnp.ones(1), r"\(1,\)"), (jnp.ones(4), r"\(4,\)"), ([1.0, 1.0], "list")],
    ids=str,
)
def test_a_scale_that_has_not_one_number_for_each_head_raises(scale, given):
    qkv, ladder = make_qkv(ScaleLadder((1, 2))), ScaleLadder((1, 2))
    message = rf"q_scale is {given}; expected an array \(2,\), a number for each head"
    with pytest.raises(ValueError, match=message):
        scale_attention(*qkv, ladder, pattern="block_causal", q_scale=scale)
    with pytest.raises(ValueError, match=message):
        packed_scale_attention(jnp.stack(qkv, axis=2), ladder, pattern="block_causal", q_scale=scale)


def test_an_unknown_implementation_raises():
    qkv = make_qkv(ScaleLadder((1, 2)))
    with pytest.raises(ValueError, match="scale_attention has no implementation 'cudnn'"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal", implementation="cudnn")


def test_an_unknown_pattern_raises():
    qkv = make_qkv(ScaleLadder((1, 2)))
    with pytest.raises(ValueError, match="pattern is 'dense'; expected 'block_diagonal' or"):
        scale_attention(*qkv, ScaleLadder((1, 2)), pattern="dense")


def test_without_a_forced_implementation_this_device_gets_a_right_one():
    qkv = make_qkv(ScaleLadder((1, 2)))
    attended = scale_attention(*qkv, ScaleLadder((1, 2)), pattern="block_causal")
    assert error_of(attended, brute_force(*qkv, (1, 2), "block_causal", None)) < TOLERANCE["xla"]["float32"]


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
