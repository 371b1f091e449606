"""The Hopper kernels: what they visit, that they lower for CUDA without one, and on a Hopper what they compute."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention import hopper_blocks
from pallas_kernels.scale_attention import hopper_tiles as tiles
from pallas_kernels.scale_attention.hopper import candidates, hopper_attention, hopper_attention_packed
from pallas_kernels.scale_attention.hopper_blocks import (
    DEFAULT_KIND,
    NEEDS,
    TUNED,
    Blocks,
    HopperBlocks,
    table_entry,
    tuned_blocks,
)
from pallas_kernels.scale_attention.hopper_common import LOG2E
from pallas_kernels.scale_attention.hopper_forward import SAFE_SCALE
from pallas_kernels.scale_attention.ranges import check_ranges, transpose_ranges
from pallas_kernels.scale_attention.reference import reference_attention, scale_queries_and_keys

PATTERNS = ["block_diagonal", "block_causal"]
PRESETS = ["256", "512", "1024"]
# Norm of the difference over norm of the truth: of the output, of gradients, and, over the norm of what queries add to
# it, of the gradient by q_scale, a sum in which nearly everything cancels.
TOLERANCE = {"bfloat16": (5e-3, 1e-2, 2e-2), "float16": (1e-3, 2e-3, 4e-3)}


def random_sides(seed):
    rng = np.random.default_rng(seed)
    return tuple(sorted(rng.choice(np.arange(1, 20), size=rng.integers(1, 7), replace=False).tolist()))


SIDES = [(1,), (1, 2, 3), (8, 9), (1, 2, 3, 16), *map(random_sides, range(6)), ScaleLadder.preset("256").sides]


def ranges_of(sides, pattern, exchanged):
    ranges = ScaleLadder(sides).key_ranges(pattern)
    return transpose_ranges(ranges) if exchanged else ranges


def visible_pairs(ranges, size):
    """(L, size) bool, columns past the last included."""
    columns = np.arange(size)
    return (columns >= ranges[:, :1]) & (columns < ranges[:, 1:])


@pytest.mark.parametrize("cut", [(64, 64, 3), (64, 128, 4), (128, 64, 2)], ids=str)
@pytest.mark.parametrize("exchanged", [False, True], ids=["rows_are_queries", "rows_are_keys"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
class TestThePlan:
    def plan(self, sides, pattern, exchanged, cut):
        ranges = ranges_of(sides, pattern, exchanged)
        plan = tiles.plan_tiles(ranges, *cut)
        bands = plan.table.reshape(-1, tiles.FIELDS)
        working = bands[bands[:, tiles.LAST] > bands[:, tiles.FIRST]]
        return ranges, plan, working

    def test_every_row_is_in_a_band_and_every_visible_pair_in_one_visited_tile(self, sides, pattern, exchanged, cut):
        ranges, _, bands = self.plan(sides, pattern, exchanged, cut)
        rows, columns, _ = cut
        met = np.zeros(len(ranges), bool)
        for band in bands:
            row, origin = band[tiles.ROW], band[tiles.ORIGIN]
            mine = ranges[row : row + rows]
            met[row : row + rows] = True
            assert mine[:, 0].min() >= origin + band[tiles.FIRST] * columns
            assert mine[:, 1].max() <= origin + band[tiles.LAST] * columns
        assert met.all()

    def test_no_visited_tile_is_wholly_masked_and_only_those_with_a_hidden_pair_are_masked(
        self, sides, pattern, exchanged, cut
    ):
        ranges, _, bands = self.plan(sides, pattern, exchanged, cut)
        rows, columns, _ = cut
        visible = visible_pairs(ranges, len(ranges) + columns)
        for band in bands:
            for tile in range(band[tiles.FIRST], band[tiles.LAST]):
                column = band[tiles.ORIGIN] + tile * columns
                seen = visible[band[tiles.ROW] : band[tiles.ROW] + rows, column : column + columns]
                assert seen.any()
                assert seen.all() == (band[tiles.FULL_FIRST] <= tile < band[tiles.FULL_LAST])

    def test_bands_that_share_a_row_visit_it_on_the_same_grid(self, sides, pattern, exchanged, cut):
        """Then both compute, and store, the same bits."""
        _, _, bands = self.plan(sides, pattern, exchanged, cut)
        for a, b in itertools.combinations(bands, 2):
            if abs(a[tiles.ROW] - b[tiles.ROW]) < cut[0]:
                assert a[tiles.ORIGIN] == b[tiles.ORIGIN]

    def test_no_band_reaches_past_the_last_row_unless_there_are_too_few(self, sides, pattern, exchanged, cut):
        ranges, _, bands = self.plan(sides, pattern, exchanged, cut)
        assert bands[:, tiles.ROW].min() == 0
        assert (bands[:, tiles.ROW] + cut[0]).max() <= max(len(ranges), cut[0])

    def test_an_item_loads_what_its_bands_visit_and_belongs_to_one_region(self, sides, pattern, exchanged, cut):
        _, plan, _ = self.plan(sides, pattern, exchanged, cut)
        for item in plan.table:
            working = item[item[:, tiles.LAST] > item[:, tiles.FIRST]]
            assert (item[:, tiles.LOAD_FIRST] == working[:, tiles.FIRST].min()).all()
            assert (item[:, tiles.LOAD_LAST] == working[:, tiles.LAST].max()).all()
        items = sorted(first + i for first, count in plan.regions for i in range(count))
        assert items == list(range(len(plan.table)))

    def test_the_grid_lists_the_columns_of_every_tile(self, sides, pattern, exchanged, cut):
        ranges, plan, bands = self.plan(sides, pattern, exchanged, cut)
        for band in bands:
            for tile in range(band[tiles.FIRST], band[tiles.LAST]):
                first = band[tiles.ORIGIN] + tile * cut[1]
                expected = np.minimum(np.arange(first, first + cut[1]), len(ranges) - 1)
                np.testing.assert_array_equal(plan.columns[band[tiles.GRID] + tile], expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_exchanged_ranges_are_the_transposed_mask(sides, pattern):
    ranges = ScaleLadder(sides).key_ranges(pattern)
    exchanged = transpose_ranges(ranges)
    check_ranges(exchanged)
    size = len(ranges)
    np.testing.assert_array_equal(visible_pairs(exchanged, size), visible_pairs(ranges, size).T)


@pytest.mark.parametrize("preset", PRESETS)
def test_block_diagonal_tiles_of_the_published_ladders_waste_little(preset):
    ranges = ScaleLadder.preset(preset).key_ranges("block_diagonal")
    blocks = tuned_blocks(ranges, norm=False).forward
    table = tiles.plan_tiles(ranges, blocks.rows, blocks.columns, blocks.warpgroups).table
    visited = (table[..., tiles.LAST] - table[..., tiles.FIRST]).sum() * blocks.rows * blocks.columns
    assert visited <= 1.3 * np.sum(ranges[:, 1] - ranges[:, 0])


@pytest.mark.parametrize(
    "ranges",
    [[[0, 2], [0, 1]], [[0, 1], [1, 1]], [[0, 1], [0, 1]], [[1, 2], [1, 2]], [[0, 1], [2, 3], [2, 3]], [0, 1], []],
    ids=str,
)
def test_ranges_that_bands_cannot_follow_raise(ranges):
    with pytest.raises(ValueError, match="key_ranges"):
        check_ranges(np.asarray(ranges, np.int32))


def device(kind):
    abstract = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract))


ALL_TUNED = [(kind, case, blocks) for kind, cases in TUNED.items() for case, blocks in cases.items()]


class TestBlocks:
    @pytest.mark.parametrize("blocks", [entry[2] for entry in ALL_TUNED], ids=[f"{e[0]}-{e[1]}" for e in ALL_TUNED])
    def test_tuned_ones_fit_into_shared_memory_and_registers(self, blocks):
        blocks.check(64)
        for name in NEEDS:
            mine = getattr(blocks, name)
            threads = 128 * (mine.warpgroups * mine.compute_registers + mine.loader_registers)
            assert threads <= 65536

    def test_every_kind_of_device_has_rows_for_ranges_of_any_length(self):
        assert DEFAULT_KIND in TUNED
        for cases in TUNED.values():
            assert {(0, False), (0, True)} <= set(cases)

    @pytest.mark.parametrize(
        ("length", "norm", "row"),
        [(1, True, 0), (9, True, 0), (10, True, 9), (99, True, 9), (100, True, 99), (100, False, 0)],
    )
    def test_a_row_is_of_ranges_longer_than_its_number(self, length, norm, row, monkeypatch):
        cases = [(0, False), (0, True), (9, True), (99, True)]
        rows = {case: HopperBlocks(*[Blocks(1, 64, 64, 2 + i)] * 3) for i, case in enumerate(cases)}
        monkeypatch.setitem(TUNED, "NVIDIA H20", rows)
        ranges = np.tile([[0, length]], (length, 1))
        with device("NVIDIA H20"):
            assert tuned_blocks(ranges, norm) == rows[row, norm]
            assert table_entry(ranges, 64, "bfloat16", norm) == f"TUNED['NVIDIA H20'][{row}, {norm}]"

    def test_a_device_gets_its_own_row_and_one_that_nobody_measured_the_default(self, monkeypatch):
        ranges, other = ScaleLadder((1, 2)).key_ranges("block_causal"), HopperBlocks(*[Blocks(1, 64, 64, 2)] * 3)
        monkeypatch.setitem(TUNED, "NVIDIA H20", dict.fromkeys(TUNED[DEFAULT_KIND], other))
        with device("NVIDIA H20"):
            assert tuned_blocks(ranges, norm=True) == other
        for kind in ("NVIDIA H200", "NVIDIA H800"):
            with device(kind):
                assert tuned_blocks(ranges, norm=True) == TUNED[DEFAULT_KIND][0, True]

    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("size", [32, 64])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_candidates_start_with_what_is_in_use_fit_and_differ_in_one_kernel(self, preset, size, norm):
        ranges = ScaleLadder.preset(preset).key_ranges("block_diagonal")
        used, *others = candidates(ranges, size, "bfloat16", norm)
        assert used == tuned_blocks(ranges, norm)
        assert len({used, *others}) == 1 + len(others)
        for blocks in others:
            blocks.check(size)
            differing = [name for name in NEEDS if getattr(blocks, name) != getattr(used, name)]
            assert len(differing) == 1
        assert {name for b in others for name in NEEDS if getattr(b, name) != getattr(used, name)} == set(NEEDS)
        assert {blocks.forward.paired for blocks in others} == {False, True}
        assert not any(blocks.grad_queries.paired or blocks.grad_keys.paired for blocks in others)

    def test_candidates_print_as_what_the_table_wants(self):
        for blocks in candidates(ScaleLadder((1, 9)).key_ranges("block_causal"), 64, "float16", norm=True):
            assert eval(repr(blocks), vars(hopper_blocks)) == blocks

    def test_candidates_for_a_dtype_without_kernels_raise(self):
        with pytest.raises(ValueError, match="16 bits, not float32"):
            candidates(ScaleLadder((1, 9)).key_ranges("block_causal"), 64, "float32", norm=True)

    def test_too_much_shared_memory_raises_with_the_numbers(self):
        ranges = ScaleLadder((1, 2)).key_ranges("block_causal")
        blocks = HopperBlocks(Blocks(3, 64, 128, 12), Blocks(3, 64, 64, 4), Blocks(3, 64, 64, 4))
        with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory"):
            hopper_attention(*[jnp.zeros((1, 5, 2, 64), "bfloat16")] * 3, ranges, None, blocks=blocks)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [((5, 64, 64, 4), "warpgroups"), ((3, 96, 64, 4), "multiples of 64"), ((3, 64, 64, 1), "stages")],
    )
    def test_unsupported_numbers_raise(self, numbers, message):
        with pytest.raises(ValueError, match=message):
            Blocks(*numbers)


def test_what_needs_no_maximum_stays_within_float32_and_bfloat16():
    most = SAFE_SCALE * LOG2E * (1 + float(jnp.finfo("bfloat16").eps))  # the norm of a rounded key may exceed 1
    assert np.exp2(-most) >= float(jnp.finfo("bfloat16").tiny)
    assert 2**20 * 1e4 * np.exp2(most) <= float(jnp.finfo("float32").max)


def attend(operands, ranges, q_scale, blocks=None):
    attention = hopper_attention if len(operands) == 3 else hopper_attention_packed
    return attention(*operands, ranges, q_scale, blocks=blocks)


def value_and_gradients(operands, ranges, q_scale, dout, blocks=None):
    out, pull = jax.vjp(lambda operands, scale: attend(operands, ranges, scale, blocks), operands, q_scale)
    return out, pull(dout)


def with_relay(blocks, relay):
    return HopperBlocks(*(dataclasses.replace(getattr(blocks, name), relay=relay) for name in NEEDS))


def in_pairs(blocks, relay=True):
    return dataclasses.replace(blocks, forward=Blocks(4, 64, 64, 7, relay=relay, paired=True))


def lower(function, *arguments):
    with device("NVIDIA H200"):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shapes_of(length, packed, norm, heads=2, size=64, dtype="bfloat16"):
    out = jax.ShapeDtypeStruct((2, length, heads, size), dtype)
    operands = (jax.ShapeDtypeStruct((2, length, 3, heads, size), dtype),) if packed else (out,) * 3
    return operands, jax.ShapeDtypeStruct((heads,), "float32") if norm else None, out


class TestLowersForCudaWithoutOne:
    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_forward_and_backward_are_three_kernels(self, preset, pattern, norm):
        ladder = ScaleLadder.preset(preset)
        operands, scale, out = shapes_of(ladder.length, False, norm)
        text = lower(
            lambda operands, scale, dout: value_and_gradients(operands, ladder.key_ranges(pattern), scale, dout),
            *(operands, scale, out),
        )
        assert text.count("stablehlo.custom_call @mosaic_gpu") == 3

    @pytest.mark.parametrize("relay", [False, True], ids=["free", "relay"])
    def test_with_a_baton_and_without(self, relay):
        ranges = ScaleLadder((1, 2, 9)).key_ranges("block_diagonal")
        blocks, (operands, scale, out) = with_relay(tuned_blocks(ranges, True), relay), shapes_of(86, True, True)
        assert lower(lambda *a: value_and_gradients(a[0], ranges, *a[1:], blocks), operands, scale, out)

    @pytest.mark.parametrize(
        ("packed", "norm", "dtype"),
        [(False, True, "bfloat16"), (True, True, "bfloat16"), (True, False, "bfloat16"), (True, True, "float16")],
    )
    def test_in_pairs_whether_or_not_logits_are_bounded(self, packed, norm, dtype):
        ranges = ScaleLadder((1, 2, 9)).key_ranges("block_causal")
        blocks, (operands, scale, _) = (
            in_pairs(tuned_blocks(ranges, norm)),
            shapes_of(86, packed, norm, dtype=dtype),
        )
        assert lower(lambda *a: attend(a[0], ranges, a[1], blocks), operands, scale)

    @pytest.mark.parametrize(("size", "dtype"), [(32, "bfloat16"), (64, "float16")])
    def test_other_heads_and_dtypes(self, size, dtype):
        ranges = ScaleLadder((1, 2, 3)).key_ranges("block_causal")
        operands, scale, out = shapes_of(14, False, True, size=size, dtype=dtype)
        assert lower(lambda *a: value_and_gradients(a[0], ranges, *a[1:]), operands, scale, out)

    def test_in_a_scanned_and_rematerialised_layer_with_packed_operands(self):
        ladder = ScaleLadder((1, 2, 9))
        ranges, (operands, scale, _) = ladder.key_ranges("block_diagonal"), shapes_of(ladder.length, True, True)

        def loss(qkv, scales):
            def layer(qkv, scale):
                out = jax.checkpoint(lambda *a: hopper_attention_packed(a[0], ranges, a[1]))(qkv, scale)
                return qkv + out[:, :, None], None

            return jnp.sum(jax.lax.scan(layer, qkv, scales)[0].astype(jnp.float32))

        scales = jax.ShapeDtypeStruct((3, *scale.shape), scale.dtype)
        assert lower(jax.grad(loss, argnums=(0, 1)), *operands, scales)


@pytest.mark.parametrize(
    ("shapes", "dtype", "length", "message"),
    [
        ([(1, 5, 2, 64), (1, 5, 2, 64), (1, 5, 2, 32)], "bfloat16", 5, "thrice the same"),
        ([(5, 2, 64)] * 3, "bfloat16", 5, "thrice the same"),
        ([(1, 5, 2, 64)] * 3, "float32", 5, "bfloat16 or float16"),
        ([(1, 5, 2, 48)] * 3, "bfloat16", 5, "heads of"),
        ([(1, 5, 2, 64)] * 3, "bfloat16", 14, "of 14 tokens"),
        ([(1, 5, 2, 64)], "bfloat16", 5, r"expected \(B, L, 3, H, D\)"),
    ],
)
def test_operands_that_are_not_supported_raise(shapes, dtype, length, message):
    ranges = {5: ScaleLadder((1, 2)), 14: ScaleLadder((1, 2, 3))}[length].key_ranges("block_causal")
    with pytest.raises(ValueError, match=message):
        attend([jnp.zeros(shape, dtype) for shape in shapes], ranges, None)


def on_a_hopper():
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


@pytest.mark.skipif(not on_a_hopper(), reason="needs a Hopper GPU")
class TestOnAHopper:
    @pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize(
        ("sides", "size", "dtype"),
        [
            ((1,), 64, "bfloat16"),
            ((1, 2, 3, 16), 64, "bfloat16"),
            ((1, 2, 5, 9), 32, "float16"),
            ("256", 64, "bfloat16"),
        ],
        ids=str,
    )
    def test_values_and_gradients_are_those_of_the_reference_and_bit_equal_when_repeated(
        self, sides, size, dtype, pattern, norm, packed
    ):
        check_values_and_gradients(sides, size, dtype, pattern, norm, packed)

    @pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
    @pytest.mark.parametrize("relay", [False, True], ids=["free", "relay"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("sides", [(1,), (1, 2, 3, 16), (1, 2, 37)], ids=str)
    def test_pairs_of_products_give_the_values_and_gradients_of_the_reference(self, sides, pattern, relay, packed):
        check_values_and_gradients(
            *(sides, 64, "bfloat16", pattern, True, packed), lambda blocks: in_pairs(blocks, relay)
        )

    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("sides", [(1, 2, 3, 16), "256"], ids=str)
    def test_a_baton_changes_no_bit(self, sides, pattern, norm):
        ladder = ScaleLadder.preset(sides) if isinstance(sides, str) else ScaleLadder(sides)
        ranges, rng = ladder.key_ranges(pattern), np.random.default_rng(0)
        qkv, dout = (jnp.asarray(rng.normal(size=(2, ladder.length, *n, 3, 64)), "bfloat16") for n in ((3,), ()))
        scale, tuned = jnp.asarray([4.0, -0.5, 11.0]) if norm else None, tuned_blocks(ranges, norm)

        def run(relay):
            blocks = with_relay(tuned, relay)
            return jax.jit(lambda *a: value_and_gradients(a[0], ranges, *a[1:], blocks))((qkv,), scale, dout)

        jax.tree.map(np.testing.assert_array_equal, run(False), run(True))

    @pytest.mark.parametrize("paired", [False, True], ids=["one_by_one", "pairs"])
    def test_heads_with_and_without_a_maximum_are_right(self, paired):
        """Unit keys that bfloat16 has exactly: else their rounding would be most of the error of large scales."""
        ladder, rng = ScaleLadder((1, 2, 5, 16)), np.random.default_rng(0)
        q, k, v, dout = (jnp.asarray(rng.normal(size=(1, ladder.length, 4, 64)), "bfloat16") for _ in range(4))
        k, scale = jnp.sign(k), jnp.asarray([SAFE_SCALE, -SAFE_SCALE, 1.1 * SAFE_SCALE, 100.0])
        ranges = ladder.key_ranges("block_diagonal")
        blocks = tuned_blocks(ranges, norm=True)
        blocks = in_pairs(blocks) if paired else blocks
        out = jax.jit(lambda q, k, v, scale: attend((q, k, v), ranges, scale, blocks))(q, k, v, scale)
        truth = true_values(q, k, v, dout, scale, ranges)[0]
        for head in range(4):
            assert error_of(out[:, :, head], truth[:, :, head]) < TOLERANCE["bfloat16"][0]


def check_values_and_gradients(sides, size, dtype, pattern, norm, packed, adapt=lambda blocks: blocks):
    """Those of the reference, and bit-equal when repeated, with the blocks that `adapt` makes of the tuned ones."""
    ladder = ScaleLadder.preset(sides) if isinstance(sides, str) else ScaleLadder(sides)
    ranges, rng = ladder.key_ranges(pattern), np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(2, ladder.length, 3, size)), dtype) for _ in range(4))
    scale = jnp.asarray([4.0, -0.5, 11.0]) if norm else None
    operands = (jnp.stack([q, k, v], axis=2),) if packed else (q, k, v)
    blocks = adapt(tuned_blocks(ranges, norm))
    function = jax.jit(lambda *a: value_and_gradients(a[0], ranges, *a[1:], blocks))
    result, again = function(operands, scale, dout), function(operands, scale, dout)
    jax.tree.map(np.testing.assert_array_equal, result, again)

    out, (gradients, dscale) = result
    truth, true_gradients, parts = true_values(q, k, v, dout, scale, ranges)
    if packed:
        gradients = [gradients[0][:, :, i] for i in range(3)]
    assert error_of(out, truth) < TOLERANCE[dtype][0]
    for gradient, true in zip(gradients, true_gradients[:3], strict=True):
        if np.any(true):
            assert error_of(gradient, true) < TOLERANCE[dtype][1]
    if norm:
        np.testing.assert_allclose(np.sum(parts, axis=(0, 1)), true_gradients[3], rtol=1e-4, atol=1e-4)
        # The gradient of a lone token is 0. Its weight is not quite 1 where it is rounded without a maximum.
        least = 2e-3 if (ladder.length, dtype) == (1, "bfloat16") else 1e-4
        most = TOLERANCE[dtype][2] * np.linalg.norm(parts, axis=(0, 1)) + least
        np.testing.assert_array_less(np.abs(dscale - true_gradients[3]), most)


def true_values(q, k, v, dout, scale, ranges):
    """Output, gradients by q, k, v and q_scale, and with QK-norm (B,L,H): what queries add to the last."""

    @jax.jit  # whole: a GPU compiles each step of it on its own else
    def run(q, k, v, dout, scale):
        out, pull = jax.vjp(lambda q, k, v, scale: reference_attention(q, k, v, ranges, scale), q, k, v, scale)
        if scale is None:
            return out, pull(dout), None
        unit_q, unit_k = scale_queries_and_keys(q, k, jnp.ones_like(scale))

        def attention(scales):
            return reference_attention(unit_q * (scales * q.shape[-1] ** 0.5)[..., None], unit_k, v, ranges, None)

        return out, pull(dout), jax.vjp(attention, jnp.broadcast_to(scale, q.shape[:3]))[1](dout)[0]

    return run(*(x.astype(jnp.float32) for x in (q, k, v, dout)), scale)


def error_of(result, truth):
    difference = np.asarray(result, np.float64) - np.asarray(truth, np.float64)
    return np.linalg.norm(difference) / np.linalg.norm(truth)
