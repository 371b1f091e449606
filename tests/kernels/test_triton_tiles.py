"""What the Triton kernels visit, and how large their tiles may be."""

import numpy as np
import pytest

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention.ranges import transpose_ranges
from pallas_kernels.scale_attention.triton.tiles import (
    FIRST,
    FULL_FIRST,
    FULL_LAST,
    LAST,
    LEAST_SHARED_BYTES,
    ROW,
    STOP,
    TUNED,
    Blocks,
    TritonBlocks,
    candidates,
    plan_tiles,
    tuned_blocks,
)

PATTERNS = ["block_diagonal", "block_causal"]


def random_sides(seed):
    rng = np.random.default_rng(seed)
    return tuple(sorted(rng.choice(np.arange(1, 20), size=rng.integers(1, 7), replace=False).tolist()))


SIDES = [(1,), (1, 2, 3), (8, 9), (1, 2, 3, 16), *map(random_sides, range(6)), ScaleLadder.preset("256").sides]


@pytest.mark.parametrize("cut", [(64, 64), (64, 32), (128, 64), (16, 32)], ids=str)
@pytest.mark.parametrize("exchanged", [False, True], ids=["rows_are_queries", "rows_are_keys"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
class TestThePlan:
    def plan(self, sides, pattern, exchanged, cut):
        ranges = ScaleLadder(sides).key_ranges(pattern)
        ranges = transpose_ranges(ranges) if exchanged else ranges
        return ranges, plan_tiles(ranges, *cut)

    def test_every_row_is_in_one_tile_and_every_visible_column_among_those_visited(
        self, sides, pattern, exchanged, cut
    ):
        ranges, plan = self.plan(sides, pattern, exchanged, cut)
        met = [row for tile in plan for row in range(tile[ROW], tile[STOP])]
        assert sorted(met) == list(range(len(ranges)))
        assert (plan[:, STOP] - plan[:, ROW]).max() <= cut[0]
        for tile in plan:
            mine = ranges[tile[ROW] : tile[STOP]]
            assert (mine[:, 0].min(), mine[:, 1].max()) == (tile[FIRST], tile[LAST])

    def test_no_visited_tile_is_wholly_masked_and_only_those_with_a_hidden_pair_are_masked(
        self, sides, pattern, exchanged, cut
    ):
        ranges, plan = self.plan(sides, pattern, exchanged, cut)
        columns = np.arange(len(ranges) + cut[1])
        visible = (columns >= ranges[:, :1]) & (columns < ranges[:, 1:])
        for tile in plan:
            assert (tile[FULL_FIRST] - tile[FIRST]) % cut[1] == (tile[FULL_LAST] - tile[FULL_FIRST]) % cut[1] == 0
            for column in range(tile[FIRST], tile[LAST], cut[1]):
                seen = visible[tile[ROW] : tile[STOP], column : column + cut[1]]
                assert seen.any()
                assert seen.all() == (tile[FULL_FIRST] <= column < tile[FULL_LAST])

    def test_the_longest_come_first(self, sides, pattern, exchanged, cut):
        _, plan = self.plan(sides, pattern, exchanged, cut)
        assert (np.diff(plan[:, LAST] - plan[:, FIRST]) <= 0).all()


@pytest.mark.parametrize("preset", ["256", "512", "1024"])
def test_block_diagonal_tiles_of_the_published_ladders_waste_little(preset):
    ranges = ScaleLadder.preset(preset).key_ranges("block_diagonal")
    blocks = tuned_blocks(64, "bfloat16").forward
    plan = plan_tiles(ranges, blocks.rows, blocks.columns)
    visited = np.sum(-(-(plan[:, LAST] - plan[:, FIRST]) // blocks.columns)) * blocks.rows * blocks.columns
    assert visited <= 1.5 * np.sum(ranges[:, 1] - ranges[:, 0])


class TestBlocks:
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize(("itemsize", "size"), TUNED)
    def test_those_in_use_and_candidates_fit_into_shared_memory(self, itemsize, size, norm):
        dtype = {2: "bfloat16", 4: "float32"}[itemsize]
        ranges = ScaleLadder.preset("256").key_ranges("block_causal")
        found = candidates(ranges, size, dtype, norm)
        assert found[0] == tuned_blocks(size, dtype)
        assert len(found) == len(set(found)) >= (1 if itemsize * size == 512 else 10)  # in which little else fits
        for blocks in found:
            blocks.check(size, itemsize, LEAST_SHARED_BYTES)

    def test_too_much_shared_memory_raises_with_the_number(self):
        large = Blocks(128, 128, 8, 3)
        with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory.*there are 101376"):
            TritonBlocks(large, large, large).check(128, 2, LEAST_SHARED_BYTES)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [((48, 64, 4, 2), "48 x 64"), ((64, 8, 4, 2), "64 x 8"), ((64, 64, 3, 2), "3 warps"), ((64, 64, 4, 0), "0 st")],
    )
    def test_unsupported_numbers_raise(self, numbers, message):
        with pytest.raises(ValueError, match=message):
            Blocks(*numbers)
