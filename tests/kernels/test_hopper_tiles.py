"""What the Hopper kernels visit, and how they are cut."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from absent_devices import compiling_for, gpu

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention.hopper import blocks as hopper_blocks
from pallas_kernels.scale_attention.hopper import tiles
from pallas_kernels.scale_attention.hopper.attention import candidates, hopper_attention
from pallas_kernels.scale_attention.hopper.blocks import (
    DEFAULT_KIND,
    NEEDS,
    TUNED,
    Blocks,
    HopperBlocks,
    table_entry,
    tuned_blocks,
)
from pallas_kernels.scale_attention.ranges import check_ranges, transpose_ranges

PATTERNS = ["block_diagonal", "block_causal"]
PRESETS = ["256", "512", "1024"]


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
        with compiling_for(gpu("NVIDIA H20")):
            assert tuned_blocks(ranges, norm) == rows[row, norm]
            assert table_entry(ranges, 64, "bfloat16", norm) == f"TUNED['NVIDIA H20'][{row}, {norm}]"

    def test_a_device_gets_its_own_row_and_one_that_nobody_measured_the_default(self, monkeypatch):
        ranges, other = ScaleLadder((1, 2)).key_ranges("block_causal"), HopperBlocks(*[Blocks(1, 64, 64, 2)] * 3)
        monkeypatch.setitem(TUNED, "NVIDIA H20", dict.fromkeys(TUNED[DEFAULT_KIND], other))
        with compiling_for(gpu("NVIDIA H20")):
            assert tuned_blocks(ranges, norm=True) == other
        for kind in ("NVIDIA H200", "NVIDIA H800"):
            with compiling_for(gpu(kind)):
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
